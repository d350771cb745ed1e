"""A worker extension for `vllm serve --load-format dummy`: random weights under which routing looks real.

vLLM's own dummy weights are all within ±0.001, norms included. All router probabilities are then equal up to
their last bits, so λ·CEI alone would decide, and every token would take the same experts. With the weights of
this module a layer keeps the scale of what goes through it, and router logits have a standard deviation of 2.
Equal names get equal weights in every process.
"""

import zlib

import torch
from torch import nn
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

ROUTER_STD = 2.0


class DummyWeights:
    """`--worker-extension-cls benchmarks.common.dummy_weights.DummyWeights`; importing it is what matters."""


def load_weights(self: DummyModelLoader, model: nn.Module, model_config: object) -> None:
    """Takes the place of DummyModelLoader.load_weights."""
    for name, parameter in model.named_parameters():
        fill(name, parameter.data)


def fill(name: str, tensor: torch.Tensor) -> None:
    """Fill a weight with random values, seeded by its name."""
    generator = torch.Generator(device=tensor.device).manual_seed(zlib.crc32(name.encode()))
    if tensor.dtype == torch.uint8:
        if "scale" in name:
            tensor.fill_(120)  # mxfp4's exponents: 2^-7, a unit gain for some 3,000 inputs of ±6
        else:
            tensor.random_(0, 256, generator=generator)
    elif not tensor.is_floating_point():
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1.0)
    elif tensor.dim() < 2 or name.endswith(("bias", "sinks")):
        tensor.zero_()
    else:
        # Uniform in ±a has the standard deviation a / √3; the last dimension is the one summed over.
        std = 1.0 if "embed_tokens" in name else tensor.shape[-1] ** -0.5
        if name.endswith(("gate.weight", "router.weight")):
            std *= ROUTER_STD
        bound = std * 3**0.5
        tensor.uniform_(-bound, bound, generator=generator)


DummyModelLoader.load_weights = load_weights
