"""Runs of the command line over packed weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

import kill_cases  # noqa: E402
import tiny_gguf  # noqa: E402
from cli_runs import assert_same_bits, finetune, one_line, record  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from same_bits import assert_same_tensors  # noqa: E402
from tiny_text import choice_lines, make_checkpoint, write_jsonl  # noqa: E402

from distzo2 import from_pretrained, runtime_of  # noqa: E402
from distzo2.checkpoint.writing import DISK_SLACK_BYTES  # noqa: E402
from distzo2.cli.main import main  # noqa: E402
from distzo2.record.journal import read_journal  # noqa: E402
from distzo2.record.line import decode_line, encode_line  # noqa: E402
from distzo2.run import preflight  # noqa: E402
from distzo2.run.options import EvalOptions  # noqa: E402
from distzo2.run.preflight import placed  # noqa: E402

LORA = ["--peft=lora", "--lora-targets=q_proj,v_proj", "--lr=1e-2", "--eps=1e-2", "--no-signal"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A GGUF file with its tokenizer, and data."""
    root = tmp_path_factory.mktemp("packed runs")
    model = tiny_gguf.make_model("llama", num_hidden_layers=3)
    return SimpleNamespace(
        model=tiny_gguf.write(root / "model.Q4_1.gguf", "llama", model, "Q4_1", quantized=True),
        train=write_jsonl(root / "train.jsonl", choice_lines(20)),
        eval=write_jsonl(root / "eval.jsonl", choice_lines(6)),
    )


def whole_and_cut(packed: SimpleNamespace, root: Path, *options: str) -> None:
    """Two runs of 8 steps; the second, on a disk, is killed and resumed."""
    options = (*options, "--no-signal", "--steps=8", f"--weights-dir={root}")
    assert finetune(packed, "--out=whole", *options) == 0
    arguments = ["finetune", f"--model={packed.model}", f"--train={packed.train}", "--out=cut", "--batch-size=4",
                 "--quiet", "--weights=disk", *options]  # fmt: skip
    ended = kill_cases.run(root, arguments, 0.02, lambda: Path("cut/journal.jsonl").exists())
    if ended.killed:  # the machine may be fast
        ended = kill_cases.run(root, ["finetune", "--resume", "--out=cut", "--quiet"])
    assert ended.status == 0, ended.text


@pytest.mark.usefixtures("own_directory")
def test_an_adapter_over_a_gguf_file_ends_with_the_same_bits_after_a_kill(packed, tmp_path: Path, capsys) -> None:
    whole_and_cut(packed, tmp_path, *LORA)
    assert_same_tensors(*(load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("whole", "cut")))
    header = read_journal("whole/journal.jsonl").header
    assert set(header["stored_formats"].values()) == {"Q4_1"}
    assert all(file["part"] == "samples" for name, file in header["base"]["files"].items() if name.endswith(".gguf"))
    assert main(["replay", "whole", "--to-step=8", "-o", "again", "--quiet"]) == 0
    assert_same_tensors(
        load_file("again/adapter_model.safetensors"), load_file("whole/adapter/adapter_model.safetensors")
    )
    assert main(["eval", f"--model={packed.model}", f"--eval={packed.eval}", "--adapter=whole/adapter"]) == 0
    capsys.readouterr()
    assert main(["replay", "whole", "--merge", "-o", "merged", "--quiet"]) == 1
    assert "an adapter is not merged into packed weights (Q4_1)" in one_line(capsys)


@pytest.mark.usefixtures("own_directory")
def test_gains_over_a_gguf_file_end_with_the_same_weights_after_a_kill(packed, tmp_path: Path) -> None:
    whole_and_cut(packed, tmp_path, "--tune=gain", "--estimator=fzoo", "--probes=3", "--lr=3e-2")
    assert_same_bits("whole/checkpoint", "cut/checkpoint")
    assert set(read_journal("whole/journal.jsonl").header["stored_formats"].values()) == {"Q4_1", "Q4_1 with gains"}
    assert main(["replay", "whole", "-o", "again", "--quiet"]) == 0
    assert main(["replay", "whole", "--to-step=0", "-o", "first", "--quiet"]) == 0
    assert_same_bits("again", "whole/checkpoint")
    before, after = (load_file(f"{name}/model.safetensors") for name in ("first", "again"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    assert main(["eval", "--model=again", f"--eval={packed.eval}"]) == 0


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("trained", [["--peft=prefix"], ["--tune=gain"], ["--train-only=*norm*"]])
def test_signal_perturbs_what_a_run_trains(packed, trained: list[str], capsys) -> None:
    """Its differences are those of the run's first step."""
    same = [*trained, "--batch-size=4", "--probes=2"]
    assert finetune(packed, *same, "--steps=1", "--eps=1e-2", "--lr=1e-3", "--no-signal", "--save=none") == 0
    (entry,) = read_journal("out/journal.jsonl").entries
    plus, minus = np.mean(entry.losses, -1).reshape(2, 2).T
    capsys.readouterr()
    files = [f"--model={packed.model}", f"--train={packed.train}"]
    assert main(["signal", *files, *same, "--eps=1e-2", "--compute-dtype=stored", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["differences"] == pytest.approx((plus - minus).tolist(), abs=1e-6)
    assert main(["signal", *files, "--eps=1e-2"]) == 2
    assert "its weights are packed (Q4_1)" in one_line(capsys)


@pytest.mark.usefixtures("own_directory")
def test_another_file_in_the_place_of_the_base_is_refused(packed, tmp_path: Path, capsys) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(packed.model.read_bytes())
    own = SimpleNamespace(**vars(packed) | {"model": model})
    assert finetune(own, *LORA) == 0
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out=out", "--steps=6", "--quiet"]) == 1
    assert "base checkpoint" in one_line(capsys)
    shutil.copyfile(packed.model, model)  # the same file at another time
    assert main(["finetune", "--resume", "--out=out", "--steps=6", "--quiet"]) == 0
    first, *rest = Path("out/journal.jsonl").read_bytes().splitlines(keepends=True)
    header = decode_line(first, len(first))
    for key in ("header_bytes", "header_sha256"):  # as earlier journals are
        del header["base"]["files"]["model.gguf"][key]
    Path("out/journal.jsonl").write_bytes(b"".join([encode_line(header, 1 << 20), *rest]))
    assert main(["finetune", "--resume", "--out=out", "--steps=7", "--quiet"]) == 0


@pytest.mark.usefixtures("own_directory")
def test_room_is_asked_for_what_is_made_and_for_decoded_weights(tmp_path: Path, monkeypatch, capsys) -> None:
    """A block file holds what files do not have as it is stored; a checkpoint holds decoded weights."""
    monkeypatch.setattr(preflight, "free_disk_bytes", lambda place: DISK_SLACK_BYTES + (1 << 19))
    data = write_jsonl(tmp_path / "train.jsonl", choice_lines(20))
    model = tiny_gguf.make_model("llama", num_hidden_layers=3)
    for kind, options, reason in (
        ("Q5_0", LORA, "the file of streamed weights"),
        ("Q4_0", LORA, ""),
        ("Q4_0", ["--tune=gain", "--no-signal"], "the checkpoint"),
    ):
        path = tiny_gguf.write(tmp_path / f"{kind}.gguf", "llama", model, kind, quantized=True)
        files = SimpleNamespace(train=data, model=path)
        status = finetune(files, *options, "--weights=disk", "--steps=1", f"--out={kind}{reason}")
        assert status == bool(reason) and reason in capsys.readouterr().err
        if kind == "Q5_0":  # blocks of 22 bytes become 34
            packed = sum(p.numel() for p in model.parameters() if p.dim() > 1)
            assert preflight.model_size(path, None).made == packed // 32 * 34
    size, numel = preflight.model_size(files.model, None), sum(p.numel() for p in model.parameters())
    assert size.made == 0 and 2 * numel <= size.decoded < 2.1 * numel and size.total < 0.6 * numel


@pytest.mark.usefixtures("own_directory")
def test_codes_are_trained_and_replayed(tmp_path: Path) -> None:
    files = SimpleNamespace(
        model=make_checkpoint(tmp_path / "model", layers=3),
        train=write_jsonl(tmp_path / "train.jsonl", choice_lines(20)),
    )
    options = ["--tune=code", "--estimator=fzoo", "--probes=3", "--lr=auto", "--no-signal"]
    assert finetune(files, *options) == 0
    assert record()["options"]["store"] == "affine16"
    rates = {entry.update.groups[0].lr for entry in read_journal("out/journal.jsonl").entries}
    assert rates == {float(np.float32(record()["options"]["lr"]))} and 0 < min(rates) < 1
    assert main(["replay", "out", "-o", "replayed", "--quiet"]) == 0
    assert_same_bits("out/checkpoint", "replayed")


@pytest.mark.parametrize("store", ["affine4", "table4", "affine8", "affine16"])
def test_the_size_of_a_packed_model_is_known_before_it_is_loaded(store: str, tmp_path: Path) -> None:
    """But for padding between tensors. Embeddings, which stay as they are, are most of the bytes here."""
    plain = tiny_gguf.make_model("llama", vocab_size=4096)
    plain.bfloat16().save_pretrained(tmp_path / "model")
    size = placed(EvalOptions(model=str(tmp_path / "model"), eval="e", store=store), "cpu").size
    units = runtime_of(from_pretrained(tmp_path / "model", store=store)).units
    assert size.total == sum(param.num_bytes for unit in units for param in unit.params)
    assert 0 <= sum(unit.num_bytes for unit in units) - size.total < 256 * sum(len(unit.params) for unit in units)


@pytest.mark.usefixtures("own_directory")
def test_codes_that_are_clamped_are_told_of_once_when_they_are(tmp_path: Path, capsys) -> None:
    files = SimpleNamespace(
        model=make_checkpoint(tmp_path / "model"),
        train=write_jsonl(tmp_path / "train.jsonl", choice_lines(20)),
        eval=write_jsonl(tmp_path / "eval.jsonl", choice_lines(6)),
    )
    options = ["--store=affine8", "--steps=6", f"--eval={files.eval}", "--eval-every=3", "--save=none", "--no-signal"]
    assert finetune(files, *options, "--lr=3e-6") == 0
    assert "warning" not in capsys.readouterr().out
    assert finetune(files, *options, "--lr=1e3", "--out=far", "--weights=disk", f"--weights-dir={tmp_path}") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line or "held-out" in line]
    assert re.fullmatch(r"warning: step 1: \d+\.\d% of the codes are at an end of their range, .*", lines[1])
    assert [line.startswith("warning") for line in lines] == [False, True, False, False]


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), r"its weights are packed \(Q4_1\), and cannot be updated as they are: --peft lora"),
        (("--store=affine4",), "codes of 4 bits are not trained"),
        ((*LORA, "--merge"), r"--merge: an adapter is not merged into packed weights \(Q4_1\)"),
        (("--tune=code",), r"its weights are packed already \(Q4_1\): leave --store"),
        (("--tune=gain", "--peft=lora"), "--tune gain: with --peft an adapter is trained"),
        (("--tune=gain", "--train-only=last:1"), "--train-only: with --tune gain the gains of all blocks"),
        (("--tune=full", "--store=affine8"), "--tune full: --store affine8 trains codes"),
        (("--lr=auto",), "--lr auto: its rule is for --estimator fzoo"),
    ],
)
def test_what_packed_weights_cannot_do_is_refused_by_name(packed, options, reason: str, capsys) -> None:
    try:
        status = finetune(packed, *options)
    except SystemExit as error:
        status = error.code
    assert status
    text = capsys.readouterr().err
    assert re.search(reason, text), text
    assert not Path("out").exists()
