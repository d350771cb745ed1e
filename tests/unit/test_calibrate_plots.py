"""The figures: that they are drawn, and that they show what is in the file."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.result.plots import budget_figure, cei_figure, coverage_figure, plot
from cor_vllm.calibrate.result.show import dormant
from cor_vllm.testing import make_scores, tiny_models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("deepseek_v2", tmp_path_factory.mktemp("models") / "tiny-deepseek")


def test_plots_are_images(checkpoint: Path, tmp_path: Path) -> None:
    scores = make_scores.make(checkpoint)
    written = plot(scores, tmp_path / "figures")
    names = {f"{name}.{suffix}" for name in ("budget", "cei", "coverage") for suffix in ("png", "svg")}
    assert {path.name for path in written} == names
    for path in written:
        head = path.read_bytes()[:8]
        assert head.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    again = plot(scores, tmp_path / "again", layers=None)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(written, again, strict=True))
    plot(scores, tmp_path / "chosen", layers=[2])
    with pytest.raises(
        CalibrationError, match=r"--layers 0: not a MoE layer of this file, which has \[1, 2\]"
    ):
        plot(scores, tmp_path / "none", layers=[0])


def test_what_the_figures_show(checkpoint: Path) -> None:
    scores = make_scores.make(checkpoint)
    upper, lower = budget_figure(scores).axes
    assert [bar.get_height() for bar in lower.patches] == scores.k.tolist()
    assert upper.lines[0].get_ydata().tolist() == pytest.approx(scores.rki.tolist())
    panels = cei_figure(scores, [0, 1]).axes
    for m, panel in enumerate(panels):
        zone, hurts, others, never = panel.collections
        assert zone.get_label() == "dormant zone"
        seen, raw = scores.cei_count[m] > 0, scores.cei_raw[m]
        assert len(hurts.get_offsets()) == int((seen & (raw > 0)).sum())
        assert len(others.get_offsets()) == int((seen & (raw <= 0)).sum())
        assert len(never.get_offsets()) == int((~seen).sum())
        assert panel.get_title() == f"layer {m + 1}: {int(dormant(scores)[m].sum())} dormant"
    image = coverage_figure(scores).axes[0].images[0].get_array()
    assert image.sum() == scores.cei_count.sum()


@pytest.mark.parametrize("total", [1.0, 1.7])  # a softmax, and sigmoids
def test_dormant_experts(checkpoint: Path, total: float) -> None:
    row = torch.tensor([0.05, 0.565, 0.05, 0.05, 0.142, 0.143, 0.0])  # an even share is 0.1429
    cei = torch.tensor([0.9, 0.9, 0.4, 0.9, 0.5, 1.0, 1.0])
    raw = torch.tensor([0.1, 0.1, 0.1, -0.1, 0.1, 0.1, 0.1])
    scores = dataclasses.replace(
        make_scores.make(checkpoint), router_prob=total * row[None], cei=cei[None], cei_raw=raw[None]
    )
    assert dormant(scores)[0].nonzero().flatten().tolist() == [0, 4, 6]
