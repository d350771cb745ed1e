"""Draws docs/pictures/idea.svg: what counterfactual routing does to one token of the demo model.

    python docs/pictures/idea.py

Everything in the picture is read from examples/demo/model and examples/demo/scores.safetensors.
"""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cor_vllm import scores as scores_file
from cor_vllm.calibrate.model.loading import load_model, load_tokenizer
from cor_vllm.calibrate.model.router import rule_of
from cor_vllm.serve.config import RoutingOptions, plan

DEMO = Path(__file__).parents[2] / "examples" / "demo"
PICTURE = Path(__file__).with_suffix(".svg")
SENTENCE, TOKEN, LAYER = "In which country is Addis Ababa?", "Ababa", 2
DIGITS = 4  # so that the last bits of a float, which differ between processors, do not move a line
BLUE, LIGHT_BLUE, ORANGE, PALE, GREY = "#0072b2", "#5b9bc8", "#e69f00", "#f7e3b4", "#c4c9ce"
GREEN, RED = "#007a5a", "#b03a2e"
STYLE = {
    "svg.hashsalt": "cor-vllm",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12.5,
}


@dataclasses.dataclass(frozen=True)
class Idea:
    """What the picture shows; N experts of one layer in the order of their probability, M layers."""

    expert: list[int]  # [N], the experts' numbers
    probability: list[float]  # [N], the router's
    added: list[float]  # [N], λ·CEI
    stock: list[int]  # the experts of highest probability
    routed: list[int]  # the experts of highest probability + λ·CEI
    top_k: int  # experts that the model itself takes in every layer
    lambda_: float
    layers: list[int]  # [M]
    k: list[int]  # [M], experts that counterfactual routing takes in each layer


def read() -> Idea:
    """Run the sentence through the demo model under counterfactual routing and look at one token."""
    scores = scores_file.load(DEMO / "scores.safetensors")
    moe = load_model(DEMO / "model", dtype="float32", device="cpu")
    tokens = load_tokenizer(DEMO / "model")(SENTENCE)
    position = next(
        i for i in range(len(tokens.input_ids)) if tokens.token_to_chars(i).end == _end_of_token()
    )
    layers = list(plan(RoutingOptions(), scores).values())
    rules = dict(enumerate(rule_of(*pair) for pair in zip(moe.routers, layers, strict=True)))
    with moe.routing(rules), moe.record_router_logits() as logits:
        moe.losses(torch.tensor([tokens.input_ids]))
    row = moe.layer_index.index(LAYER)
    router, seen = moe.routers[row], logits[row][0][position : position + 1]
    probability = router.probabilities(seen)[0]
    order = probability.argsort(descending=True, stable=True)
    lambda_ = scores.config.serving.lambda_
    return Idea(
        expert=order.tolist(),
        probability=_rounded(probability[order]),
        added=_rounded(lambda_ * scores.cei[row][order]),
        stock=router.route(seen)[1][0].tolist(),
        routed=rules[row](seen)[1][0].tolist(),
        top_k=moe.top_k,
        lambda_=lambda_,
        layers=list(moe.layer_index),
        k=scores.k.tolist(),
    )


def _end_of_token() -> int:
    return SENTENCE.index(TOKEN) + len(TOKEN)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def draw(idea: Idea) -> Figure:
    """The picture: above, the experts of one token in one layer; below, how many experts each layer takes."""
    figure = Figure(figsize=(10.5, 7.4), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.06)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.6, 1), width_ratios=(1, 1.25))
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    _stock(left, idea)
    _routed(right, idea)
    _budgets(figure.add_subplot(grid[1, :]), idea)
    before, after = SENTENCE.split(TOKEN)
    figure.suptitle(f"Which experts work on the token “{TOKEN}” in “{before}{TOKEN}{after}”, layer {LAYER}?",
                    fontsize=14, fontweight="bold")  # fmt: skip
    return figure


def _stock(axes: Any, idea: Idea) -> None:
    colors = [BLUE if expert in idea.stock else GREY for expert in idea.expert]
    axes.bar(range(len(colors)), idea.probability, color=colors)
    axes.set_title(f"Stock routing takes the {idea.top_k} experts\nof highest router probability")
    axes.set_ylabel("router probability")
    _experts(axes, idea, idea.stock)


def _routed(axes: Any, idea: Idea) -> None:
    places, taken = range(len(idea.expert)), [expert in idea.routed for expert in idea.expert]
    low = [BLUE if chosen else GREY for chosen in taken]
    high = [ORANGE if chosen else PALE for chosen in taken]
    axes.bar(places, idea.probability, color=low)
    axes.bar(places, idea.added, bottom=idea.probability, color=high)
    k = idea.k[idea.layers.index(LAYER)]
    axes.set_title(f"Counterfactual routing takes the {k} experts\nof highest router probability + λ·CEI")
    _experts(axes, idea, idea.routed)
    meaning = (
        f"+ λ·CEI, with λ = {idea.lambda_:g}\nCEI is measured before serving: how much worse\n"
        "hard predictions get without this expert,\nscaled from 0 to 1"
    )
    axes.bar(0, 0, color=ORANGE, label=meaning)
    axes.bar(0, 0, color=BLUE, label="router probability")
    axes.legend(frameon=False, loc="upper right", fontsize=10)
    for place, expert in enumerate(idea.expert):
        if (expert in idea.routed) != (expert in idea.stock):
            _mark(axes, place, idea.probability[place] + idea.added[place], expert in idea.routed)


def _mark(axes: Any, place: int, height: float, enters: bool) -> None:
    axes.annotate("new" if enters else "out", (place, height), xytext=(0, 2), textcoords="offset points",
                  ha="center", fontsize=9, fontweight="bold", color=GREEN if enters else RED)  # fmt: skip


def _experts(axes: Any, idea: Idea, taken: list[int]) -> None:
    axes.set_xticks(range(len(idea.expert)), [str(expert) for expert in idea.expert], fontsize=10)
    for label, expert in zip(axes.get_xticklabels(), idea.expert, strict=True):
        label.set(fontweight="bold", color=BLUE) if expert in taken else label.set(color="#777777")
    axes.set_xlabel("expert number, most probable first")
    axes.spines[["top", "right"]].set_visible(False)


def _budgets(axes: Any, idea: Idea) -> None:
    colors = [BLUE if layer == LAYER else LIGHT_BLUE for layer in idea.layers]
    axes.bar([str(layer) for layer in idea.layers], idea.k, color=colors, width=0.55)
    for place, k in enumerate(idea.k):
        axes.text(place, 1, str(k), ha="center", va="center", fontsize=13, fontweight="bold", color="white")
    label = f"stock routing: {idea.top_k} in every layer, {idea.top_k * len(idea.k)} in total"
    axes.axhline(idea.top_k, color="#444444", linestyle="--", linewidth=1.2, label=label)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("Layers on which hard predictions depend more take more experts ($k_l$); "
                   f"the total stays {sum(idea.k)}")  # fmt: skip
    axes.set_ylabel("$k_l$, experts per token")
    axes.set_xlabel("layer")
    axes.set_ylim(0, max(idea.k) * 1.15)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, file: Path) -> None:
    """Write the SVG; the same figure gives the same bytes."""
    FigureCanvasSVG(figure)
    figure.savefig(file, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        save(draw(read()), PICTURE)
    print(PICTURE)
