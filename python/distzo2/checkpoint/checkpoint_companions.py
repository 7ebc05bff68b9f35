"""What goes with a model's weights and is copied as it is: tokenizers, processors, chat templates, licences.

A checkpoint may come from anyone. So a link is followed to a file of the checkpoint itself only, or to one of its own
cache of Hugging Face's, and no more is copied than such files have. What is left out is told: no weight needs it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*chat_template*",
    "*processor_config.json",
    "LICENSE*",
)
MAX_BYTES = 256 << 20  # of all of them, or as many as the weights have

logger = logging.getLogger(__name__)


def copy_companions(source: Path, out: Path, num_weight_bytes: int) -> None:
    """Copies what goes with the checkpoint in `source` into the directory `out`.

    Raises:
        OSError: a file cannot be read or written.
    """
    room = max(MAX_BYTES, num_weight_bytes)
    for path in _companions(source):
        name = path.relative_to(source)
        if not is_own_file(path, source):
            logger.warning("%s: left out: not a file of this checkpoint's own", path)
            continue
        num_bytes = path.stat().st_size
        if num_bytes > room:
            logger.warning("%s: left out: %d bytes, with at most %d to be copied", path, num_bytes, room)
            continue
        room -= num_bytes
        if not (out / name).parent.is_dir():
            (out / name).parent.mkdir(parents=True)
        copy_file(path, out / name)


def copy_file(path: Path, out: Path) -> None:
    """Copies bytes; a call that fails is an error, where shutil.copyfile may try another way."""
    with open(path, "rb") as source, open(out, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def is_own_file(path: Path, source: Path) -> bool:
    """Whether `path`, below the directory `source`, is a regular file there, or a link to one there or among the blobs
    of the cache that `source` is a snapshot of."""
    try:
        target, directory = path.resolve(strict=True), source.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return False
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parent.parent / "blobs")
    return target.is_file() and any(target.is_relative_to(home) for home in homes)


def _companions(source: Path) -> Iterator[Path]:
    """The files, and links, that match; of a directory those below it that are no links."""
    for path in sorted({path for pattern in PATTERNS for path in source.glob(pattern)}):
        if path.is_symlink() or not path.is_dir():
            yield path
            continue
        for directory, _, names in os.walk(path):
            files = (Path(directory) / name for name in sorted(names))
            yield from (file for file in files if not file.is_symlink() and file.is_file())
