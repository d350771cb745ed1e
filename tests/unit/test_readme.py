"""The front page is short, its pictures and numbers are true, its commands exist; no page has a dead link."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from cor_vllm import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PICTURES = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"picture_{name}", PICTURES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`\]", "code]", text)


def links(page: Path) -> list[str]:
    """What the page links to within the repository."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The names by which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(program: str) -> list[list[str]]:
    """The words of every command of README's code blocks that starts with `program`, without that word."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    found = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in found if words[:1] == [program]]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_its_numbers_are_those_of_the_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    numbers = re.findall(r"[+−]\d\.\d\d(?: points)? \[[^]]+\]|\d\.\d{3} ± \d\.\d{3}", README)
    assert len(numbers) == 9
    for number in numbers:
        assert number.replace(" points", "") in results


def test_its_commands_are_those_that_the_program_takes() -> None:
    found = commands("cor-vllm")
    assert [words[0] for words in found] == ["calibrate", "show"]
    for words in found:
        _, rest = cli.build_parser().parse_known_args(words)
        assert not rest


def test_vllm_takes_its_command_to_serve() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cor_vllm.serve import flags

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    (serve,) = (command.subparser_init(subparsers) for command in cmd_init())
    if "--cor-scores" not in serve._option_string_actions:
        flags.add(serve)
    (words,) = commands("vllm")
    args = parser.parse_args(words)
    assert (args.model_tag, args.cor_scores) == ("MODEL", "scores.safetensors")


def test_what_it_installs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = [words[0] for words in commands("make")]
    assert {"install", "wheel", "demo"} <= set(made) <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for _, what in commands("pip"):
        assert what.removeprefix(".[").removesuffix("]") in extras["optional-dependencies"]


def test_the_picture_of_the_idea_is_what_its_program_draws(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    matplotlib = pytest.importorskip("matplotlib")
    idea = program("idea")
    found = idea.read()
    new = set(found.routed) - set(found.stock)
    assert new and set(found.stock) - set(found.routed), "the token of the picture loses an expert, too"
    assert sum(found.k) == found.top_k * len(found.k)
    if f"matplotlib=={matplotlib.__version__}" not in (ROOT / "requirements-cpu.lock").read_text():
        pytest.skip("another matplotlib draws other lines")
    with matplotlib.rc_context(idea.STYLE):
        idea.save(idea.draw(found), tmp_path / "idea.svg")
    assert (tmp_path / "idea.svg").read_bytes() == idea.PICTURE.read_bytes(), "python docs/pictures/idea.py"


def test_the_picture_of_the_demo_leaves_parts_out_and_names_no_folder_of_its_maker() -> None:
    demo = program("demo")
    output = (
        f"\x1b[?25lwrote {demo.ROOT}/demo-output/scores\nloading model\nmore\nwarning: too few hard\nend\n"
    )
    assert demo.chosen(output) == ["wrote demo-output/scores", "  …", "end"]
    assert "&#160;demo-output/scores" in demo.draw(output)
    picture = demo.PICTURE.read_text(encoding="utf-8")
    assert all(f"[{step}/6]" in picture for step in range(1, 7))
    assert "&#160;/" not in picture, "a path from the root of a file system"
    assert "@font-face" not in picture
