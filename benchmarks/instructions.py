"""Reads from the machine code what the compiler makes of the routing kernel for an H100; needs no GPU.

    python -m benchmarks.instructions [--json]

Compiles ahead of time for sm_90, disassembles with the tools that Triton brings, and prints for each shape
the instructions that a warp issues for a row (prefill is bound by them), registers of a thread, and spills. A
warp works on one row or on several, and no row is shared by warps.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COMPUTE_CAPABILITY = 90
PREFILL, DECODE = 4096, 1  # tokens


@dataclass(frozen=True)
class Case:
    """One compilation of the kernel."""

    experts: int
    top_k: int
    tokens: int = DECODE
    dtype: str = "bf16"
    scoring_func: str = "softmax"
    num_expert_group: int = 1
    topk_group: int = 1
    padding: bool = False


CASES = [
    Case(128, 8),  # Qwen3-30B-A3B
    Case(128, 12),
    Case(128, 16),
    Case(128, 24),  # the sort
    Case(256, 8),
    Case(32, 4),  # GPT-OSS-20B
    Case(64, 6),  # DeepSeek-V2-Lite
    Case(512, 10),  # Qwen3-Next
    Case(60, 4),  # Qwen1.5-MoE
    Case(160, 8, scoring_func="sigmoid"),  # GLM-4.5
    Case(256, 8, scoring_func="sigmoid", num_expert_group=8, topk_group=4),  # DeepSeek-V3
    Case(128, 8, PREFILL),
    Case(32, 4, PREFILL),
    Case(64, 6, PREFILL),
    Case(128, 8, dtype="fp32"),
    Case(128, 8, padding=True),
]


@dataclass(frozen=True)
class Code:
    """What was compiled: per row instructions that a warp issues; per thread registers and spilled words."""

    instructions: float
    registers: int
    spills: int
    barriers: int


def compile_case(case: Case) -> Code:
    """Compile a case for sm_90 and count.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so there is no compiler.
        subprocess.CalledProcessError: the disassembler that Triton brings did not run.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cor_vllm.kernels import cor_topk as kernel

    constants: dict[str, Any] = {
        **kernel.compile_options(
            case.experts, case.top_k, case.tokens, case.num_expert_group, case.topk_group
        ),
        "SIGMOID": case.scoring_func == "sigmoid",
        "RENORMALIZE": True,
    }
    pointers = {
        "logits_ptr": f"*{case.dtype}", "bias_ptr": "*fp32", "padding_ptr": "*i1",
        "weights_ptr": "*fp32", "ids_ptr": "*i32",
    }  # fmt: skip
    if not case.padding:
        del pointers["padding_ptr"]
        constants["padding_ptr"] = None
    types = {"T": "i32", "stride": "i32", "scale": "fp32"} | pointers
    names = kernel.cor_topk_kernel.arg_names
    aligned = [*pointers, *(["stride"] if case.experts % 16 == 0 else [])]
    source = ASTSource(
        fn=kernel.cor_topk_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32), options=options)
    return _count(compiled.asm["cubin"], constants["ROWS"])


def _count(cubin: bytes, rows: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    operation = r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)"
    counts = collections.Counter(re.findall(operation, sass, re.MULTILINE))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or not counts:
        raise RuntimeError(f"cuobjdump printed nothing that is understood: {usage[:200]!r}")
    return Code(
        instructions=(counts.total() - counts["NOP"]) / rows,
        registers=int(registers[1]),
        spills=counts["LDL"] + counts["STL"],
        barriers=counts["BAR"],
    )


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    as_json = parser.parse_args().json
    rows = [asdict(case) | asdict(compile_case(case)) for case in CASES]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("experts", "k", "tokens", "logits", "scoring", "groups", "padding", "instructions/row",
                  "registers", "spills", "barriers")  # fmt: skip
    for row in rows:
        groups = f"{row['topk_group']} of {row['num_expert_group']}"
        cells = [row["experts"], row["top_k"], row["tokens"], row["dtype"], row["scoring_func"], groups,
                 "yes" if row["padding"] else "no", round(row["instructions"]), row["registers"],
                 row["spills"], row["barriers"]]  # fmt: skip
        table.add_row(*map(str, cells))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
