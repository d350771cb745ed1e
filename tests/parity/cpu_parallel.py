"""What vLLM's CPU build leaves out of expert and data parallelism, so that our routing can be run under both.

Two pieces, each a few lines here and a kernel on a GPU. Delete one when vLLM has it:
- CPUUnquantizedExperts takes the map of experts to ranks and does not look at it. It indexes the experts of
  its own rank with the ids of all ranks: stock vLLM 0.32 crashes, or adds up experts that nobody chose.
- CpuCommunicator has no all_gatherv and reduce_scatterv, with which data parallel ranks exchange tokens.
"""

from typing import Any

import torch
from torch import distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_apply = CPUUnquantizedExperts.apply


def _apply_with_map(self: Any, **arguments: Any) -> None:
    expert_map = arguments["expert_map"]
    if expert_map is not None:
        local = expert_map[arguments["topk_ids"].long()]
        arguments["topk_ids"] = local.clamp(min=0).int()
        arguments["topk_weights"] = torch.where(local >= 0, arguments["topk_weights"], 0.0)
    _apply(self, **arguments)


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of all ranks, `sizes` of them; `input_` is one tensor or a list of tensors."""
    assert dim == 0 and sizes is not None
    if isinstance(input_, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def _reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor:
    """The sum over ranks, of which each keeps its own `sizes` rows."""
    assert dim == 0 and sizes is not None
    total = input_.contiguous()
    distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].clone()


CPUUnquantizedExperts.apply = _apply_with_map
CpuCommunicator.all_gatherv = _all_gatherv
CpuCommunicator.reduce_scatterv = _reduce_scatterv


class WorkerExtension:
    """Named as `worker_extension_cls`, so that every worker process imports this file."""
