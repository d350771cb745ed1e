"""How a router scores its experts and weighs those that it selects."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Scoring:
    """How the router of one MoE layer scores and weighs, apart from how many experts it selects.

        g = softmax(router_logits) or sigmoid(router_logits), float32
        A = the top_k experts of highest g + correction_bias, in the groups that these scores keep
        w = g[A], divided by its sum if `renormalize`, times `scale`

    Two of them are equal only if they are the same object, since tensors have no single answer to `==`.

    Raises:
        ValueError: a field has a value that the routing step does not take; the message names it.

    Source: paper Eq. 9; DeepSeek-V3, §2.1.2, for the groups.
    """

    scoring_func: str
    """Either "softmax" or "sigmoid"."""
    renormalize: bool
    """Whether the weights of a token are divided by their sum."""
    scale: float = 1.0
    """The model's routed scaling factor, which multiplies the weights."""
    num_expert_group: int = 1
    """How many groups of consecutive experts there are, all of one size, at least 2; 1: there are none."""
    topk_group: int = 1
    """How many groups are kept, those whose two best scores have the highest sum."""
    correction_bias: torch.Tensor | None = None
    """[N] of a float dtype, the model's own, which only selects; None: the model has none."""

    def __post_init__(self) -> None:
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func: {self.scoring_func!r}, must be 'softmax' or 'sigmoid'")
        if self.num_expert_group < 1 or not 1 <= self.topk_group <= self.num_expert_group:
            raise ValueError(
                f"topk_group: {self.topk_group} of num_expert_group {self.num_expert_group}, must be in "
                "[1, num_expert_group]"
            )
        bias = self.correction_bias
        if bias is None:
            return
        if bias.dim() != 1 or not bias.is_floating_point():
            raise ValueError(
                f"correction_bias: {list(bias.shape)} {bias.dtype}, must be [N] of a float dtype"
            )
        self.check_experts(len(bias))

    def check_experts(self, experts: int) -> None:
        """Refuse groups that `experts`, the columns of the router logits, cannot be split into.

        Raises:
            ValueError: the groups would differ in size, or be smaller than 2.
        """
        groups = self.num_expert_group
        if groups > 1 and (experts % groups or experts < 2 * groups):
            raise ValueError(
                f"num_expert_group: {groups}, must split {experts} experts into equal groups of at least 2"
            )

    @property
    def drops_groups(self) -> bool:
        """Whether some groups are not kept, so that the groups matter."""
        return self.topk_group < self.num_expert_group

    def total_bias(
        self, bias: torch.Tensor | None = None, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """All that is added to the probabilities: the model's own correction bias plus `bias`.

        What does not depend on the token is summed first, so that server and calibrator round alike.

        Args:
            bias: [N] or [T, N] float32 on `device`, or None.
            device: of the result; None: that of the correction bias.

        Returns:
            Like `bias`, or [N] float32 without one; None if neither exists. It may be the model's own tensor,
            so write to a copy.
        """
        if self.correction_bias is None:
            return bias
        own = self.correction_bias.to(device=device, dtype=torch.float32)
        return own if bias is None else own + bias
