"""rich's console, with one way to end if the reader has left, and the progress bar of long commands."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Terminal(Console):
    """A Console on which a closed pipe is an exception; rich's own Console ends the process with code 1."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that rich has just caught."""
        raise


def progress_bar(console: Console) -> Progress:
    """A bar with an estimate of the time left; a task has a description and the field `step`."""
    return Progress(
        TextColumn("{task.description} {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
