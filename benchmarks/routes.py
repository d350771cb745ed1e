"""Times the last layer's routes in closed form against running the model again for each route.

    python -m benchmarks.routes                           the demo model, 10,000 positions, 32 routes
    python -m benchmarks.routes --model FOLDER --corpus FILE --tokens 2000

A replay is one forward of the whole text in which the last layer takes the n-th drawn route at every position
at once, which is the fastest honest way: at the last layer no position sees another one's experts. In each
round both are timed, closed form, replays, closed form again; the ratio of the two closed forms is the noise.
Reading the text once is needed by both and is timed apart.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common.ratios import aim, at_least, paired
from benchmarks.common.results import device_name, markdown, write_rows
from cor_vllm.calibrate.model.batches import cut, pad, sequence_batches
from cor_vllm.calibrate.model.loading import load_model, model_folder, read_config
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.routes.closed_form import last_layer_utilities
from cor_vllm.calibrate.routes.draw import DrawOptions, Routes, draw_routes
from cor_vllm.calibrate.routes.options import TextOptions
from cor_vllm.calibrate.routes.standard import ScoredText, read_standard
from cor_vllm.calibrate.routes.text import read_scored_text

DEMO = Path(__file__).parents[1] / "examples/demo"
SECONDS, TIMES = 60, 20  # the aims
WHERE = "routes of the last layer"


def replay(model: MoeModel, text: ScoredText, routes: Routes, number: int) -> torch.Tensor:
    """[T] log-probabilities of the text's tokens if every position takes its route of this number."""
    weights, ids, start = routes.weights[:, number], routes.ids[:, number], 0
    losses = []
    groups = list(sequence_batches(text.sequences))
    for group in groups:
        input_ids = pad(group)

        def rule(logits: torch.Tensor, batch: torch.Tensor = input_ids, first: int = start,
                 group: list[list[int]] = group) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            chosen = torch.zeros(*batch.shape, routes.ids.shape[2])
            of = torch.arange(routes.ids.shape[2]).expand(*batch.shape, -1).clone()
            for row, ids_of_row in enumerate(group):
                stop = first + len(ids_of_row) - 1
                chosen[row, : len(ids_of_row) - 1] = weights[first:stop]
                of[row, : len(ids_of_row) - 1] = ids[first:stop]
                first = stop
            return chosen.flatten(0, 1), of.flatten(0, 1)

        with model.routing({model.num_layers - 1: rule}):
            losses.append(model.losses(input_ids))
        start += sum(len(ids_of_row) - 1 for ids_of_row in group)
    return -cut(losses, text.sequences)


def main() -> None:
    """Measure, check that both say the same, print, write."""
    args = _arguments()
    folder, _ = model_folder(args.model)
    config = read_config(folder)
    options = TextOptions(model=args.model, corpus=args.corpus, num_tokens=args.tokens)
    text = read_scored_text(options, folder, config.vocab_size)
    model = load_model(folder, "auto", args.device)
    draw = DrawOptions(args.routes)
    started = time.perf_counter()
    standard, inputs = read_standard(model, text, seed=0, nulls=1)
    reading = time.perf_counter() - started
    assert inputs is not None, "the model's last layer has experts"
    routes = draw_routes(
        model.routers[-1], standard.router_logits[-1], standard.keys, model.layer_index[-1], draw,
        model.eligible_experts,
    )  # fmt: skip
    closed: list[float] = []
    again: list[float] = []
    replayed: list[float] = []
    worst = 0.0
    for number in range(args.rounds):
        for times in (closed, again):
            started = time.perf_counter()
            utilities = last_layer_utilities(model, inputs, standard, draw)
            times.append(time.perf_counter() - started)
            if times is closed:
                started = time.perf_counter()
                found = replay(model, text, routes, number + 1)
                replayed.append((time.perf_counter() - started) * args.routes)
        worst = max(worst, (found - utilities.utility[:, number + 1, 0]).abs().max().item())
    ratio, noise = paired(replayed, closed), paired(again, closed)
    rows = [
        {
            "model": folder.resolve().name, "positions": len(standard.keys), "routes": args.routes,
            "reading, s": reading, "closed form, s": sorted(closed)[len(closed) // 2],
            "replays, s": sorted(replayed)[len(replayed) // 2],
            "replays / closed form": str(ratio), "closed form again / closed form": str(noise),
            "largest difference, nats": worst,
        }
    ]  # fmt: skip
    print(markdown(rows))
    total = reading + max(closed)
    print(aim(f"{WHERE} within {SECONDS} s", "met" if total < SECONDS else "missed", f"{total:.1f} s"))
    print(aim(f"{WHERE} {TIMES} times as fast as replays", at_least(ratio, TIMES), ratio))
    print(write_rows("routes", rows, device_name(model.device.type)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(DEMO / "model"), help="a checkpoint's folder (default: the demo model)")
    add("--corpus", default=str(DEMO / "calibration.txt"), help="text (default: the demo's)")
    add("--tokens", type=int, default=10_000, help="positions (default: %(default)s)")
    add("--routes", type=int, default=32, help="routes of a position (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of these one replay each is timed (default: %(default)s)")
    add("--device", help="as calibrate takes it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
