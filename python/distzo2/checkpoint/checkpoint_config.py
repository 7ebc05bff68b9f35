"""What a checkpoint's config.json may not ask for, since it may come from anyone.

transformers makes of it what it says: modules by the number of layers, code by the names in it. So before a
configuration is handed over, it is looked at as data.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distzo2.checkpoint.weight_files import CheckpointError, brief

MAX_JSON_BYTES = 16 << 20  # of a file of settings; an index of tensors may have as much for each GiB of them
MAX_COUNT = 1 << 16  # layers, experts, labels
FEW = 256  # of any of them, whatever the checkpoint holds
# Parts are made one by one for a number, in lists or as modules, and a number is free only where its name says that it
# is a width, an identity or the like, which makes a shape no more than another shape.
_PARTS = re.compile(r"(^|_)(layers?|blocks?|depths?|stages|repeats?)$|^(num|n)_.*(layers?|blocks?)")
_EXPERTS = re.compile(r"(^|_)experts$|^(num|n)_.*experts?")  # often one parameter for all of them
_LABELS = re.compile(r"^_?num_(labels|classes)$")
_FREE = re.compile(
    r"""(^|[_.])(
    d|dff|\w*dims?|\w*dimensions?|\w*sizes?|width|height|n_inner|units|proj|rank|lowrank|channels?|inplanes|filters
    |features?|embds?|embeds?|emb|embeddings|latents|vocab|vocabulary|codes|codevectors|centroids|clusters|bins
    |positions?|pos|ids?|index|tokens?|length|len|seq|ctx|context|window|extent|chunk|chunksize|distance|radius|offset
    |theta|base|temperature|scale|scaling|factor|period|frequency|freqs?|rate|timescale|alpha|limits?|floor|clipping
    |logit_softcapping|value|val|image|vision|resolutions?|patch|patches|pinpoints|points|keypoints|pixels|hop|strides?
    |kernel|shape|frames|rows|columns|queries|query|proposals|objects|prompts|speakers|spkrs|langs|languages|registers
    |negatives|samples?|labels|buckets?|hash|hashes|groups|ngram|topk|top_k|nms_topk_test|nms_topk_train|local_attention
    |start|end|seed|steps?|epochs?|batch|expand|landmarks|compressed_attention|block_configs|stage_configs|context|budget
    |label2id|language|max_depth|capacity|multiple_of|divisor|softcap|dilations?
    )(_|$)""",
    re.VERBOSE | re.IGNORECASE,
)
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
        CheckpointError: it is too long, no JSON object, asks for code that is not there, or for more of something that
            is not known to be a width than any model of so many tensors has.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    for key, value in _members(config):
        if key in _CODE and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{path}: {key} names code from elsewhere, {value[:80]!r}, which is not run")
    for key, value in _members(config, _names_read(config)):
        most = most_of(key, num_tensors)
        if isinstance(value, int) and most is not None and value > most:
            raise CheckpointError(f"{path}: {key[:80]} is {brief(value)}, at most {most} were expected")


def _names_read(config: dict[str, Any]) -> set[str] | None:
    """The names that transformers' own configurations of these types have; None if one of them is not known. Any other
    is a note of the checkpoint's author, which no model reads."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    names = set(inspect.signature(PreTrainedConfig.__init__).parameters)
    types = {value for key, value in _members(config) if key == "model_type" and isinstance(value, str)}
    for model_type in types:
        try:
            kind = CONFIG_MAPPING[model_type]
            default = kind().to_dict()
        except Exception:  # no type of this transformers', or one that needs arguments
            return None
        names |= {key for key, _ in _members(default)} | set(default) | set(kind.attribute_map)
        names |= set(inspect.signature(kind.__init__).parameters)
    return names if types else None


def most_of(key: str, num_tensors: int = MAX_COUNT) -> int | None:
    """How large a whole number may be that a configuration has under this name; None for any."""
    if _LABELS.search(key) or _EXPERTS.search(key):
        return MAX_COUNT
    if _PARTS.search(key) or not _FREE.search(key):
        return min(MAX_COUNT, max(FEW, num_tensors))
    return None


def _members(value: Any, known: set[str] | None = None) -> Iterator[tuple[str, Any]]:
    """All values that hold no others, each with the name that it or the list around it has. With `known`, of what a
    configuration has under other names only those that sound like a number of parts."""
    todo = [("", value, known is not None, False)]
    while todo:
        key, value, is_config, is_note = todo.pop()
        if isinstance(value, dict):
            is_config |= known is not None and "model_type" in value
            for name, child in value.items():
                # A number as a name says nothing, and labels are anyone's words.
                inner = key if key == "label2id" or str(name).isdigit() else str(name)
                todo.append((inner, child, False, is_note or (is_config and name not in known)))
        elif isinstance(value, list):
            todo += [(key, child, False, is_note) for child in value]
        elif not is_note or any(pattern.search(key) for pattern in (_PARTS, _EXPERTS, _LABELS)):
            yield key, value
