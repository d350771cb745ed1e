"""--enable-return-routed-experts where layers have different k_l.

vLLM captures on GPUs alone, so its capturer is put to the routers of a CPU engine by hand here.
"""

from functools import partial

import pytest
import torch

from cor_vllm.config import CorConfig, plan
from cor_vllm.plugin import widen_capture
from tests.make_scores import make
from tests.parity.engine import ENGINE
from tests.parity.test_parity import varied, written

pytestmark = pytest.mark.slow


def test_every_layer_fits_the_widest(checkpoints):
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer

    folder = checkpoints["qwen3_moe"]
    values = make(folder, k=varied(folder))
    widths = values.k.tolist()
    assert widths == [1, 7, 4]
    options = {k: v for k, v in ENGINE.items() if k != "compilation_config"}
    cor = written(folder, values)
    config = EngineArgs(str(folder), **options, additional_config={"cor": cor}).create_engine_config()
    config.model_config.enable_return_routed_experts = True  # as a flag vLLM refuses it on the CPU
    widen_capture(config, plan(CorConfig.of(cor), values))
    capturer = RoutedExpertsCapturer(64, config)
    assert capturer.shape_per_token == (3, 7)

    llm = LLM(model=str(folder), **ENGINE, additional_config={"cor": cor})
    layers = llm.apply_model(lambda model: [layer.mlp.experts for layer in model.model.layers])[0]
    given: list[torch.Tensor] = []
    for number, layer in enumerate(layers):
        layer.router.set_capture_fn(partial(capturer.capture, number))
        forward = layer.routed_experts.forward_modular

        def listening(*args, forward=forward, **kwargs):
            given.append(kwargs["topk_ids"].clone())
            return forward(*args, **kwargs)

        layer.routed_experts.forward_modular = listening
    prompt = {"prompt_token_ids": list(range(40, 51))}
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)

    captured = capturer.device_buffer[:11]
    for number, width in enumerate(widths):
        assert given[number].shape == (11, width)
        assert captured[:, number, :width].equal(given[number])
        assert (captured[:, number, width:] == given[number][:, -1:]).all()
