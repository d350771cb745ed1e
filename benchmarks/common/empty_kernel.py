"""A Triton kernel that does nothing, by which the time of a launch is measured."""

import triton


@triton.jit
def empty() -> None:
    pass
