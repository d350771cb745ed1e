"""One length and one tokenisation of prompts on every back end, and how many were cut."""

from collections.abc import Sequence
from typing import Any

from cor_vllm.evaluate.benchmarks import EvaluationError

MAX_NEW_TOKENS = 256  # the harness's, where a task sets none; the same on every back end


class Fitted:
    """Goes before a model class of the harness, each of which cuts long prompts at another token.

    A prompt and its answer have `limit` tokens together. Of what is scored, one is left for the token that a
    server must generate; of what is answered, all that the task allows for the answer. A longer prompt loses
    its beginning; an answer is never cut.
    """

    limit = 0

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        fitting = [
            (key, context[-self._room(len(continuation) + 1) :], continuation)
            for key, context, continuation in requests
        ]
        return super()._loglikelihood_tokens(fitting, *args, **kwargs)  # type: ignore[misc]

    def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for request in requests:
            self._room(new_tokens(request.args[1]))
        return super().generate_until(requests, *args, **kwargs)  # type: ignore[misc]

    def _room(self, answer: int) -> int:
        """Tokens that a prompt may have before `answer` more."""
        if answer >= self.limit:
            raise EvaluationError(
                f"an answer of {answer} tokens does not fit into {self.limit}, which is all that the model "
                "takes of a prompt and its answer (--max-model-len); take a longer length, or other --tasks"
            )
        return self.limit - answer


def new_tokens(generation: dict[str, Any]) -> int:
    """How many tokens a task allows for an answer."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((generation[name] for name in names if generation.get(name)), MAX_NEW_TOKENS))


def length(lm: Any, request: Sequence[Any]) -> int:
    """Tokens of a request's text, without those to be generated."""
    return len(lm.tok_encode("".join(part for part in request if isinstance(part, str))))


def is_cut(lm: Any, request: Sequence[Any]) -> bool:
    """Whether a request's prompt loses its beginning."""
    generation = next((part for part in request if isinstance(part, dict)), None)
    if generation is not None:
        return length(lm, request) + new_tokens(generation) > lm.limit
    prefix = int(not request[0])  # an empty context is one token
    return length(lm, request) + prefix + 1 > lm.limit


def resolve_limit(takes: int | None, wanted: int | None, where: str) -> int:
    """Tokens of a prompt and its answer together.

    Args:
        takes: what the model or server takes; None: it does not say.
        wanted: --max-model-len; None: all that it takes.
        where: for the message.

    Raises:
        EvaluationError: it does not say, or takes less than is wanted.
    """
    if takes is None and wanted is None:
        raise EvaluationError(
            f"{where}: does not say how many tokens it takes (max_model_len in /v1/models): give "
            "--max-model-len N, or long prompts would be cut somewhere else than for the other rows"
        )
    if takes is not None and wanted is not None and wanted > takes:
        raise EvaluationError(f"--max-model-len {wanted}: {where} takes {takes} tokens")
    return wanted or takes or 0
