"""Stock and counterfactual routing side by side on the demo model: `python examples/quickstart.py`."""

from pathlib import Path

from vllm import LLM, SamplingParams

DEMO = Path(__file__).parent / "demo"
QUESTIONS = [
    "From which city is Lithuania governed?",  # Vilnius
    "What money do people in Luxembourg pay with?",  # the euro
    "Which city is the capital of Norway?",  # Oslo
]


def answers(additional_config: dict) -> list[str]:
    """The greedy answers of an engine of its own."""
    llm = LLM(str(DEMO / "model"), max_model_len=512, kv_cache_memory_bytes=2**26, enforce_eager=True,
              additional_config=additional_config)  # fmt: skip
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


if __name__ == "__main__":  # vLLM starts processes, which import this file
    stock = answers({})
    routed = answers({"cor": {"scores": DEMO / "scores.safetensors"}})  # as `vllm serve --cor-scores FILE`
    for question, before, after in zip(QUESTIONS, stock, routed, strict=True):
        print(f"{question:45}  stock: {before:12}  CoR: {after}")
