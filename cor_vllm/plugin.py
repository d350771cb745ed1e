"""The front door of the plugin: installs counterfactual routing in this process's vLLM.

What is wrapped, and by which function, is the table serve/seams.py. Everything is idempotent, since vLLM
installs its plugins in every process, some of them several times, and nothing happens if
`additional_config["cor"]` is absent.
"""

from typing import Any

from cor_vllm.live import control
from cor_vllm.serve import compat
from cor_vllm.serve.config import ConfigError, CorOptions, disabled
from cor_vllm.serve.seams import FLAGS, SEAMS
from cor_vllm.verify import worker

_installed = False


def install() -> None:
    """Wrap vLLM's functions once per process.

    With COR_DISABLE=1 the flags stay known, so that a command line keeps working, and do nothing.

    Raises:
        UnsupportedVersion: this vLLM is not one that the plugin knows, or it lacks a name of seams.SEAMS.
    """
    global _installed
    if _installed:
        return
    CorOptions.arrive = staticmethod(arrive)  # handed down: no module below imports this one
    if disabled():
        compat.wrap(FLAGS)
    else:
        compat.check_version()
        compat.check()
        compat.wrap(SEAMS)
        worker.give_methods()
        control.give_methods()
    _installed = True


def arrive(options: dict[str, Any]) -> CorOptions:
    """CorOptions in the process that they were sent to; pickle finds this function by its name.

    Args:
        options: `additional_config["cor"]` of the process that configured the engine.

    Raises:
        ConfigError: the plugin is switched off here, but not there.
    """
    if disabled():
        raise ConfigError(
            "COR_DISABLE is set in a worker but not where the engine was configured: set it in both or none"
        )
    install()
    return CorOptions(options)
