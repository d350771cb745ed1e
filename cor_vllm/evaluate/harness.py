"""The harness's three ways to a model: transformers in this process, vLLM in this process, a server."""

import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from cor_vllm.calibrate.model.loading import load_tokenizer
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.errors import first_line
from cor_vllm.evaluate.benchmarks import Benchmark, EvaluationError, task_manager
from cor_vllm.evaluate.items import chance, read_items
from cor_vllm.evaluate.prompts import Fitted, is_cut, length, new_tokens, resolve_limit
from cor_vllm.evaluate.runs import Column

CANARY = ("The capital of France is", (" Paris", " a large city in the north of the country of France"))


class _Refusals(logging.Handler):
    """What a server last answered to a request that it refused: the harness logs it and raises without it."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("API request failed"):
            self.last = " ".join(message.removesuffix(". Retrying...").split())[:300]


_refusals = _Refusals()


def quiet() -> None:
    """Leave out what the harness logs: what matters of it, prompts that are cut, is counted and said."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    requests = logging.getLogger("lm_eval.models.api_models")
    if _refusals not in requests.handlers:
        requests.setLevel(logging.WARNING)
        requests.propagate = False
        requests.addHandler(_refusals)


class _Final(torch.Tensor):
    """Scores of tokens as they are to be summed. The harness takes log_softmax of what a model returns."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.log_softmax:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs)


def transformers_model(
    model: MoeModel, tokenizer: Any, batch_size: int, max_model_len: int | None = None
) -> Any:
    """The harness's model over one that is loaded and may be intervened on.

    Interventions by hooks need nothing more. `forward` ([B, S] ids → logits), where set, takes the model's
    place in scoring; `around` (benchmark, whether it generates → context manager) is what to do to all of a
    benchmark, `folds` (0 or 1 → context manager) to its items of even and odd number. `final`: what the model
    returns are no logits, and not to be normalised. `max_model_len`: tokens of a prompt and its answer; None:
    all that the model has positions for.
    """
    from lm_eval.models.huggingface import HFLM

    class Routed(Fitted, HFLM):
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

    lm = Routed(
        pretrained=model.model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device),
        softmax_dtype=torch.float32,  # logits of a bfloat16 model are, too
    )  # fmt: skip
    lm.limit = lm._max_length = resolve_limit(lm.max_length, max_model_len, "the model")
    return lm


def engine_model(model: str, options: dict[str, Any] | None, arguments: dict[str, Any]) -> Any:
    """The harness's model over a vLLM engine in this process.

    Args:
        model: as for `vllm serve`.
        options: `additional_config["cor"]`; None: an engine without the plugin's routing.
        arguments: of vllm.LLM.
    """
    from lm_eval.models.vllm_causallms import VLLM

    from cor_vllm.serve.cpu import mended_arguments

    class Engine(Fitted, VLLM):
        pass

    arguments, changes = mended_arguments(model, arguments)
    for line in changes:
        print(f"cor-vllm: {line}", file=sys.stderr)
    if options is not None:
        arguments = arguments | {
            "additional_config": {**(arguments.get("additional_config") or {}), "cor": options}
        }
    lm = Engine(pretrained=model, **arguments)
    lm.limit = lm.max_length
    return lm


def server_model(model: str, url: str, served_name: str, batch_size: int, limit: int) -> Any:
    """The harness's model over an OpenAI-compatible server.

    Args:
        model: folder or hub id; its tokenizer makes the token ids that are sent.
        url: the server's address with or without /v1.
        served_name: what the server calls the model.
        batch_size: prompts per request.
        limit: tokens of a prompt and its answer.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.models.utils import has_bos_prefix

    class Server(Fitted, LocalCompletionsAPI):
        def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
            """As the harness does it for models in this process, which begin a text as the tokenizer does."""
            if not isinstance(string, str):
                return [self.tok_encode(text, add_special_tokens) for text in string]
            if add_special_tokens is None and has_bos_prefix(
                string, self.tokenizer.decode(self.prefix_token_id)
            ):
                add_special_tokens = False
            extra = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return self.tokenizer.encode(string, **extra)

        def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            for request in requests:  # the one name that this class of the harness knows
                context, generation = request.args
                request.arguments = (context, {**generation, "max_gen_toks": new_tokens(generation)})
            with _answered(url):
                return super().generate_until(requests, *args, **kwargs)

        def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            with _answered(url):
                return super()._loglikelihood_tokens(requests, *args, **kwargs)

    load_tokenizer(model)  # its errors are one line
    base = url.rstrip("/").removesuffix("/v1").rstrip("/")
    lm = Server(
        model=served_name, base_url=f"{base}/v1/completions", tokenizer=model, batch_size=batch_size,
        tokenizer_backend="huggingface", add_bos_token=None, num_concurrent=4, max_retries=3, timeout=600,
    )  # fmt: skip
    lm.limit = lm.max_length = limit
    return lm


@contextmanager
def _answered(url: str) -> Iterator[None]:
    """EvaluationError if a server does not answer, or with something else."""
    from aiohttp import ClientError

    _refusals.last = ""
    try:
        yield
    except EvaluationError:
        raise
    except (ClientError, OSError, LookupError, TypeError, ValueError) as error:
        reason = _refusals.last or f"{type(error).__name__}: {error}"
        print(file=sys.stderr)  # the harness's progress bar stands in the line
        raise EvaluationError(
            f"{url}: a request failed, also when repeated ({reason}); the same command goes on from here"
        ) from error


def canary(lm: Any, where: str) -> None:
    """Check that log-likelihoods come back; if they do not, every benchmark would score chance.

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
        reason = first_line(error)
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

    counted = {  # other filters read the same answers otherwise
        f"{name}/{row['doc_id']}": row["arguments"]
        for name, rows in samples.items()
        for row in rows
        if row["filter"] == benchmark.filter
    }
    return Column(
        metric=benchmark.metric,
        items=read_items(benchmark, samples, count_tokens),
        chance=chance(benchmark, samples),
        max_model_len=lm.limit,
        cut=[item for item, requests in counted.items() if any(is_cut(lm, each) for each in requests)],
        tokens=sum(length(lm, each) for requests in counted.values() for each in requests),
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
