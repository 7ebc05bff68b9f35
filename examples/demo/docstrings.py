"""The demo's data: docstrings of the standard library and of installed packages, read from their sources.

Nobody wrote them for this. Names of libraries are masked out, so that a text must be recognized by what it is about.
Files, not docstrings, are dealt to pre-training, training and held-out: near-copies within a file stay together.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distzo2.errors import DistZO2Error

# Library -> the word that stands for it in the new labelling; the others are only for pre-training.
LABELS = {"networkx": " graph", "sympy": " math", "transformers": " models", "std": " system"}
LIBRARIES = ("matplotlib", "networkx", "numpy", "std", "sympy", "torch", "transformers")

MIN_CHARS = 80
MAX_PER_FILE = 12  # so that no file rules its library
MAX_FILE_BYTES = 60_000  # parsing the largest files takes most of the time, and gives no more than any other
_NAMES = re.compile(
    r"(?i)py(?:torch|plot|thon)|torch\w*|numpy|\bnp\b|transformers?|hugging\s?face|sympy|networkx|\bnx\b|matplotlib|\bplt\b|mpl\w*"
)
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "__pycache__",
}


@dataclass(frozen=True)
class Docstring:
    library: str
    file: str
    text: str


@dataclass(frozen=True)
class Split:
    pretrain: list[Docstring]
    train: list[Docstring]
    held_out: list[Docstring]


def roots() -> dict[str, Path]:
    """Where each library's sources are.

    Raises:
        DistZO2Error: one is not installed.
    """
    import importlib.util

    found = {"std": Path(sysconfig.get_paths()["stdlib"])}
    for library in LIBRARIES:
        if library not in found:
            spec = importlib.util.find_spec(library)
            if spec is None or not spec.submodule_search_locations:
                raise DistZO2Error(f"the demo reads the docstrings of {library}, and it is not installed")
            found[library] = Path(next(iter(spec.submodule_search_locations)))
    return {library: found[library] for library in LIBRARIES}


def docstrings_of(source: bytes) -> Iterator[str]:
    """The docstrings of a module's source, in order; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARS:
                yield text


def mask(text: str) -> str:
    """Without names of libraries, and in one line."""
    return " ".join(_NAMES.sub("it", text).split())


def collect(library: str, root: Path, most: int) -> list[Docstring]:
    """At most about `most` docstrings of a library, file by file in an order that depends on file names only."""
    files = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not _SKIPPED & set(name.parts) and path.stat().st_size <= MAX_FILE_BYTES:
            files.append((hashlib.sha256(name.as_posix().encode()).digest(), name.as_posix(), path))
    found: list[Docstring] = []
    seen: set[str] = set()
    for _, name, path in sorted(files):
        in_file = 0
        for text in docstrings_of(path.read_bytes()):
            text = mask(text)
            if text in seen or in_file == MAX_PER_FILE:
                continue
            seen.add(text)
            found.append(Docstring(library, name, text))
            in_file += 1
        if len(found) >= most:
            break
    return found


def split(docstrings: list[Docstring], num_train: int, num_held_out: int) -> Split:
    """Deals a library's files: first to held-out, then to training, the rest to pre-training."""
    pretrain: list[Docstring] = []
    train: list[Docstring] = []
    held_out: list[Docstring] = []
    by_file: dict[str, list[Docstring]] = {}
    for docstring in docstrings:
        by_file.setdefault(docstring.file, []).append(docstring)
    for group in by_file.values():
        if docstrings[0].library not in LABELS:
            pretrain += group
        elif len(held_out) < num_held_out:
            held_out += group
        elif len(train) < num_train:
            train += group
        else:
            pretrain += group
    return Split(pretrain, train[:num_train], held_out[:num_held_out])
