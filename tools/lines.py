"""Lines of both packages by room, import circles, and files that ask for the device.

::

    python -m tools.lines
    python -m tools.lines --against v0.1.0

With ``--against`` each number stands behind that of another revision: ``before -> now``.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("converters", "mlxrun")
#: What a reader of the runtime reads, by its folders and files; the latter half until 0.1.0.
CORE: Final = (
    *("llm.py", "engine", "sampling", "models", "kv_cache", "weights"),
    *("generation", "cache", "loading", "model.py", "sessions.py", "asking.py", "admission.py"),
    *("engine.py", "batch.py", "choices.py", "computing.py", "identity.py"),
)
#: Questions for the device, which only ``mlxrun/kernels`` may ask.
DEVICE: Final = re.compile(
    r"\b(default_device|on_cpu|is_available|mx\.[cg]pu)\b|\bis (not )?[CG]PU\b"
)
_DOCUMENTED: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NO_CODE: Final = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Count:
    """Of one file or of several.

    Attributes:
        code: lines with code, without docstrings, comments and blank lines.
        docstrings: lines of docstrings.
    """

    files: int = 0
    total: int = 0
    code: int = 0
    docstrings: int = 0
    functions: int = 0
    classes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    @property
    def numbers(self) -> list[int]:
        return [getattr(self, field.name) for field in fields(self)]


def count(source: str) -> Count:
    """Of a file's text."""
    nodes = list(ast.walk(ast.parse(source)))
    documented = [node for node in nodes if isinstance(node, _DOCUMENTED) and _docstring(node)]
    docs = {
        line
        for node in documented
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return Count(
        1,
        source.count("\n"),
        len(code - docs),
        len(docs),
        sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes),
        sum(isinstance(node, ast.ClassDef) for node in nodes),
    )


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def module_name(path: str) -> str:
    """``mlxrun/cli/main.py`` to ``mlxrun.cli.main``."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, *, within: Collection[str]) -> set[str]:
    """Modules among ``within`` that a file imports, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                found.add(member if member in within else str(node.module))
    return found & set(within)


def circles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Sets of modules each of which imports all others, by way of others or directly."""
    reached = {name: _reach(graph, name) for name in graph}
    found: list[set[str]] = []
    for name, names in reached.items():
        if name in names and not any(name in circle for circle in found):
            found.append({other for other in names if name in reached[other]})
    return found


def _reach(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    reached: set[str] = set()
    pending = list(graph[start])
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += graph[name]
    return reached


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which modules each module of some files imports.

    A package that hands out names of its modules when they are first used (``mlxrun``) is left out.
    """
    modules = {module_name(path): source for path, source in sources.items()}
    modules = {name: source for name, source in modules.items() if name not in PACKAGES}
    return {name: imports(source, within=modules) - {name} for name, source in modules.items()}


def read_tree() -> dict[str, str]:
    """Path to text of all Python files of both packages."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def read_revision(revision: str) -> dict[str, str]:
    """As :func:`read_tree`, of a commit."""
    listed = _git("ls-tree", "-r", "--name-only", revision, *PACKAGES).splitlines()
    return {path: _git("show", f"{revision}:{path}") for path in listed if path.endswith(".py")}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
    )
    return done.stdout


def report(sources: Mapping[str, str]) -> dict[str, list[int]]:
    """Rows of the table: a room's or a sum's numbers."""
    rooms: dict[str, Count] = {}
    total = core = Count()
    for path, source in sources.items():
        here, room = count(source), str(PurePosixPath(path).parent)
        rooms[room] = rooms.get(room, Count()) + here
        total += here
        package, member, *_ = PurePosixPath(path).parts
        if package == "mlxrun" and member in CORE:
            core += here
    found = circles(import_graph(sources))
    return {
        **{room: each.numbers for room, each in sorted(rooms.items())},
        "both packages": total.numbers,
        "the core": core.numbers,
        "import circles": [len(found)],
        "modules in circles": [sum(map(len, found))],
        "files with device checks": [
            sum(bool(DEVICE.search(source)) for source in outside_kernels(sources).values())
        ],
    }


def outside_kernels(sources: Mapping[str, str]) -> dict[str, str]:
    """Files that may not ask for the device."""
    return {
        path: source for path, source in sources.items() if not path.startswith("mlxrun/kernels/")
    }


def table(now: Mapping[str, list[int]], before: Mapping[str, list[int]] | None) -> Iterator[str]:
    """Lines to print."""
    heads = [field.name for field in fields(Count)]
    names = sorted({*now, *(before or {})}, key=lambda name: (_rank(name, now), name))
    width = max(map(len, names))
    column = 9 if before is None else 18
    yield " ".join([f"{'room':{width}}", *(f"{head:>{column}}" for head in heads)])
    for name in names:
        new = now.get(name, [0] * len(heads))
        old = (before or {}).get(name, [0] * len(new))
        cells = [
            f"{n:,}" if before is None else f"{o:,} -> {n:,}" for o, n in zip(old, new, strict=True)
        ]
        yield " ".join([f"{name:{width}}", *(f"{cell:>{column}}" for cell in cells)])


def _rank(name: str, now: Mapping[str, list[int]]) -> int:
    """Rooms come first, by name; then the sums, as they are made."""
    return 0 if name.startswith(PACKAGES) else list(now).index(name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.lines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--against", metavar="REV", help="another revision, to compare with")
    parser.add_argument("--at", metavar="REV", help="a revision instead of the working tree")
    chosen = parser.parse_args(arguments)
    sources = read_revision(chosen.at) if chosen.at else read_tree()
    before = report(read_revision(chosen.against)) if chosen.against else None
    for line in table(report(sources), before):
        print(line.rstrip())


if __name__ == "__main__":
    main()
