"""`make demo`: calibrate the demo model, serve it without and with counterfactual routing, ask both."""

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ask
import slots
from phrasings import prompt
from recall import wilson
from rich.console import Console
from rich.status import Status
from rich.table import Table

from cor_vllm import scores as scores_file
from cor_vllm.commands import lifetime
from cor_vllm.testing.server import ServerFailed, serve

HERE = Path(__file__).parent
STEPS = 6
SPEED_ROUNDS = 4
# Documents of this text are short. `ratio` is the paper's budget, which is not our default: it shows what
# budgets per layer are, and the README has its result.
CALIBRATION = ["--corpus", str(HERE / "calibration.txt"), "--seq-len", "64", "--intensity", "ratio"]
SERVER = ["--served-model-name", ask.MODEL, "--dtype", "float32", "--enforce-eager",
          "--max-model-len", "512", "--max-num-seqs", "32"]  # fmt: skip
console = Console(highlight=False)


class DemoFailed(RuntimeError):
    """A step that failed; the message is the one line to print."""


def main() -> int:
    """Run all steps; 0 when every one of them worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=HERE / "model", help="model folder (default: the demo's)"
    )
    parser.add_argument(
        "--output", type=Path, default=HERE.parents[1] / "demo-output", help="where results go"
    )
    parser.add_argument("--questions", type=int, default=150, help="per bucket (default: 150)")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        run(options.model, options.output, options.questions)
    except (DemoFailed, ServerFailed, OSError, scores_file.ScoresError) as error:
        console.print(f"[red]make demo: {error}[/red]", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("make demo: interrupted; the servers are stopped")
        return 130
    console.print(f"\nDone in {time.monotonic() - start:.0f} s. Everything is in {options.output}/")
    return 0


def run(model: Path, output: Path, questions: int) -> None:
    """The steps of the demo, in order."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "scores.safetensors"
    probes = choose_probes(questions)

    step(1, "Calibrate: which layers and experts do hard predictions depend on?")
    cor_vllm("calibrate", str(model), *CALIBRATION, "--output", str(file))
    step(2, "The scores file, and its plots")
    cor_vllm("show", str(file))
    cor_vllm("plot", str(file), "--output", str(output / "plots"))
    step(3, "Start two servers: stock, and with --cor-scores")
    with servers(model, file, output) as (stock, cor):
        step(4, f"Ask both the same {len(probes)} questions through the OpenAI client")
        report_recall(probes, stock, cor, output)
        step(5, "Tokens per second, in alternation")
        report_speed(stock, cor, [prompt(probe["question"]) for probe in probes])
    step(6, "What the routing did")
    report_slots(model, file, [prompt(probe["question"]) for probe in probes[::5]])


def step(number: int, text: str) -> None:
    console.print(f"\n[bold]\\[{number}/{STEPS}] {text}[/bold]")


def cor_vllm(*arguments: str) -> None:
    lifetime.guard()
    command = Path(sys.executable).with_name("cor-vllm")
    console.print(f"$ cor-vllm {' '.join(arguments)}", style="dim", soft_wrap=True)
    done = subprocess.run([str(command), *arguments])
    if done.returncode != 0:
        raise DemoFailed(
            f"cor-vllm {arguments[0]} failed with exit code {done.returncode}; its message is above"
        )


def choose_probes(per_bucket: int) -> list[dict[str, Any]]:
    """The same number of probes from each bucket, seeded."""
    probes = [json.loads(line) for line in (HERE / "probes.jsonl").read_text().splitlines()]
    chosen = []
    for bucket in ("head", "torso", "tail"):
        ours = [probe for probe in probes if probe["bucket"] == bucket]
        chosen += random.Random(0).sample(ours, min(per_bucket, len(ours)))
    return chosen


@contextlib.contextmanager
def servers(model: Path, file: Path, output: Path) -> Iterator[tuple[ask.Server, ask.Server]]:
    """Both servers, started one after the other, stopped at the end whatever happens."""
    with contextlib.ExitStack() as stack:
        started = []
        for name, flags in (("stock", []), ("CoR", ["--cor-scores", str(file)])):
            shown = " ".join(["vllm serve", str(model), *SERVER, *flags])
            console.print(f"$ {shown}", style="dim", soft_wrap=True)
            with console.status(f"starting the {name} server") as status:
                url = stack.enter_context(
                    serve(
                        model,
                        *SERVER,
                        *flags,
                        log=output / f"server-{name.lower()}.log",
                        waiting=lambda seconds, s=status, n=name: tell(s, n, seconds),
                    )
                )
            console.print(f"the {name} server answers at {url}")
            started.append(ask.Server(name, url))
        yield started[0], started[1]
    console.print("Both servers are stopped.")


def tell(status: Status, name: str, seconds: float) -> None:
    status.update(f"starting the {name} server ({seconds:.0f} s, usually 20 to 60)")


def report_recall(probes: list[dict[str, Any]], stock: ask.Server, cor: ask.Server, output: Path) -> None:
    """Recall by bucket, what was gained and lost, a few answers that changed, one streamed answer."""
    questions = [probe["question"] for probe in probes]
    before, after = ask.answers(stock, questions), ask.answers(cor, questions)
    table = Table("facts", "n", "stock", "95 %", "CoR", "95 %", "answers changed", "gained", "lost")
    for bucket in ("head", "torso", "tail"):
        rows = [
            (b == probe["answer"], a == probe["answer"], b != a)
            for probe, b, a in zip(probes, before, after, strict=True)
            if probe["bucket"] == bucket
        ]
        n, was, now = len(rows), sum(r[0] for r in rows), sum(r[1] for r in rows)
        table.add_row(
            bucket, str(n), f"{was / n:.1%}", interval(was, n), f"{now / n:.1%}", interval(now, n),
            str(sum(r[2] for r in rows)), str(sum(r[1] and not r[0] for r in rows)),
            str(sum(r[0] and not r[1] for r in rows)),
        )  # fmt: skip
    console.print(table)
    changed = [
        {"question": p["question"], "answer": p["answer"], "bucket": p["bucket"], "stock": b, "cor": a}
        for p, b, a in zip(probes, before, after, strict=True)
        if b != a
    ]
    (output / "changed_answers.json").write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n")
    for item in changed[:: max(1, len(changed) // 6)][:6]:
        console.print(
            f"  {item['question']}  right: {item['answer']}  stock: {item['stock']}  CoR: {item['cor']}"
        )
    question = questions[max(range(len(after)), key=lambda i: len(after[i]))]  # the longest answer
    pieces = ask.streamed(cor, question)
    console.print(f"  streamed by the CoR server in {len(pieces)} pieces: {question} {'|'.join(pieces)}")


def interval(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{low:.0%} to {high:.0%}"


def report_speed(stock: ask.Server, cor: ask.Server, prompts: list[str]) -> None:
    """CoR against stock in rounds of stock, CoR, CoR, stock; stock's last against its first is the noise."""
    rounds = [
        [ask.tokens_per_second(each, prompts) for each in (stock, cor, cor, stock)]
        for _ in range(SPEED_ROUNDS)
    ]
    ratios = [(second + third) / (first + last) for first, second, third, last in rounds]
    noise = [last / first for first, _, _, last in rounds]
    table = Table("server", "output tokens/s (median)", "against stock", "range")
    for name, members, values in (("stock", (0, 3), noise), ("CoR", (1, 2), ratios)):
        rate = statistics.median(speeds[i] for speeds in rounds for i in members)
        table.add_row(name, f"{rate:.0f}", f"{statistics.median(values):.3f}", spread(values))
    console.print(table)
    console.print("The first line is stock against itself: the noise that the second has to be read with.")


def spread(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def report_slots(model: Path, file: Path, texts: list[str]) -> None:
    """Experts per layer, slots changed, and the sum against the budget."""
    scores = scores_file.load(file)
    with console.status("routing the questions both ways"):
        shares = slots.share_changed(model, scores, texts)
    table = Table("layer", "k_l", "share of expert slots changed")
    for index, k, share in zip(scores.layer_index.tolist(), scores.k.tolist(), shares, strict=True):
        table.add_row(str(index), str(k), f"{share:.1%}")
    console.print(table)
    own = scores.num_layers * scores.config.model.top_k
    console.print(f"Σ k_l = {int(scores.k.sum())}, the model's own budget is {own}: the same work per token.")


if __name__ == "__main__":
    sys.exit(main())
