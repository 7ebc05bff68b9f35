"""The rooms of the package: imports point down and in no circle, a room has few modules, a file is short."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOMS = (
    "cli",
    "integrations",
    "planning",
    "run",
    "datasets",
    "tasks",
    "rewards",
    "generation",
    "peft",
    "models",
    "formats",
    "checkpoint",
    "optim",
    "estimators",
    "streaming",
    "parallel",
    "record",
    "weights",
    "",
)
PACKAGE = Path(__file__).parents[1] / "python/distzo2"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROOM_OF = {name: str(path.parent.relative_to(PACKAGE)).removeprefix(".") for name, path in FILES.items()}


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{FILES[name]}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {each if each in FILES else each.rpartition(".")[0] for each in found} & FILES.keys()


IMPORTS = {name: imports_of(name) for name in FILES if name not in ("distzo2", "distzo2.__main__")}


def test_imports_point_down_the_list_of_rooms():
    unknown = sorted(set(ROOM_OF.values()) - set(ROOMS))
    depth = {name: (*unknown, *ROOMS).index(room) for name, room in ROOM_OF.items()}
    pairs = [(name, other) for name in IMPORTS for other in sorted(IMPORTS[name] - {"distzo2"})]
    up = [f"{name} imports {other}" for name, other in pairs if depth[other] < depth[name]]
    assert not unknown + up, "\n".join([f"unknown rooms: {unknown}", *up])


def test_nothing_inside_imports_the_face():
    names = [name for name in IMPORTS if "distzo2" in IMPORTS[name]]
    assert not names, "\n".join(names)


def test_no_circle():
    reached = {name: IMPORTS[name] - {"distzo2"} for name in IMPORTS}
    for middle in IMPORTS:  # Warshall's algorithm
        for name in IMPORTS:
            reached[name] = reached[name] | (reached[middle] if middle in reached[name] else set())
    circles = {tuple(sorted(n for n in reached[name] if name in reached[n])) for name in IMPORTS} - {()}
    assert not circles, "\n".join(map(str, sorted(circles)))


def test_at_most_eight_modules_a_room():
    rooms = [ROOM_OF[name] for name in IMPORTS if name != f"distzo2.{ROOM_OF[name]}"]
    large = {room: rooms.count(room) for room in ROOMS if rooms.count(room) > 8}
    assert not large, str(large)


def test_at_most_600_lines_a_file():
    lines = {name: path.read_text().count("\n") for name, path in FILES.items()}
    long = {name: number for name, number in lines.items() if number > 600}
    assert not long, str(long)


def test_all_rooms_are_installed():
    settings = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {f"distzo2.{room}".strip(".") for room in ROOMS} <= {*settings["packages"]}
