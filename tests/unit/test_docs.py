"""The reference pages say what the code does: commands and flags, Python names, metrics."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from tools import reference

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def test_commands_and_flags_are_those_of_the_parsers() -> None:
    """After a change of a help text: python tools/reference.py."""
    assert (REFERENCE / "commands.md").read_text(encoding="utf-8") == reference.commands()
    assert (REFERENCE / "flags.md").read_text(encoding="utf-8") == reference.serving_flags()


def names() -> list[str]:
    return re.findall(r"^::: (\S+)$", (REFERENCE / "api.md").read_text(encoding="utf-8"), flags=re.M)


def test_the_public_modules_are_on_the_page() -> None:
    modules = {name.rpartition(".")[0] for name in names()}
    assert {"cor_vllm.scores", "cor_vllm.budget", "cor_vllm.kernels.dispatch", "cor_vllm.modes"} <= modules


@pytest.mark.parametrize("name", names())
def test_a_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found: Any = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, dict) or found.__doc__


def test_every_metric_is_on_the_page() -> None:
    page = (REFERENCE / "metrics.md").read_text(encoding="utf-8")
    source = (ROOT / "cor_vllm" / "live" / "metrics.py").read_text(encoding="utf-8")
    found = set(re.findall(r'"(cor_[a-z_]+)"', source))
    assert len(found) > 6
    from cor_vllm.serve.observe import COUNTERS

    found |= {f"cor_{counter}_total" for counter in COUNTERS}
    assert not {name for name in found if name not in page}


def test_every_field_of_the_endpoint_is_on_the_page() -> None:
    from cor_vllm.live.state import State

    page = (REFERENCE / "endpoint.md").read_text(encoding="utf-8")
    fields = {field.alias or name for name, field in State.model_fields.items()}
    assert not {name for name in fields if f"`{name}`" not in page}


def test_every_mode_is_in_the_method() -> None:
    from cor_vllm.modes import MODES

    page = (REFERENCE / "method.md").read_text(encoding="utf-8")
    assert not {name for name in MODES if f"| `{name}` |" not in page}


def test_every_section_of_a_scores_file_is_on_the_page() -> None:
    from cor_vllm.metadata import ScoresConfig
    from cor_vllm.scores import Scores

    page = (REFERENCE / "scores-file.md").read_text(encoding="utf-8")
    wanted = {*ScoresConfig.model_fields, *Scores.__dataclass_fields__} - {"config"}
    assert not {name for name in wanted if f"`{name}`" not in page}


def test_every_key_of_a_router_file_is_on_the_page() -> None:
    from cor_vllm.overlay import HeldoutBin, OverlayConfig, RouterOverlay

    page = (REFERENCE / "router-file.md").read_text(encoding="utf-8")
    wanted = {*OverlayConfig.model_fields, *HeldoutBin.model_fields, *RouterOverlay.__dataclass_fields__}
    assert not {name for name in wanted - {"config"} if f"`{name}`" not in page}
