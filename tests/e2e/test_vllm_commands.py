"""The vllm commands that build an engine, as users run them: processes, flags, the OpenAI client."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from cor_vllm import scores
from cor_vllm.testing import tiny_models
from cor_vllm.testing.make_scores import make
from cor_vllm.testing.server import environment, serve
from tests import cores
from tests.parity.engine import PROMPTS, Completion, reference_completions

pytestmark = pytest.mark.slow
ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
TOKENS = 16
K = [1, 7, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def file(model) -> Path:
    path = model.parent / "scores.safetensors"
    scores.save(path, make(model, k=K))
    return path


def of_processes(**changes: str) -> dict[str, str]:
    """The environment of a user's shell: conftest keeps engines in the test's process."""
    env = environment(**changes)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "TRITON_INTERPRET"):
        env.pop(name, None)
    return env


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    vllm = Path(sys.executable).with_name("vllm")
    return subprocess.run(
        [str(vllm), *arguments], env=of_processes(**env), capture_output=True, text=True, timeout=400
    )


def routing(model: Path) -> dict[int, tuple[int, torch.Tensor]]:
    values = make(model, k=K)
    return {i: (k, 0.1 * cei) for i, (k, cei) in enumerate(zip(K, values.cei, strict=True))}


def stock(model: Path) -> dict[int, tuple[int, None]]:
    return dict.fromkeys(range(3), (make(model).config.model.top_k, None))


def assert_routed(model: Path, got: list[Completion], layers: dict, prompts: list[list[int]]) -> None:
    want = reference_completions(model, layers, got, prompts=prompts)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.tokens == theirs.tokens
        torch.testing.assert_close(
            torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=0
        )


def test_server_with_two_ranks_and_two_front_ends(model, file, tmp_path):
    """Tensor parallel 2 and two API server processes; chat, completions and streaming by the client."""
    flags = [
        *ENGINE,
        "--tensor-parallel-size",
        "2",
        "--api-server-count",
        "2",
        "--return-tokens-as-token-ids",
    ]
    env = of_processes(VLLM_CPU_OMP_THREADS_BIND=cores.for_ranks(2))
    with serve(model, *flags, "--cor-scores", str(file), log=tmp_path / "log", env=env) as url:
        client = OpenAI(base_url=url, api_key="none")
        ask = {
            "model": str(model),
            "temperature": 0,
            "max_tokens": TOKENS,
            "extra_body": {"ignore_eos": True},
        }
        answers = [client.completions.create(prompt=p, logprobs=0, **ask) for p in PROMPTS]
        streamed = [
            chunk.choices[0].text
            for chunk in client.completions.create(prompt=PROMPTS[3], stream=True, **ask)
        ]
    got = []
    for answer in answers:
        tokens = [int(t.removeprefix("token_id:")) for t in answer.choices[0].logprobs.tokens]
        got.append(Completion(tokens, answer.choices[0].logprobs.token_logprobs, []))
    assert_routed(model, got, routing(model), PROMPTS)
    assert "".join(streamed) == answers[3].choices[0].text
    assert len(streamed) > 1


def batch(model: Path, tmp_path: Path, *flags: str, **env: str) -> tuple[list[list[int]], list[Completion]]:
    """Three questions through `vllm run-batch`: their token ids and the answers."""
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": str(model), "temperature": 0, "max_tokens": TOKENS, "logprobs": True, "ignore_eos": True,
            "return_tokens_as_token_ids": True, "return_token_ids": True}  # fmt: skip
    with open(requests, "w") as lines:
        for text in ("What is it?", "Who was there when it was found, and why?", "x"):
            message = {"messages": [{"role": "user", "content": text}]}
            request = {"custom_id": text, "method": "POST", "url": "/v1/chat/completions"}
            lines.write(json.dumps({**request, "body": {**body, **message}}) + "\n")
    files = ["-i", str(requests), "-o", str(results)]
    done = run("run-batch", *files, "--model", str(model), *ENGINE, *flags, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    prompts, answers = [], []
    for line in results.read_text().splitlines():
        answer = json.loads(line)["response"]["body"]
        steps = answer["choices"][0]["logprobs"]["content"]
        tokens = [int(step["token"].removeprefix("token_id:")) for step in steps]
        prompts.append(answer["prompt_token_ids"])
        answers.append(Completion(tokens, [step["logprob"] for step in steps], []))
    assert len(answers) == 3
    return prompts, answers


def test_run_batch_and_the_kill_switch(model, file, tmp_path):
    flags = ["--cor-scores", str(file)]
    prompts, routed = batch(model, tmp_path, *flags)
    assert_routed(model, routed, routing(model), prompts)
    prompts, disabled = batch(model, tmp_path, *flags, COR_DISABLE="1")
    assert_routed(model, disabled, stock(model), prompts)
    assert disabled != routed


def test_bench_throughput(model, file, tmp_path):
    result = tmp_path / "result.json"
    done = run(
        "bench", "throughput", "--model", str(model), *ENGINE, "--cor-scores", str(file),
        "--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "4",
        "--num-prompts", "4", "--cor-lambda", "0.05", "--output-json", str(result),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(result.read_text())["num_requests"] == 4
    assert "CoR: full, 3 MoE layers, 3 of them with λ·CEI, Σ k_l = 12" in done.stdout + done.stderr


def test_flags_are_in_the_help():
    done = run("serve", "--help=CoRConfig")
    assert done.returncode == 0
    for flag in ("scores", "lambda", "swap-rate", "mode", "static-k", "weights", "seed", "admin", "observe"):
        assert f"--cor-{flag}" in done.stdout


def test_a_file_of_another_model_stops_the_server_with_one_line(model, tmp_path):
    other = tiny_models.build("qwen3_moe", tmp_path / "other", num_experts=9)
    path = tmp_path / "scores.safetensors"
    scores.save(path, make(other))
    done = run("serve", str(model), *ENGINE, "--cor-scores", str(path))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "num_experts: the scores file has 9, the model has 7" in last
    assert "Loading safetensors" not in done.stdout + done.stderr  # no weight was read
