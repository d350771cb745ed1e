"""The linear layer that makes a MoE layer's router logits, and another weight in the place of its own.

On a GPU its kernel reads the parameter `weight`. vLLM's CPU build packs the weight for its kernel, drops the
parameter, and leaves the packed form in the closure of the layer's `cpu_linear`. In either case there is one
tensor that the kernel reads at every call, also in a compiled model and in a captured CUDA graph, which hold
that tensor itself. Written in place, it changes what all of them compute.
"""

from typing import Any

import torch

from cor_vllm.errors import CorError

# A kernel that holds the weight in a form of its own gives it back as a product, with the kernel's rounding.
RELATIVE, ABSOLUTE = 2.0**-8, 2.0**-24
_ROWS = 1024  # of the identity matrix at a time
# What vLLM's kernels for CPUs have in their closure (vllm.model_executor.layers.utils).
_HANDLER, _TENSORS = "handler", ("packed_weight", "zen_weight")


class GateError(CorError):
    """A router whose weight cannot be replaced: one line with the cause and the remedy."""


def is_unquantised(gate: Any) -> bool:
    """Whether a linear layer of vLLM multiplies by the numbers of its checkpoint, in some floating dtype."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    return isinstance(gate.quant_method, UnquantizedLinearMethod)


def weight_of(gate: Any) -> torch.Tensor:
    """[N, H] the weight that a linear layer multiplies by.

    vLLM's CPU build packs it for its kernel and drops it, and quantised layers hold another form: its product
    with the identity matrix is the weight then.
    """
    weight: torch.Tensor | None = getattr(gate, "weight", None)
    if weight is not None and weight.shape == (gate.output_size, gate.input_size) and is_unquantised(gate):
        return weight.detach()
    device = next(gate.parameters()).device
    identity = torch.eye(gate.input_size, dtype=gate.params_dtype, device=device)
    rows = [gate.quant_method.apply(gate, part, None) for part in identity.split(_ROWS)]
    return torch.cat(rows).T.contiguous()


class Switch:
    """Two weights of one linear layer: its own and another, of which either is in force at once when told.

    Its own comes back bit by bit, since it is kept in the form that the kernel reads.

    Args:
        gate: an unquantised, unsharded linear layer of vLLM that has its weight.
        weight: [N, H] float32, the other one; `gate.params_dtype` holds its values.

    Raises:
        GateError: the kernel holds the weight in a form that is not known here.
    """

    def __init__(self, gate: Any, weight: torch.Tensor) -> None:
        self.on = False  # what `turn` was told last
        self.lost = False  # whether a third weight has come since, so that neither is in force
        other = _with_weight(gate, weight)
        self._live, held = _read_by_kernel(gate), _read_by_kernel(other)
        if held.shape != self._live.shape or held.dtype != self._live.dtype:
            raise GateError(
                f"vLLM packs the new weight into {held.dtype} {list(held.shape)} and has packed the old one "
                f"into {self._live.dtype} {list(self._live.shape)}: leave out --cor-router"
            )
        # oneDNN's packed weights are memory of its own, and what the kernel reads is a pointer to it. Each of
        # two handlers frees what it points to at its end, so they always point to different ones.
        self._spare = _closure(other).get(_HANDLER)
        self._forms = {False: self._live.detach().cpu().clone(), True: held.detach().cpu().clone()}
        self._rows = {False: weight_of(gate).cpu().clone()}
        self.turn(True)
        self._rows[True] = weight_of(gate).cpu().clone()
        self.turn(False)

    @property
    def in_force(self) -> bool:
        """Whether the layer computes with the other weight now."""
        return self.on and not self.lost

    @property
    def rows(self) -> torch.Tensor:
        """[N, H] on the CPU: the other weight as the layer computes with it."""
        return self._rows[True]

    @torch.inference_mode()
    def turn(self, on: bool) -> None:
        """Put the other weight in force, or the layer's own: in place, from the next forward on."""
        self._live.copy_(self._forms[on])
        if self._spare is not None:
            self._spare.handler_tensor.copy_(self._forms[not on])
        self.on = on

    def is_untouched(self, gate: Any) -> bool:
        """Whether the layer has what `turn` last left in it: no other weight has come for it."""
        return _read_by_kernel(gate).data_ptr() == self._live.data_ptr() and self._holds(gate, self.on)

    def has_its_own(self, gate: Any) -> bool:
        """Whether the layer has the weight that it had when this object was made."""
        return self._holds(gate, False)

    def _holds(self, gate: Any, on: bool) -> bool:
        return torch.equal(weight_of(gate).cpu(), self._rows[on])


def _with_weight(gate: Any, weight: torch.Tensor) -> torch.nn.Module:
    """A layer with this weight, in the form that vLLM's kernel for `gate` reads."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.to(gate.params_dtype), requires_grad=False)
    if hasattr(gate, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer


def _read_by_kernel(layer: Any) -> torch.Tensor:
    """The tensor that the layer's kernel reads at every call."""
    closure = _closure(layer)
    if _HANDLER in closure:
        pointer: torch.Tensor = closure[_HANDLER].handler_tensor
        return pointer
    found = [closure[name] for name in _TENSORS if name in closure]
    if closure and not found:
        raise GateError(
            f"vLLM keeps the router's weight for its kernel in a form that cor-vllm does not know ("
            f"{', '.join(closure)}): leave out --cor-router"
        )
    weight: torch.Tensor = found[0] if found else layer.weight.data
    return weight


def _closure(layer: Any) -> dict[str, Any]:
    """What the layer's kernel for CPUs holds, by name; empty if it holds nothing, or if there is none."""
    kernel: Any = getattr(layer, "cpu_linear", None)
    cells = getattr(kernel, "__closure__", None) or ()
    names = kernel.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
