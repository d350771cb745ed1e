"""A Triton kernel that does nothing: what a launch takes."""

import triton


@triton.jit
def empty() -> None:
    pass
