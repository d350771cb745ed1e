"""The benchmarks: lm-evaluation-harness's own tasks, which of their metrics counts, and where data is."""

import atexit
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cor_vllm.errors import CorError, first_line

TASK_FILES = Path(__file__).parent / "tasks"  # what the harness lacks: FACTOR


class EvaluationError(CorError):
    """An evaluation that cannot be done as asked: one line with the cause and the remedy."""


@dataclass(frozen=True)
class Benchmark:
    """One column of the table."""

    task: str  # the harness's name of a task or group
    metric: str  # the harness's name of the metric, of 0 to 1 an item
    dataset: str | None = None  # id on the hub; None: the task file's own
    filter: str = "none"  # the harness's name of the filter whose value counts
    general: bool = False  # a check for harm elsewhere, not for factuality
    folder: Path = TASK_FILES  # where its task file is, if the harness does not know it
    dataset_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)  # the task file's own


MMLU_GROUPS = ("humanities", "social_sciences", "stem", "other")
BENCHMARKS = {
    benchmark.task: benchmark
    for benchmark in (
        Benchmark("truthfulqa_mc1", "acc", "truthfulqa/truthful_qa"),
        Benchmark("truthfulqa_mc2", "acc", "truthfulqa/truthful_qa"),
        # The paper does not say how it judges generations; BLEU against true and false references is what
        # the harness can do without a second model.
        Benchmark("truthfulqa_gen", "bleu_acc", "truthfulqa/truthful_qa"),
        Benchmark("factor_news", "acc", "factor/news"),
        Benchmark("factor_wiki", "acc", "factor/wiki"),
        Benchmark("triviaqa", "exact_match", "mandarjoshi/trivia_qa", "remove_whitespace"),
        Benchmark("arc_challenge", "acc", "allenai/ai2_arc", general=True),
        Benchmark("arc_easy", "acc", "allenai/ai2_arc", general=True),
        # MMLU by its four groups of subjects, as the paper reports it.
        *(Benchmark(f"mmlu_{group}", "acc", "cais/mmlu", general=True) for group in MMLU_GROUPS),
        Benchmark("gsm8k", "exact_match", "openai/gsm8k", "flexible-extract", general=True),
    )
}
GROUPS = {
    "factual": [name for name, benchmark in BENCHMARKS.items() if not benchmark.general],
    "general": [name for name, benchmark in BENCHMARKS.items() if benchmark.general],
    "mmlu": [f"mmlu_{group}" for group in MMLU_GROUPS],
    "paper": list(BENCHMARKS),
}


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name, by group (`factual`, `general`, `mmlu`, `paper`), or by the path of a task file.

    A task file is the harness's own YAML; its first metric counts.

    Raises:
        EvaluationError: no such benchmark or file.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        for task in GROUPS.get(name, [name]):
            found[task] = BENCHMARKS.get(task) or _own(task)
    return list(found.values())


def _own(name: str) -> Benchmark:
    if not name.endswith((".yaml", ".yml")):
        known = ", ".join([*GROUPS, *BENCHMARKS])
        raise EvaluationError(f"--tasks {name}: unknown; known are {known}, and the path of a task's YAML")
    if not Path(name).is_file():
        raise EvaluationError(f"--tasks {name}: there is no such file")
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(name, resolve_func=False)
        filters = config.get("filter_list")
        return Benchmark(
            config["task"],
            config["metric_list"][0]["metric"],
            config.get("dataset_path"),
            filters[0]["name"] if filters else "none",
            folder=Path(name).resolve().parent,
            dataset_kwargs=config.get("dataset_kwargs") or {},
        )
    except Exception as error:  # YAML's have no class in common with those of a file that lacks a field
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EvaluationError(
            f"--tasks {name}: not a task of lm-evaluation-harness with a metric_list ({reason[:200]})"
        ) from error


@functools.cache  # it reads ten thousand files
def task_manager(folder: Path) -> Any:
    """The harness's tasks and those of a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder))


@functools.cache
def _cache_of(local: Path) -> str:
    """This process's own cache of a local data set.

    The data library's shared one knows a folder by its last name alone, and gives another folder's rows, or
    an earlier state of this one's.
    """
    folder = tempfile.TemporaryDirectory(prefix="cor-vllm-data-")
    atexit.register(folder.cleanup)
    return folder.name


def _members(manager: Any, name: str) -> list[str]:
    """The single tasks of a task, a group or a tag.

    A group whose fields are changed cannot be named in an inline group: the harness then gives its name to
    each of its tasks, and keeps the last one alone.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    if name in manager.all_tags:
        return sorted(entry.tags)
    if name not in manager.all_groups:
        return [name]
    parts = load_yaml(entry.yaml_path, resolve_func=False)["task"]
    return [member for part in parts for member in _members(manager, part)]


def load_task(benchmark: Benchmark, data: Path | None) -> dict[str, Any]:
    """The harness's task objects of a benchmark (a group like mmlu_stem has many), by name; reads the data.

    Args:
        benchmark: which.
        data: a folder that mirrors the hub, `<data>/<dataset id>/…`, used if it holds the data set; None:
            the hub.

    Raises:
        EvaluationError: the data is not to be had.
    """
    manager = task_manager(benchmark.folder)
    wanted: Any = benchmark.task
    local = data / benchmark.dataset if data and benchmark.dataset else None
    if local and local.is_dir():
        # An inline group is the harness's way to change a field of a task that it knows.
        changed = {
            "dataset_path": str(local.resolve()),
            "dataset_kwargs": {**benchmark.dataset_kwargs, "cache_dir": _cache_of(local)},
        }
        wanted = {
            "group": "local",
            "task": [{"task": name, **changed} for name in _members(manager, benchmark.task)],
        }
    elif benchmark.dataset and benchmark.dataset.startswith("factor/"):
        raise EvaluationError(
            f"{benchmark.task}: FACTOR is not on the hub; get {benchmark.task.split('_')[1]}_factor.csv from "
            f"github.com/AI21Labs/factor and give its folder: --data DIR with DIR/{benchmark.dataset}/"
        )
    try:
        return dict(manager.load([wanted])["tasks"])
    except Exception as error:  # the data library's errors have no common class
        reason = first_line(error)
        where = f"in {local}" if local and local.is_dir() else "from the hub"
        raise EvaluationError(
            f"{benchmark.task}: its data cannot be read {where} ({reason}); with no network give --data DIR, "
            f"a folder with a copy of the hub's {benchmark.dataset} in DIR/{benchmark.dataset}"
        ) from error
