"""Draws docs/pictures/demo.svg from what `make demo` prints, which it reads from its standard input.

    export COLUMNS=100 TTY_COMPATIBLE=1 TTY_INTERACTIVE=0 COLORTERM=truecolor TERM=xterm-256color
    python examples/demo/run.py 2>&1 | tee /dev/stderr | python docs/pictures/demo.py

The variables ask rich for colours without moving progress bars. Parts that a newcomer does not need are left
out, with a line of three dots in their place.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
PICTURE = Path(__file__).with_suffix(".svg")
WIDTH = 100  # characters in a line
# The first and the last line of each part that is left out.
LEFT_OUT = [
    (r"loading model", r"warning: too few hard"),
    (r"┏━+┳━+┳━+┳━+┳━+┳━+┳━+┓$", r".*plots/coverage.svg"),
    (r"  streamed by", r"  streamed by"),
    (r"┏━+┳━+┳━+┳━+┓$", r"The first line is stock against itself"),
]
CURSOR = re.compile("\x1b\\[\\?25[lh]")  # hides and shows the cursor
FONT_FILES = re.compile(r"    @font-face \{\{.*?\n    \}\}\n", re.DOTALL)


def chosen(output: str) -> list[str]:
    """The lines of the demo's output that the picture shows, with paths relative to the repository."""
    lines, last = [], ""
    for line in CURSOR.sub("", output).replace(f"{ROOT}/", "").splitlines():
        plain = Text.from_ansi(line).plain
        if not last:
            last = next((end for start, end in LEFT_OUT if re.match(start, plain)), "")
            lines.append("  …" if last else line)
        if last and re.match(last, plain):
            last = ""
    return lines


def draw(output: str) -> str:
    """The picture as SVG, in whatever fixed-width font the reader has; it loads no font from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print("$ make demo", style="bold")
    for line in chosen(output):
        console.print(Text.from_ansi(line))
    form = FONT_FILES.sub("", CONSOLE_SVG_FORMAT)
    return console.export_svg(title="make demo", unique_id="demo", code_format=form)


if __name__ == "__main__":
    PICTURE.write_text(draw(sys.stdin.read()), encoding="utf-8")
    print(PICTURE)
