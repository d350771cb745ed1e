"""--enable-return-routed-experts where layers have different k_l.

vLLM captures under its V2 model runner alone, so the engine runs where test_v2_runner.py runs it.
"""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from vllm import envs

from cor_vllm.testing.make_scores import make
from tests.parity.engine import start
from tests.parity.test_parity import varied, written

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not envs.VLLM_USE_V2_MODEL_RUNNER, reason="needs the V2 model runner: test_v2_runner.py")
def test_every_layer_fits_the_widest(checkpoints):
    """What a client gets is what each layer's kernel was given, the last expert repeated up to the widest."""
    from vllm import SamplingParams
    from vllm.utils.serial_utils import numpy2base64

    folder = checkpoints["qwen3_moe"]
    values = make(folder, k=varied(folder))
    widths = values.k.tolist()
    assert widths == [1, 7, 4]
    caching = {"enable_prefix_caching": True, "block_size": 32}
    llm = start(folder, written(folder, values), enable_return_routed_experts=True, **caching)
    layers = llm.apply_model(lambda model: [layer.mlp.experts for layer in model.model.layers])[0]
    given: list[list[np.ndarray]] = [[] for _ in layers]
    for seen, layer in zip(given, layers, strict=True):
        forward = layer.routed_experts.forward_modular

        def listening(*args, forward=forward, seen=seen, **kwargs):
            seen.append(kwargs["topk_ids"].numpy().copy())
            return forward(*args, **kwargs)

        layer.routed_experts.forward_modular = listening
    prompt = {"prompt_token_ids": list(range(40, 51))}
    asked = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate([prompt], asked, use_tqdm=False)
    routed = output.outputs[0].routed_experts
    assert routed.shape == (11 + 4 - 1, 3, 7)  # the last token was never fed in
    used = documented_reader()(
        numpy2base64(routed), [{"layer": n, "k": width} for n, width in enumerate(widths)]
    )
    for number, (seen, width) in enumerate(zip(given, widths, strict=True)):
        rows = np.concatenate([ids[: 11 if step == 0 else 1] for step, ids in enumerate(seen)])
        assert rows.shape == (14, width)
        assert (routed[:, number, :width] == rows).all()
        assert (routed[:, number, width:] == rows[:, -1:]).all()
        assert used[number].dtype == "uint8" and (used[number] == rows).all()


def documented_reader():
    """The function that docs/reference/features.md gives to whoever replays a routing."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "features.md").read_text(encoding="utf-8")
    [code] = re.findall(
        r"^```python\n(.*?)^```", page.split("## Replaying routed experts")[1], re.DOTALL | re.MULTILINE
    )
    names = {}
    exec(code, names)
    return names["used_experts"]


def test_the_documented_reader_leaves_out_what_was_repeated():
    ids = np.array([[[3, 3, 3], [0, 1, 2]], [[1, 1, 1], [2, 0, 1]]], dtype=np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, ids)
    used = documented_reader()(
        base64.b64encode(buffer.getvalue()).decode(), [{"layer": 0, "k": 1}, {"layer": 1, "k": 3}]
    )
    assert used[0].tolist() == [[3], [1]] and used[1].tolist() == [[0, 1, 2], [2, 0, 1]]
