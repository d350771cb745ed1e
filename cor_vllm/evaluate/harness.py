"""The harness's three ways to a model: transformers in this process, vLLM in this process, a server."""

import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cor_vllm.calibrate.moe_model import MoeModel
from cor_vllm.evaluate.benchmarks import Benchmark, EvaluationError, task_manager
from cor_vllm.evaluate.items import read_items
from cor_vllm.evaluate.runs import Column

Progress = Callable[[str], None]
CANARY = ("The capital of France is", (" Paris", " a large city in the north of the country of France"))


class _Final(torch.Tensor):
    """Scores of tokens as they are to be summed. The harness takes log_softmax of what a model returns."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.log_softmax:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs)


def transformers_model(model: MoeModel, tokenizer: Any, batch_size: int) -> Any:
    """The harness's model over one that is loaded and may be intervened on.

    Interventions by hooks need nothing more. `forward` ([B, S] ids → logits), where set, takes the model's
    place in scoring; `around` (benchmark, whether it generates → context manager) is what to do to all of a
    benchmark, `folds` (0 or 1 → context manager) to its items of even and odd number. `final`: what the model
    returns are no logits, and not to be normalised.
    """
    from lm_eval.models.huggingface import HFLM

    class Routed(HFLM):
        forward: Callable[[torch.Tensor], torch.Tensor] | None = None
        around: Callable[[Benchmark, bool], AbstractContextManager[None]] | None = None
        folds: Callable[[int], AbstractContextManager[None]] | None = None
        final = False

        def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if self.forward is None:
                scores: torch.Tensor = super()._model_call(inps, **kwargs)
                return scores.as_subclass(_Final) if self.final else scores
            with torch.inference_mode():
                return self.forward(inps)

    return Routed(
        pretrained=model.model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device),
        softmax_dtype=torch.float32,  # logits of a bfloat16 model are, too
    )  # fmt: skip


def engine_model(model: str, options: dict[str, Any] | None, arguments: dict[str, Any]) -> Any:
    """The harness's model over a vLLM engine in this process.

    Args:
        model: as for `vllm serve`.
        options: `additional_config["cor"]`; None: an engine without the plugin's routing.
        arguments: of vllm.LLM.
    """
    from lm_eval.models.vllm_causallms import VLLM

    from cor_vllm.cpu import mended_arguments

    arguments, changes = mended_arguments(model, arguments)
    for line in changes:
        print(f"cor-vllm: {line}", file=sys.stderr)
    if options is not None:
        arguments = arguments | {"additional_config": {"cor": options}}
    return VLLM(pretrained=model, **arguments)


def server_model(model: str, url: str, served_name: str, batch_size: int) -> Any:
    """The harness's model over an OpenAI-compatible server.

    Args:
        model: folder or hub id; its tokenizer makes the token ids that are sent.
        url: the server's address with or without /v1.
        served_name: what the server calls the model.
        batch_size: prompts per request.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    base = url.rstrip("/").removesuffix("/v1")
    return LocalCompletionsAPI(
        model=served_name, base_url=f"{base}/v1/completions", tokenizer=model, batch_size=batch_size,
        num_concurrent=4, max_retries=3, timeout=600,
    )  # fmt: skip


def canary(lm: Any, where: str) -> None:
    """Check that log-likelihoods come back; where they do not, every benchmark would score chance.

    Raises:
        EvaluationError: they are missing, zero, or the same whatever is asked.
    """
    from lm_eval.api.instance import Instance

    context, continuations = CANARY
    requests = [Instance("loglikelihood", {}, (context, text), i) for i, text in enumerate(continuations)]
    remedy = (
        "the server must return the log-probabilities of the prompt (/v1/completions with echo and "
        "logprobs), or every benchmark would score exactly chance; vLLM does, without beam search"
    )
    try:
        values = [float(value) for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EvaluationError(f"{where}: gives no log-likelihoods ({reason}); {remedy}") from error
    short, long = values
    if not all(torch.isfinite(torch.tensor(values))) or short >= 0 or long >= 0 or short == long:
        raise EvaluationError(f"{where}: log-likelihoods {short} and {long} cannot be; {remedy}")


def measure(
    lm: Any, benchmark: Benchmark, tasks: dict[str, Any], limit: int | None, seed: int, cache: str | None
) -> Column:
    """Run one benchmark.

    Args:
        lm: a model of this file.
        benchmark: what counts.
        tasks: the harness's task objects.
        limit: items of each task, drawn by `seed`; None: all.
        seed: of the draw.
        cache: where answers are kept, so that an interrupted benchmark goes on; None: nowhere.
    """
    drawn = _draw(tasks, limit, seed)
    folds, around = getattr(lm, "folds", None), getattr(lm, "around", None)
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())
    started = time.monotonic()
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for fold in (0, 1) if folds else (None,):
        chosen = {name: [i for i in items if fold is None or i % 2 == fold] for name, items in drawn.items()}
        with (
            around(benchmark, generates) if around else nullcontext(),
            folds(fold) if folds else nullcontext(),
        ):
            for name, rows in _samples(lm, benchmark, tasks, chosen, seed, None if folds else cache).items():
                samples[name] += rows
    seconds = time.monotonic() - started

    def count_tokens(context: str, text: str) -> int:
        return len(lm.tok_encode(context + text)) - len(lm.tok_encode(context))

    tokens = sum(
        len(lm.tok_encode("".join(part for part in request if isinstance(part, str))))
        for rows in samples.values()
        for row in rows
        for request in row["arguments"]
    )
    return Column(
        metric=benchmark.metric,
        items=read_items(benchmark, samples, count_tokens),
        tokens=tokens,
        seconds=seconds,
    )


def _samples(
    lm: Any,
    benchmark: Benchmark,
    tasks: dict[str, Any],
    items: dict[str, list[int]],
    seed: int,
    cache: str | None,
) -> dict[str, list[dict[str, Any]]]:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import CacheHook

    try:
        found = simple_evaluate(
            model=lm,
            tasks=[task for name, task in tasks.items() if items[name]],
            samples=items,
            bootstrap_iters=0,
            use_cache=cache,
            task_manager=task_manager(benchmark.folder),  # each call would make one, in ten seconds
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    finally:
        # The harness leaves it in the model, which would go on writing to a file that is done with.
        lm.set_cache_hook(CacheHook(None))
    assert found is not None, "this is rank 0"
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    return samples


def _draw(tasks: dict[str, Any], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Item numbers by task. The first `limit` of a data set would be its first topics; these are of all."""
    drawn = {}
    for name, task in tasks.items():
        items = len(task.eval_docs)
        kept = random.Random(seed).sample(range(items), min(limit, items)) if limit else range(items)
        drawn[name] = sorted(kept)
    return drawn
