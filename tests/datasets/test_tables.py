"""Splits of published data sets, found by name in each form in which they are saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from published import rows, write_split, write_task

from distzo2.datasets.tables import read_split
from distzo2.errors import DataError, DistZO2Error

FORMS = ["jsonl", "tsv", "parquet", "arrow"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", ["", "sst2"])
def test_rows_of_a_split(form: str, nested: str, tmp_path: Path) -> None:
    write_task(tmp_path / nested, "sst2", form)
    if nested:
        write_task(tmp_path / "rte", "rte", form)
    if form == "arrow":
        (tmp_path / nested / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
        (tmp_path / nested / "train/cache-0123.arrow").write_bytes(b"of a map")
    for split, wanted in (("train", rows("sst2", 12)), ("validation", rows("sst2", 18)[12:])):
        found = read_split(tmp_path, split, ["sentence", "label"], "sst2")
        assert found.num_rows == len(wanted)
        for record, i in zip(found.rows([4, 0, 5]), (4, 0, 5), strict=True):
            assert (record["sentence"], int(record["label"])) == (wanted[i]["sentence"], wanted[i]["label"])


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("task", ["boolq", "record", "squad", "drop", "multirc"])
def test_lists_and_structures(task: str, form: str, tmp_path: Path) -> None:
    write_split(tmp_path, "train", rows(task, 5), form)
    fields = list(rows(task, 1)[0])
    assert read_split(tmp_path, "train", fields).rows(range(5)) == rows(task, 5)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train.json", "dev.json"], "validation"),
        (["val.jsonl", "train.jsonl"], "validation"),
        (["valid/data.jsonl"], "validation"),
        (["data/train-00000-of-00001.jsonl", "pretraining.jsonl", ".cache/train.jsonl", "dataset_infos.json"], "train"),
        (["glue-train.jsonl", "glue-test.jsonl"], "train"),
    ],
)
def test_names_of_splits(names: list[str], split: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('\n{"a": 1}\n')
    assert read_split(tmp_path, split, ["a"]).num_rows == 1


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(reason: str, split: str = "train", fields=("sentence", "label"), error=DataError) -> None:
        with pytest.raises(error, match=reason):
            found = read_split(tmp_path, split, fields)
            found.rows(range(found.num_rows))

    refused("no split 'train' .a file or a directory of that name.; there are no parquet, JSONL, arrow or TSV file")
    write_split(tmp_path, "train", rows("rte", 3))
    refused("no split 'validation' .*; there are train.jsonl", "validation")
    refused("train.jsonl: no field 'sentence'; there are premise, hypothesis, idx, label")
    write_split(tmp_path, "train", rows("rte", 3), "tsv")
    refused(r"more than one split 'train' \(train.jsonl, train.tsv\): give the directory of one")
    (tmp_path / "train.tsv").rename(tmp_path / "train_small.jsonl")
    refused(r"more than one split 'train' \(train.jsonl, train_small.jsonl\)")
    (tmp_path / "train_small.jsonl").rename(tmp_path / "train-00000-of-00002.jsonl")
    (tmp_path / "train.jsonl").unlink()
    refused("split 'train' has 2 files, and 1 are there: train-00000-of-00002.jsonl")
    (tmp_path / "train-00000-of-00002.jsonl").unlink()
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na\t1\tx\n")
    refused("train.tsv:2: a line of 2 cells, as its header has, was expected")
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n")
    refused("train.tsv: holds no rows")
    (tmp_path / "train.tsv").unlink()
    (tmp_path / "train.jsonl").write_text(json.dumps(rows("sst2", 1)[0]) + "\n{\n")
    refused("train.jsonl:2: a JSON object was expected: EOF")
    (tmp_path / "train.jsonl").write_text("[1]\n")
    refused("train.jsonl:1: a JSON object was expected")
    (tmp_path / "train.jsonl").rename(tmp_path / "train.parquet")
    refused("train.parquet: cannot be read: ")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("parquet files need pyarrow: pip install --no-build-isolation '.*hf.*'", error=DistZO2Error)
    with pytest.raises(DataError, match="a directory with the files of a data set was expected"):
        read_split(tmp_path / "no", "train", ["a"])
