"""The files of a published data set: a split is found by name in a directory, and rows of it are read.

Read are parquet, JSONL, arrow as `datasets` saves it (`save_to_disk`, or its cache), and TSV with a header and without
quotes, as GLUE's. Parquet and arrow need pyarrow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from distzo2.errors import DataError, DistZO2Error, refusing
from distzo2.version import INSTALL_HF

_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "JSONL", ".json": "JSONL", ".tsv": "TSV"}
_SAME = {"validation": {"validation", "valid", "val", "dev"}}  # names of one split
_NOT_DATA = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


@dataclass(frozen=True)
class Split:
    """The rows of a split, read when they are asked for."""

    source: str  # file or files, for errors
    num_rows: int
    rows: Callable[[Sequence[int]], list[dict[str, Any]]]


def read_split(directory: str | os.PathLike, split: str, fields: Sequence[str], config: str | None = None) -> Split:
    """Finds a split in a directory, and checks that it has `fields`.

    Args:
        directory: of the data set; its files, or directories in it, are named after splits.
        split: such as "train" or "validation"; for the second "valid", "val" and "dev" stand too.
        fields: that a row must have.
        config: of several configurations in the directory the one to read.

    Raises:
        DataError: there is no such split, or more than one; a file cannot be read; a field is missing.
        DistZO2Error: pyarrow is missing.
    """
    files = _files_of(Path(directory), split, config)
    read = _arrow if files[0].suffix in (".parquet", ".arrow") else _text
    columns, num_rows, rows = read(files, fields)
    source = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if missing := [name for name in fields if name not in columns]:
        raise DataError(f"{source}: no field {missing[0]!r}; there are {', '.join(columns)}")
    if not num_rows:
        raise DataError(f"{source}: holds no rows")
    return Split(source, num_rows, rows)


def _files_of(directory: Path, split: str, config: str | None) -> list[Path]:
    if not directory.is_dir():
        raise DataError(f"{directory}: a directory with the files of a data set was expected")
    data = [p.relative_to(directory) for p in sorted(directory.rglob("*")) if p.suffix in _SUFFIXES]
    data = [p for p in data if p.name not in _NOT_DATA and not any(part[0] == "." for part in p.parts)]
    data = [p for p in data if not p.name.startswith("cache-")]  # what `datasets` computed of a split
    names = _SAME.get(split, {split})
    found = [p for p in data if names & {*p.parts[:-1], *re.split(r"[-_.]", p.stem), p.stem}]
    found = [p for p in found if config in p.parts[:-1]] or found
    if not found:
        held = ", ".join(map(str, data[:6])) or "no parquet, JSONL, arrow or TSV file"
        raise DataError(f"{directory}: no split {split!r} (a file or a directory of that name); there are {held}")
    # The parts of a split differ in their numbers alone: train.jsonl beside train_small.jsonl are two.
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in found:
        groups.setdefault((path.parent, re.sub(r"\d+", "#", path.name)), []).append(path)
    if len(groups) > 1:
        several = ", ".join(str(paths[0]) for paths in groups.values())
        raise DataError(f"{directory}: more than one split {split!r} ({several}): give the directory of one")
    parts = re.search(r"-\d{5}-of-(\d{5})", found[0].name)
    if parts and int(parts[1]) != len(found):
        raise DataError(
            f"{directory}: split {split!r} has {int(parts[1])} files, and {len(found)} are there: {found[0]}"
        )
    return [directory / path for path in found]


def _arrow(files: list[Path], fields: Sequence[str]) -> tuple[list[str], int, Callable]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DistZO2Error(f"{files[0]}: {files[0].suffix[1:]} files need pyarrow: {INSTALL_HF}") from None

    def table(path: Path) -> tuple[list[str], Any]:
        """All columns' names, and those of `fields` that there are."""
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
                names = file.schema_arrow.names
                return names, file.read([name for name in fields if name in names])
        with pyarrow.memory_map(os.fspath(path)) as source:
            try:
                whole = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(source).read_all()
        return whole.column_names, whole.select([name for name in fields if name in whole.column_names])

    with refusing(f"{files[0]}: cannot be read", DataError):  # damaged, or files that do not go together
        tables = [table(path) for path in files]
        whole = pyarrow.concat_tables([each for _, each in tables], promote_options="default")
    return tables[0][0], whole.num_rows, lambda places: whole.take(list(places)).to_pylist()


def _lines(files: list[Path]) -> list[tuple[str, bytes]]:
    """The lines of files that are not blank, and where each stands."""
    try:
        texts = [(path, path.read_bytes().removeprefix(b"\xef\xbb\xbf")) for path in files]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    return [(f"{p}:{i}", line) for p, text in texts for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _text(files: list[Path], fields: Sequence[str]) -> tuple[list[str], int, Callable]:
    lines = _lines(files)
    cells = lambda line: line.decode("utf-8").split("\t")  # noqa: E731
    header = cells(lines.pop(0)[1]) if lines and _SUFFIXES[files[0].suffix] == "TSV" else None
    wanted = "a JSON object" if header is None else f"a line of {len(header)} cells, as its header has,"

    def row(place: int) -> dict[str, Any]:
        where, line = lines[place]
        with refusing(f"{where}: {wanted} was expected", DataError):
            record = from_json(line) if header is None else dict(zip(header, cells(line), strict=True))
        if not isinstance(record, dict):
            raise DataError(f"{where}: {wanted} was expected")
        return record

    names = header if header is not None else list(row(0) if lines else fields)
    return names, len(lines), lambda places: [row(i) for i in places]
