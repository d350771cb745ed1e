"""rich's console, with one way to end if the reader has left."""

from rich.console import Console


class Terminal(Console):
    """A Console on which a closed pipe is an exception; rich's own Console ends the process with code 1."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that rich has just caught."""
        raise
