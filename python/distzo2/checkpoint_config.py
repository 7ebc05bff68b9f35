"""What a checkpoint's config.json may not ask for, since it may come from anyone.

transformers makes of it what it says: modules by the number of layers, code by the names in it. So before a
configuration is handed over, it is looked at as data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distzo2.safetensors_io import CheckpointError, brief

MAX_JSON_BYTES = 16 << 20  # of a file of settings; an index of tensors may have as much for each GiB of them
MAX_COUNT = 1 << 16  # layers, experts
FEW = 256  # of them, whatever the checkpoint holds
# Modules are made one by one for these; widths are only numbers in a shape on the meta device.
_COUNTS = re.compile(r"(^|_)(layers?|blocks?|experts|depths?|stages)$|^(num|n)_.*(layers?|blocks?|experts)")
_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The JSON in a file of at most `max_bytes`.

    Raises:
        CheckpointError: it is longer, or not JSON.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path}: at most {max_bytes} bytes were expected, got {os.path.getsize(path)}")
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON: {' '.join(str(error).split())[:200]}") from None


def check_config_file(path: Path, num_tensors: int = MAX_COUNT) -> None:
    """Looks at a config.json before transformers does. `num_tensors`: of the checkpoint, where that is known: a layer
    has some of its own.

    Raises:
        CheckpointError: it is too long, no JSON object, asks for code that is not there, or for a model of more parts
            than any has.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    most = min(MAX_COUNT, max(FEW, num_tensors))
    for key, value in _members(config):
        if key in _CODE and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{path}: {key} names code from elsewhere, {value[:80]!r}, which is not run")
        if isinstance(value, int) and value > most and _COUNTS.search(key):
            raise CheckpointError(f"{path}: {key} is {brief(value)}, at most {most} were expected")


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            for key, child in value.items():
                if isinstance(child, (dict, list)):
                    todo.append(child)
                if isinstance(child, list):
                    yield from ((key, item) for item in child if not isinstance(item, (dict, list)))
                else:
                    yield key, child
        elif isinstance(value, list):
            todo += [child for child in value if isinstance(child, (dict, list))]
