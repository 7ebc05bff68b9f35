"""A few rows of each published data set, written for the tests in its schema, and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["cat", "dog", "graph", "film", "matrix", "mat", "home", "user"]


def _rows(i: int) -> dict[str, dict[str, Any]]:
    word, other = WORDS[i % 8], WORDS[(i + 3) % 8]
    pair = {"premise": f"The {word} sat on the {other}.", "hypothesis": f"the {word} sat", "idx": i}
    return {
        "sst2": {"sentence": f"a {word} is {'good' if i % 2 else 'bad'} ", "label": i % 2, "idx": i},
        "rte": pair | {"label": i % 2},
        "cb": pair | {"label": i % 3},
        "boolq": {"question": f"is the {word} good", "answer": i % 2 == 0, "passage": f"The {word} is far away."},
        "wsc": {
            "text": f"The {word} ran from the {other} and It was far.", "span1_index": 1, "span2_index": 7,
            "span1_text": word, "span2_text": "It", "idx": i, "label": i % 2,
        },
        "wic": {
            "word": word, "sentence1": f"a {word} ran", "sentence2": f"the {word} sat", "start1": 2, "start2": 4,
            "end1": 5, "end2": 7, "idx": i, "label": i % 2,
        },
        "multirc": {
            "paragraph": f"The {word} sat. The {other} ran.", "question": "Who ran?",
            "answer": word if i % 2 else other, "idx": {"paragraph": i, "question": 0, "answer": 0},
            "label": (i + 1) % 2,
        },
        "copa": {
            "premise": f"The {word} ran away.", "choice1": f"It was bad and the {other} sat on the mat.",
            "choice2": "I sat.", "question": "cause" if i % 2 else "effect", "idx": i, "label": i % 2,
        },
        "record": {
            "passage": f"The {word} sat.\n@highlight\nThe {other} ran far.\n@highlight\nHome is good.",
            "query": f"A film of @placeholder and the {other}", "entities": [word, f"the {other} away", "Home"],
            "entity_spans": {"text": [word], "start": [4], "end": [7]}, "answers": ["Home", word], "idx": {"query": i},
        },
        "squad": {
            "id": str(i), "title": "Film", "context": f"The {word} sat on the {other}.", "question": " Where is it? ",
            "answers": {"text": [f"on the {other}", other], "answer_start": [8, 15]},
        },
        "drop": {
            "section_id": "s", "query_id": str(i), "passage": f"The {word} ran {i} yards.", "question": "How far?",
            "answers_spans": {"spans": [str(i), "yards"], "types": ["number", "span"]},
        },
    }  # fmt: skip


def rows(task: str, count: int) -> list[dict[str, Any]]:
    """Rows of a task's data set in the schema in which it is published."""
    return [_rows(i)[task] for i in range(count)]


def write_split(directory: Path, split: str, records: list[dict[str, Any]], form: str = "jsonl") -> None:
    """Writes a split of a data set.

    Args:
        form: "jsonl", "tsv" (GLUE's), "parquet" (the Hub's, in two files) or "arrow" (`datasets.save_to_disk`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    elif form == "tsv":
        name = {"validation": "dev"}.get(split, split)
        lines = ["\t".join(records[0]), *("\t".join(str(v) for v in r.values()) for r in records)]
        (directory / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    else:
        import datasets

        if form == "arrow":
            datasets.Dataset.from_list(records).save_to_disk(directory / split)
            return
        half = (len(records) + 1) // 2
        for i, part in enumerate((records[:half], records[half:])):
            datasets.Dataset.from_list(part).to_parquet(directory / f"{split}-{i:05}-of-00002.parquet")


def write_task(directory: Path, task: str, form: str = "jsonl", *, train: int = 12, validation: int = 6) -> Path:
    """A directory with the train and validation splits of a task; returns it."""
    write_split(directory, "train", rows(task, train), form)
    write_split(directory, "validation", rows(task, train + validation)[train:], form)
    return directory
