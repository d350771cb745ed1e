"""One prompt set through vLLM and through transformers, for comparison token by token."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

NEW_TOKENS = int(os.environ.get("COR_TEST_TOKENS", "64"))  # fewer in child.py
ANSWER = "answer: "  # before each line of results that the process without the plugin prints
# Lengths from a single token to several cache blocks, no two prompts alike.
PROMPTS = [
    [(7 * i + 13 * j + j * j) % 250 for j in range(length)]
    for i, length in enumerate((1, 2, 5, 16, 17, 33, 48, 70))
]
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "seed": 0,
    "disable_log_stats": True,
    "kv_cache_memory_bytes": 2**26,  # vLLM fills it at once, and some tests have several engines
    # vLLM's CPU kernel for rotary embeddings takes the token stride of a [T, heads, d] tensor from its
    # second last dimension, which is wrong for more than one head. Multi-head latent attention (DeepSeek) is
    # the one caller that passes such tensors. The torch version is right.
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    # On a CPU with AMX latent attention goes to a backend that takes bfloat16 only, unless another is named.
    # Models without latent attention have one backend on a CPU and take no notice.
    "attention_backend": "CPU_MLA",
}


@dataclasses.dataclass(frozen=True)
class Completion:
    """A greedy continuation with the log-probability of each of its tokens, and of each prompt token."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def generate(
    folder: Path, cor: dict[str, Any] | None = None, tokens: int = NEW_TOKENS, **engine: Any
) -> list[Completion]:
    """Greedy completions of PROMPTS by vLLM, in this process."""
    llm = start(folder, cor, **engine)
    answers = answer(llm, tokens)
    del llm
    gc.collect()
    return answers


def start(folder: Path, cor: dict[str, Any] | None = None, **engine: Any) -> Any:
    """vLLM's LLM with ENGINE and what `engine` changes of it."""
    from vllm import LLM

    additional = {"additional_config": {"cor": cor}} if cor else {}
    return LLM(model=str(folder), **{**ENGINE, **additional, **engine})


def answer(llm: Any, tokens: int, prompt_logprobs: int | None = 0, **options: Any) -> list[Completion]:
    """Greedy completions of PROMPTS; `options` are of LLM.generate."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, prompt_logprobs=prompt_logprobs
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [completion(output) for output in llm.generate(prompts, asked, use_tqdm=False, **options)]


def completion(output: Any) -> Completion:
    tokens = list(output.outputs[0].token_ids)
    steps = zip(output.outputs[0].logprobs, tokens, strict=True)
    known = output.prompt_logprobs or [None] * len(output.prompt_token_ids)
    prompt = [(step, t) for step, t in zip(known, output.prompt_token_ids, strict=True) if step]
    return Completion(tokens, [step[t].logprob for step, t in steps], [step[t].logprob for step, t in prompt])


def generate_without_plugin(folders: list[Path], tokens: int) -> dict[str, list[Completion] | str]:
    """Completions by a vLLM that never heard of cor_vllm: another process with no plugin loaded.

    One process for all folders. If it dies of one, that folder's answer is the reason, and another process
    goes on with the next.
    """
    answers: dict[str, list[Completion] | str] = {}
    while left := [str(folder) for folder in folders if str(folder) not in answers]:
        run = subprocess.run(
            [sys.executable, "-m", "tests.parity.engine", str(tokens), *left],
            env={**os.environ, "VLLM_PLUGINS": ""},
            capture_output=True,
            text=True,
        )
        lines = [line.removeprefix(ANSWER) for line in run.stdout.splitlines() if line.startswith(ANSWER)]
        for folder, line in zip(left, lines, strict=False):
            answers[folder] = [Completion(**c) for c in json.loads(line)]
        if run.returncode:
            answers[left[len(lines)]] = f"exit code {run.returncode}\n{run.stderr[-3000:]}"
    return answers


def reference_completions(
    folder: Path,
    routing: dict[int, tuple[int, torch.Tensor | None]],
    given: list[Completion],
    fused: bool = False,
    prompts: list[list[int]] = PROMPTS,
) -> list[Completion]:
    """What transformers says to the same tokens when routed by the paper's formula.

    Args:
        folder: the model.
        routing: decoder layer → (k_l, λ·CEI [N] or None).
        given: completions whose tokens are fed in; the returned `tokens` are transformers' greedy choices.
        fused: weigh by the score in place of the router probability.
        prompts: what the completions continue.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    renormalize = (
        fused
        or config.model_type in ("mixtral", "gpt_oss")
        or (config.model_type != "deepseek_v2" and config.norm_topk_prob)
    )
    scale = getattr(config, "routed_scaling_factor", 1.0)
    for index, layer in enumerate(model.model.layers):
        router = getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None))
        if router is not None:
            groups = getattr(config, "n_group", 1) or 1, getattr(config, "topk_group", 1) or 1
            _reroute(router, *routing[index], renormalize, scale, fused, groups)
    answers = []
    for prompt, completion in zip(prompts, given, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.tokens])).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor((prompt + completion.tokens)[1:])[:, None])[:, 0].tolist()
        start = len(prompt) - 1
        answers.append(Completion(logits[start:].argmax(-1).tolist(), chosen[start:], chosen[:start]))
    return answers


def _reroute(
    router: Any,
    k: int,
    bias: torch.Tensor | None,
    renormalize: bool,
    scale: float,
    fused: bool,
    groups: tuple[int, int],
) -> None:
    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = functional.linear(hidden.reshape(-1, router.weight.shape[1]), router.weight)
        logits = logits + getattr(router, "bias", torch.zeros(()))
        own_bias = getattr(router, "e_score_correction_bias", None)
        g = logits.softmax(-1) if own_bias is None else logits.sigmoid()
        score = g if own_bias is None else g + own_bias
        score = score if bias is None else score + bias
        number, kept = groups
        if number > kept:
            by_group = score.view(len(score), number, -1)
            best = by_group.topk(2).values.sum(-1).topk(kept).indices
            allowed = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            score = by_group.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
        ids = torch.argsort(-score, dim=-1, stable=True)[:, :k]
        weights = (score if fused else g).gather(1, ids)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * scale, ids

    router.forward = forward


if __name__ == "__main__":
    for folder in sys.argv[2:]:
        found = [dataclasses.asdict(c) for c in generate(Path(folder), tokens=int(sys.argv[1]))]
        assert "cor_vllm.plugin" not in sys.modules
        print(ANSWER + json.dumps(found), flush=True)
