"""What mkdocs calls while it builds the site (mkdocs.yml)."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]*)(#[^)]*)?\)")
SOURCES = ROOT / ".cache" / "docs-sources"  # where mkdocs.yml tells mkdocstrings to look


def on_startup(**_: Any) -> None:
    """Copy the package, for mkdocstrings, which does not find modules in folders without `__init__.py`.

    kernels/ and calibrate/ must not have one where they are, since they would be importable by themselves.
    `make docs` runs mkdocs in another folder than this one, where it would find the package as it is. Done at
    the start: mkdocstrings ignores a folder that does not exist when it reads mkdocs.yml.
    """
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.copytree(ROOT / "cor_vllm", SOURCES / "cor_vllm")  # what the links lead to is copied, too
    for folder in ("kernels", "calibrate"):
        (SOURCES / "cor_vllm" / folder / "__init__.py").touch()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace each link that leaves docs/ by its text and the file's path, since the site has no such file.

    In place of contributing.md the site has CONTRIBUTING.md, which code hosts look for at the top.

    Raises:
        FileNotFoundError: the file does not exist; the message names page and link.
    """
    if page.file.src_uri == "contributing.md":
        return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        text, target, _ = link.groups()
        path = Path(os.path.normpath(folder / target))
        if path.is_relative_to(ROOT / "docs"):
            return link[0]
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {target} does not exist")
        name = path.relative_to(ROOT)
        return text if text.strip("`") == str(name) else f"{text} (`{name}`)"

    return LINK.sub(named, markdown)
