"""Checks on dummy weights that other families' expert kernels take another k, also an odd one, in each layer.

    python -m benchmarks.families

Each row is one engine with the published dimensions and few layers. It starts, captures CUDA graphs and
generates with finite log-probabilities. Then the same text is scored twice, routed by Triton and by plain
torch. As a control the text is scored once more without λ·CEI: if that changed nothing, agreement would mean
nothing.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import dummy_models
from benchmarks.common.results import RESULTS, device_name, markdown, run_folder, write_rows
from benchmarks.common.servers import DUMMY_WEIGHTS, ROOT, Contestant
from cor_vllm.commands import lifetime
from cor_vllm.serve import cpu
from cor_vllm.testing.server import last_error

# row → family, layers, k_l of the MoE layers (Σ is the model's own), changes of the configuration
ROWS: dict[str, tuple[str, int, list[int], dict[str, Any]]] = {
    "gpt-oss-20b mxfp4": ("gpt-oss-20b", 4, [1, 7, 3, 5], {"quantization_config": dummy_models.MXFP4}),
    "gpt-oss-20b bf16": ("gpt-oss-20b", 4, [1, 7, 3, 5], {}),
    "deepseek-v2-lite bf16": ("deepseek-v2-lite", 5, [3, 9, 5, 7], {}),
}
# So small that a CPU runs them; multi-head latent attention has no other sizes on a CPU.
TINY: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 32},
    "deepseek-v2-lite": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64,
                         "moe_intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
                         "v_head_dim": 32, "qk_nope_head_dim": 32},
}  # fmt: skip
PROMPTS = [[(7 * i + 13 * j + j * j) % 500 + 2 for j in range(24 + 5 * i)] for i in range(8)]
TOKENS = 16
CLOSE = 0.05  # nats; a bf16 logit of 4 has a step of 0.03
SHARE = 0.02  # share of positions that may differ by more, because an early layer broke a tie otherwise


def one(row: str, folder: Path, device: str) -> dict[str, Any]:
    """Measure one row in this process."""
    from vllm import LLM, SamplingParams

    from cor_vllm.serve import router

    family, layers, k, changes = ROWS[row]
    model = dummy_models.write(
        family, folder / "model", layers, **changes, **(TINY[family] if device == "cpu" else {})
    )
    scores = dummy_models.write_scores(model, k, folder / "scores.safetensors")
    llm = LLM(
        model=str(model), load_format="dummy", worker_extension_cls=DUMMY_WEIGHTS,
        additional_config={"cor": {"scores": str(scores), "lambda": 0.1}}, max_model_len=256, max_num_seqs=8,
        enable_prefix_caching=False, disable_log_stats=True, **engine_options(device),
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedy, use_tqdm=False)
    texts = [p + list(o.outputs[0].token_ids) for p, o in zip(PROMPTS, outputs, strict=True)]
    generated = [
        step[token].logprob
        for output in outputs
        for step, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
    ]
    own, kernel = router.route, llm.apply_model(expert_kernel)[0]
    routed = score(llm, texts)
    router.route = functools.partial(own, backend="torch")
    plain = score(llm, texts)
    router.route = lambda logits, bias, *args, **options: own(logits, None, *args, **options)
    unbiased = score(llm, texts)
    return {"model": row, "k_l": " ".join(map(str, k)), "expert kernel": kernel} | judge(
        generated, routed, plain, unbiased
    )


def engine_options(device: str) -> dict[str, Any]:
    """Options of the engine. On a GPU decode steps run as graphs, without the minute of torch.compile.

    On a CPU latent attention needs what cor_vllm/serve/cpu.py has; other models take no notice of it.
    """
    if device == "cpu":
        operations = {"custom_ops": [f"-{cpu.ROTARY}"]}
        return {"dtype": "float32", "enforce_eager": True, "attention_backend": cpu.BACKEND,
                "compilation_config": operations}  # fmt: skip
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8]}
    return {"dtype": "bfloat16", "compilation_config": graphs, "kv_cache_memory_bytes": 2**30,
            "gpu_memory_utilization": 0.05}  # fmt: skip


def expert_kernel(model: torch.nn.Module) -> str:
    """The name of what computes the experts of the first MoE layer."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runner: Any = next(module for module in model.modules() if isinstance(module, MoERunner))
    method = runner.routed_experts.quant_method
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return type(method if experts is None else experts).__name__


def score(llm: Any, texts: list[list[int]]) -> list[float]:
    """The log-probability of every token of the texts, except the first token of each."""
    from vllm import SamplingParams

    only_score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], only_score, use_tqdm=False)
    return [
        step[token].logprob
        for output, text in zip(outputs, texts, strict=True)
        for step, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)
    ]


def judge(
    generated: list[float], routed: list[float], plain: list[float], unbiased: list[float]
) -> dict[str, Any]:
    """Check that results are finite, equal up to rounding, and sensitive to the routing."""
    off = [abs(a - b) for a, b in zip(routed, plain, strict=True)]
    control = [abs(a - b) for a, b in zip(plain, unbiased, strict=True)]
    share = statistics.fmean(not value <= CLOSE for value in off)
    result = "passed"
    if not all(map(math.isfinite, generated + routed + plain)):
        result = "log-probabilities are not finite"
    elif share > SHARE:
        result = f"Triton and torch differ by more than {CLOSE} at {share:.1%} of the positions"
    elif statistics.fmean(control) < 2 * statistics.fmean(off) + 1e-6:
        result = "the routing makes no difference to this model, so nothing was tested"
    return {"result": result, "Triton − torch, mean |Δ|": statistics.fmean(off), "beyond 0.05": share,
            "without λ·CEI, mean |Δ|": statistics.fmean(control)}  # fmt: skip


def all_rows(names: list[str], device: str, logs: Path) -> list[dict[str, Any]]:
    """Run a process for each row: all at once on a GPU, which has room, one after the other on a CPU."""
    lifetime.guard()
    running: dict[str, subprocess.Popen[str]] = {}
    for number, name in enumerate(names):
        command = [sys.executable, "-m", "benchmarks.families", "--one", name, "--device", device]
        env = Contestant(name, None, {}).env() | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
        }  # fmt: skip
        with (logs / f"{number}.log").open("w") as log:
            running[name] = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        if device == "cpu":
            running[name].wait()
    rows = []
    for number, (name, process) in enumerate(running.items()):
        lines = process.communicate()[0].splitlines()
        if process.returncode == 0:
            rows.append(json.loads(lines[-1]))
        else:
            rows.append({"model": name, "result": last_error(logs / f"{number}.log")[:300]})
        print(f"  {name}: {rows[-1]['result']}", file=sys.stderr)
    return rows


def main() -> int:
    """Run the rows; 0 if every row passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="where it runs (default: cuda if there is one)"
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all; no mxfp4 on a CPU")
    parser.add_argument("--output", type=Path, help=f"folder for families.csv (default: in {RESULTS.name}/)")
    parser.add_argument("--one", choices=list(ROWS), help="used by the program itself")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        if args.one:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            print(json.dumps(one(args.one, Path(folder), device)))
            return 0
        names = args.rows or [name for name in ROWS if device == "cuda" or "mxfp4" not in name]
        rows = all_rows(names, device, Path(folder))
    print(markdown(rows))
    write_rows("families", rows, device_name(device), args.output or run_folder(device))
    return 0 if all(row["result"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
