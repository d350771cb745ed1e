"""Counterfactual Routing (CoR, arXiv 2604.14246) for mixture-of-experts models served by vLLM."""

from cor_vllm.version import __version__ as __version__


def register() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it in every process that it starts.

    vLLM logs an import error of a plugin and serves on without it, but an exception raised by the entry
    point itself stops the process. The import therefore happens here, inside the call.
    """
    from cor_vllm.plugin import install

    install()
