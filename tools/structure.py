"""Measures how the code is built: rooms, arrows between them, import circles, sizes, what a mode touches.

    python tools/structure.py            # of the tree that this file is in
    python tools/structure.py OTHER      # of another checkout

A room is a folder of modules. An arrow is a pair of rooms of which one imports from the other. An import
circle is a set of modules that all reach each other by imports; those inside functions and those for type
checkers alone count, too. A mode touches a file if the file's code spells the name of a routing mode as a
string. The program only reads source text (ast) and imports nothing.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOMS = ("cor_vllm", "kernels", "calibrate", "benchmarks", "tests", "examples", "tools")
PRODUCT = ("cor_vllm", "kernels", "calibrate")
MODES = {"full", "expert", "random"}  # "layer" and "off" are words for many other things
LARGEST_FILE, LARGEST_FUNCTION = 350, 60  # lines, the limits of this project
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One file: its name as Python imports it, where it is, and what it says."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str:
        """The folder, as Python imports it."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0] or self.name


def modules(root: Path) -> dict[str, Module]:
    """Every Python module below `root`, by name; the two linked folders once, under cor_vllm."""
    links = [link for link in (root / "cor_vllm").iterdir() if link.is_symlink()]
    found = {}
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        if any(path.is_relative_to(link) for link in links):
            continue
        parts = path.relative_to(root).with_suffix("").parts
        parts = ("cor_vllm", *parts) if parts[0] in ("kernels", "calibrate") else parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(text), text.count("\n"))
    return found


def imports(module: Module, known: dict[str, Module]) -> set[str]:
    """The modules of this project that a module imports."""
    names: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports the module; `from module import name` the module itself.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(inner & known.keys() or {node.module})
            if inner - known.keys():
                names.add(node.module)
    return {name for name in names if name in known and name != module.name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that all reach each other (strongly connected components of more than one)."""
    reach = {name: _reach(name, graph) for name in graph}
    found: list[list[str]] = []
    seen: set[str] = set()
    for name in sorted(graph):
        if name not in seen:
            circle = sorted(other for other in reach[name] if name in reach[other])
            seen.update(circle)
            if len(circle) > 1:
                found.append(circle)
    return found


def _reach(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def functions(module: Module) -> Iterator[tuple[Function, bool]]:
    """Every function, and whether it is public: no underscore in its name or around it, not in a function."""

    def walk(node: ast.AST, public: bool) -> Iterator[tuple[Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, public and not child.name.startswith("_")
                yield from walk(child, False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, public and not child.name.startswith("_"))
            else:
                yield from walk(child, public)

    return walk(module.tree, True)


def mode_names(module: Module) -> int:
    """How often the code of a module spells the name of a routing mode as a string."""
    return sum(isinstance(node, ast.Constant) and node.value in MODES for node in ast.walk(module.tree))


def report(root: Path) -> str:
    """The measurements as Markdown."""
    known = modules(root)
    graph = {name: imports(module, known) for name, module in known.items()}
    product = {name: m for name, m in known.items() if name.split(".")[0] in PRODUCT}
    arrows = {(known[name].room, known[other].room) for name in product for other in graph[name]} - {
        (room, room) for room in {m.room for m in known.values()}
    }
    found = [(m, f, public) for m in known.values() for f, public in functions(m)]
    sizes = sorted((_size(f), m.name, f.name) for m, f, _ in found)
    lines = sorted((m.lines, m.name) for m in known.values())
    shown = [f for m, f, public in found if public and m.name in product]
    documented = sum(ast.get_docstring(f) is not None for f in shown)
    touched = {name: n for name, m in product.items() if (n := mode_names(m))}
    round_trips = circles(graph)
    rows = [
        ("modules of the product, rooms", f"{len(product)}, {len({m.room for m in product.values()})}"),
        ("arrows between rooms of the product", str(len(arrows))),
        ("import circles", str(len(round_trips))),
        ("largest file, lines", "{} ({})".format(*lines[-1])),
        (f"files above {LARGEST_FILE} lines", str(sum(n > LARGEST_FILE for n, _ in lines))),
        ("largest function, lines", "{} ({}.{})".format(*sizes[-1])),
        (f"functions above {LARGEST_FUNCTION} lines", str(sum(n > LARGEST_FUNCTION for n, *_ in sizes))),
        ("public functions with a docstring", f"{documented / len(shown):.1%} of {len(shown)}"),
        ("files, places that spell a mode's name", f"{len(touched)}, {sum(touched.values())}"),
    ]
    parts = ["| what | measured |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)]
    parts += ["", "Modes are spelled in: " + ", ".join(f"{name} ({n})" for name, n in touched.items())]
    parts += [f"Circle: {' ↔ '.join(circle)}" for circle in round_trips]
    return "\n".join(parts)


def _size(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


if __name__ == "__main__":
    print(report(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])))
