"""`make gpu`: everything that only a GPU can say, in ten minutes, into benchmarks/results/<device>-<date>/.

    python -m benchmarks.gpu                                  kernel checks, kernel times, serving, families
    python -m benchmarks.gpu --layers 48                      serving with all layers of Qwen3-30B-A3B
    python -m benchmarks.gpu --parts kernel_check kernel      only these
    python -m benchmarks.gpu --device cpu --parts kernel_check kernel --quick     tries the program out

Each part is a program of its own and gets its share of the time; what a part leaves over goes to serving.
summary.md is written after every part, so that a run that is cut off leaves what was finished. If the
environment variable OUT names a folder, the files are copied there, too. The exit status is 0 if every part
ended well, whether the aims are met or not.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import device_name, run_folder, versions
from benchmarks.common.servers import ROOT
from cor_vllm.commands import lifetime

# Seconds of each part. Serving gets what is left after the last part's share is set aside.
PARTS = {"kernel_check": 90, "kernel": 130, "serving": 0, "families": 100}
PATIENCE = 40  # seconds that a part has to stop its servers, before it is killed
RETRY = 150  # seconds that must be left if serving is to start a second time


@dataclass
class Done:
    """A part that ran."""

    name: str
    command: str
    seconds: float
    status: str
    output: list[str]


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on: machine and versions, and a hash of the code."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "commit": command_output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
        "sources": sources(),
    }
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        found["capability"] = ".".join(map(str, capability))
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        query = (
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,temperature.gpu",
            "--format=csv,noheader",
        )
        found["driver, clock, its limit, temperature"] = command_output("nvidia-smi", *query)
    return found


def command_output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def sources() -> str:
    """A hash of the Python files, by which a copy without git can be recognised."""
    total = hashlib.sha256()
    for folder in ("cor_vllm", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):  # does not follow cor_vllm's links
            total.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def command_of(part: str, args: argparse.Namespace, folder: Path, seconds: float) -> list[str]:
    """The command line of a part."""
    command = [sys.executable, "-m", f"benchmarks.{part}", "--output", str(folder)]
    if part != "kernel_check":
        command += ["--device", args.device]
    if part == "kernel" and args.quick:
        command += ["--quick", "--rounds", "2"]
    if part == "serving":
        command += ["--seconds", str(round(seconds))]
        command += ["--rounds", "1", "--batches", "1"] if args.quick else []
        command += ["--layers", str(args.layers)] if args.layers else []
    return command


def run_part(name: str, command: list[str], seconds: float) -> Done:
    """Run a part and pass its output on; after `seconds` it is interrupted, so that it stops its servers."""
    print(f"\n== {name}, at most {seconds:.0f} s", flush=True)
    lifetime.guard()
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timers = [
        threading.Timer(max(seconds, 1), _signal, (process, signal.SIGINT)),
        threading.Timer(max(seconds, 1) + PATIENCE, _signal, (process, signal.SIGKILL)),
    ]
    for timer in timers:
        timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            print(lines[-1], flush=True)
        process.wait()
    except KeyboardInterrupt:
        _signal(process, signal.SIGINT)
        process.wait(PATIENCE)
        raise
    finally:
        for timer in timers:
            timer.cancel()
    took = time.monotonic() - began
    status = "ended well" if process.returncode == 0 else f"failed with exit status {process.returncode}"
    if took >= seconds:
        status = f"cut off after {took:.0f} s"
    return Done(name, " ".join(["python", *command[1:]]), took, status, lines)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def summarise(folder: Path, around: dict[str, Any], done: list[Done], wanted: list[str]) -> str:
    """Write summary.md and copy everything to the folder that OUT names; returns the lines on the aims."""
    aims = [line.removeprefix("aim: ") for part in done for line in part.output if line.startswith("aim: ")]
    missing = [part for part in wanted if part not in {each.name for each in done}]
    ends = [f"- {part.name}: {part.status}, {part.seconds:.0f} s" for part in done]
    ends += [f"- {name}: not run, the time was up" for name in missing]
    closing = "\n".join(["Aims", *(f"- {aim}" for aim in aims), "", "Parts", *ends])
    text = [f"# {around['device']}, {around['date']}", "", "```json", json.dumps(around, indent=1), "```", ""]
    text += [closing.replace("Aims\n", "## Aims\n\n").replace("Parts\n", "## Parts\n\n"), ""]
    for part in done:
        tables = [line for line in part.output if not line.startswith("aim: ")]
        text += [f"## {part.name}", "", f"`{part.command}`", "", *tables, ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text("\n".join(text))
    (folder / "environment.json").write_text(json.dumps(around, indent=1) + "\n")
    if out := os.environ.get("OUT"):
        shutil.copytree(folder, Path(out) / folder.name, dirs_exist_ok=True)
    return closing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--layers", type=int, help="layers of the served model (default: as many as fit five times)"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=550, help="seconds for all parts together (default: 550)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="as little as possible of each part")
    parser.add_argument(
        "--output", type=Path, help="folder for the results (default: benchmarks/results/<device>-<date>)"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no GPU; `make bench` measures what a CPU can", file=sys.stderr)
        return 1
    began = time.monotonic()
    folder, around = args.output or run_folder(args.device), environment(args.device)
    done: list[Done] = []
    waiting = list(args.parts)
    while waiting:
        name = waiting.pop(0)
        left = args.budget_seconds - (time.monotonic() - began)
        later = sum(PARTS[each] for each in waiting)
        seconds = min(PARTS[name] or left, left) if PARTS[name] else left - later
        if seconds < PATIENCE:
            break
        # A part is told to be done a little before it would be cut off.
        done.append(run_part(name, command_of(name, args, folder, seconds - PATIENCE), seconds))
        left = args.budget_seconds - (time.monotonic() - began) - later
        if name == "serving" and done[-1].status.startswith("failed") and left > RETRY:
            command = [*command_of(name, args, folder, left - PATIENCE), "--graphs-only"]
            done.append(run_part(name, command, left))
        summarise(folder, around, done, args.parts)
    print("\n" + summarise(folder, around, done, args.parts))
    print(f"\nEverything is in {folder} ({time.monotonic() - began:.0f} s)")
    last = {part.name: part.status for part in done}
    return 0 if all(last.get(name) == "ended well" for name in args.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
