"""A worker extension that routes with plain torch instead of the Triton kernel, to measure its worth.

vLLM imports a worker extension before the worker builds its model, so before any layer routes.
"""

import functools
import logging

from benchmarks.common.dummy_weights import DummyWeights
from benchmarks.common.servers import PLAIN_TORCH
from cor_vllm.kernels.dispatch import route
from cor_vllm.serve import router

router.route = functools.partial(route, backend="torch")
logging.getLogger("vllm.cor").warning(PLAIN_TORCH)


class TorchRouter(DummyWeights):
    """`--worker-extension-cls benchmarks.common.torch_router.TorchRouter`."""
