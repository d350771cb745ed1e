"""Let the demo model answer its probes by sampling, and say which answers are right.

    python examples/demo/trajectories.py --output trajectories.jsonl
    cor-vllm analyse examples/demo/model --trajectories trajectories.jsonl --num-tokens 200000 --output DIR

Temperature 1 without top-p or top-k, so that a completion is a draw from the model's own prediction.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
LONGEST = 24  # tokens of an answer


def main() -> None:
    """Write one JSON line for each completion: prompt, completion, verified."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--samples", type=int, default=4, help="of each probe (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    torch.manual_seed(args.seed)
    counts = {True: 0, False: 0}
    with args.output.open("w", encoding="utf-8") as file:
        for line in (HERE / "probes.jsonl").read_text(encoding="utf-8").splitlines():
            probe = json.loads(line)
            prompt = f"Question: {probe['question']}\nAnswer:"
            for completion in sample(model, tokenizer, prompt, args.samples):
                right = completion.strip() == probe["answer"].strip()
                row = {"prompt": prompt, "completion": completion, "verified": right}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[right] += 1
    print(f"{args.output}: {counts[True]} right, {counts[False]} wrong")


@torch.inference_mode()
def sample(model: torch.nn.Module, tokenizer: object, prompt: str, samples: int) -> list[str]:
    """Completions up to the end of the text; empty ones are left out."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    end = tokenizer.eos_token_id
    drawn = model.generate(
        ids.expand(samples, -1), do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
        max_new_tokens=LONGEST, pad_token_id=end,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    texts = [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in drawn]
    return [text for text in texts if text.strip()]


if __name__ == "__main__":
    main()
