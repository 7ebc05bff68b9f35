"""Replay: base + journal give the live weights to the bit, or a refusal that names the reason."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import make
from replay_cases import NUM_STEPS, SEED, make_llama, make_table, make_updates, named_weights, write_run
from safetensors.torch import load_file, save_file
from same_bits import assert_same_tensors
from transformers import MixtralConfig, MixtralForCausalLM
from zoo import BY_NAME

import distzo2
from distzo2.checkpoint.layout import Piece
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.models import replay as replay_module
from distzo2.models.pretrained import open_checkpoint
from distzo2.models.replay import Steps, _check_map, plan_pieces, replay
from distzo2.record.header import make_header, table_row
from distzo2.record.journal import Journal
from distzo2.record.line import JournalError
from distzo2_core import FAMILIES, Update, update_
from distzo2_core.types import dense_family, matrix_shape


@torch.no_grad()
def train(weights: dict[str, torch.Tensor], table: list[dict[str, Any]], updates: Sequence[Update]) -> None:
    """The plain loop: one `update_` a parameter and step (updates of one term)."""
    for update in updates:
        for row in table:
            if row["group"] is None or not update.terms:
                continue
            (term,) = update.terms
            scalars = update.groups[row["group"]]
            update_(
                weights[row["name"]], scalars.lr, term.c, weight_decay=scalars.weight_decay, seed=SEED, step=term.step,
                param=row["index"], family=term.family,
            )  # fmt: skip


def check_replay(
    directory: Path,
    base: Path,
    weights: dict[str, torch.Tensor],
    frozen: Sequence[str] = (),
    noise: str | None = None,
    **options: Any,
) -> Steps:
    """Replays a run on `base` into `directory / "out"`; `weights` become what they must be."""
    table, updates = make_table(weights, frozen), make_updates()
    if noise is not None:
        for row in table:
            row["noise"] = noise if matrix_shape(row["shape"])[1] else dense_family(noise)
        terms = [tuple(term._replace(family=FAMILIES[noise]) for term in update.terms) for update in updates]
        updates = [update._replace(terms=each) for update, each in zip(updates, terms, strict=True)]
    journal = write_run(directory / "journal.jsonl", base, table, updates)
    train(weights, table, updates)
    report = replay(base, journal, directory / "out", progress=False, **options)
    assert (report.num_steps, report.num_journal_steps, report.torn) == (NUM_STEPS, NUM_STEPS, None)
    return report


@pytest.mark.parametrize(
    ("dtype", "tied", "piece_bytes"),
    [(torch.float32, False, 1 << 20), (torch.bfloat16, True, 1000), (torch.float16, False, 1000)],
)
def test_replay_equals_the_plain_loop(tmp_path: Path, dtype: torch.dtype, tied: bool, piece_bytes: int) -> None:
    base = make_llama(tmp_path / "base", dtype, tied)
    weights = named_weights(base)
    assert ("lm_head.weight" in weights) == (not tied)
    frozen = ("model.layers.0.mlp.up_proj.weight",)
    before = {name: w.clone() for name, w in weights.items()}
    check_replay(tmp_path, base, weights, frozen, piece_bytes=piece_bytes)
    assert_same_tensors(named_weights(tmp_path / "out"), weights)
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == weights.keys() - set(frozen)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_any_step_can_be_made(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", torch.bfloat16)
    weights = named_weights(base)
    table, updates = make_table(weights), make_updates()
    journal = write_run(tmp_path / "journal.jsonl", base, table, updates)
    for step in range(NUM_STEPS + 1):
        replay(base, journal, tmp_path / f"out{step}", to_step=step, progress=False)
        assert_same_tensors(named_weights(tmp_path / f"out{step}"), weights)
        train(weights, table, updates[step : step + 1])
    for step in (-1, NUM_STEPS + 1):
        with pytest.raises(JournalError, match="holds 5 steps"):
            replay(base, journal, tmp_path / "none", to_step=step, progress=False)
    assert not (tmp_path / "none").exists()


def test_several_terms_and_backends(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", torch.bfloat16)
    weights = named_weights(base)
    journal = write_run(tmp_path / "journal.jsonl", base, make_table(weights), make_updates(num_probes=3))
    replay(base, journal, tmp_path / "default", progress=False)
    replay(base, journal, tmp_path / "reference", progress=False, backend="reference", piece_bytes=3000)
    assert_same_tensors(named_weights(tmp_path / "default"), named_weights(tmp_path / "reference"))


def test_a_run_in_another_dtype_than_its_base(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", torch.float32)
    weights = named_weights(base, torch.bfloat16)
    check_replay(tmp_path, base, weights)
    assert_same_tensors(named_weights(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("piece_bytes", "noise"), [(700, None), (700, "normal-r4"), (900, "sign-r1")])
def test_experts_that_the_model_holds_fused(tmp_path: Path, piece_bytes: int, noise: str | None) -> None:
    torch.manual_seed(1)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16,
    )  # fmt: skip
    base = tmp_path / "base"
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    weights = named_weights(base)
    assert any(w.dim() == 3 for w in weights.values())
    assert any(".experts.0." in name for name in load_file(base / "model.safetensors"))
    check_replay(tmp_path, base, weights, piece_bytes=piece_bytes, noise=noise)
    assert_same_tensors(named_weights(tmp_path / "out"), weights)


def test_a_checkpoint_of_no_language_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 4))
    base = tmp_path / "base"
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    check_replay(tmp_path, base, weights, noise="sign-r4")
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), dict(model.state_dict()) | weights)


def test_a_torn_journal_is_replayed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_llama(tmp_path / "base")
    weights = named_weights(base)
    table, updates = make_table(weights), make_updates()
    journal = write_run(tmp_path / "journal.jsonl", base, table, updates)
    data = journal.read_bytes()
    journal.write_bytes(data[:-10])
    report = replay(base, journal, tmp_path / "out", progress=False)
    assert report.num_steps == NUM_STEPS - 1 and "torn" in report.torn and report.torn in caplog.text
    assert journal.read_bytes() == data[:-10]
    train(weights, table, updates[:-1])
    assert_same_tensors(named_weights(tmp_path / "out"), weights)


# Refusals: one line, and nothing written


def assert_refused(base: Path, journal: Path, out: Path, reason: str, kind: type[Exception] = CheckpointError) -> None:
    before = sorted(out.iterdir()) if out.exists() else None
    with pytest.raises(kind) as caught:
        replay(base, journal, out, progress=False)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert (sorted(out.iterdir()) if out.exists() else None) == before


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = make_llama(tmp_path / "base")
    journal = write_run(tmp_path / "journal.jsonl", base, make_table(named_weights(base)), make_updates())
    return base, journal, tmp_path / "out"


def test_another_base_is_refused(run: tuple[Path, Path, Path]) -> None:
    base, journal, out = run
    config, file = base / "config.json", base / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert_refused(base, journal, out, "model.safetensors: SHA-256")
    file.write_bytes(data)
    config.write_text(config.read_text().replace("32", "64"))
    assert_refused(base, journal, out, "config.json: SHA-256")
    file.write_bytes(data[:-4])
    assert_refused(base, journal, out, "model.safetensors: ")
    file.unlink()
    assert_refused(base, journal, out, "it is not there")
    assert_refused(base / "nowhere", journal, out, "it is not there")


def test_an_output_that_holds_a_checkpoint_is_refused(run: tuple[Path, Path, Path]) -> None:
    base, journal, out = run
    replay(base, journal, out, to_step=1, progress=False)
    before = (out / "model.safetensors").read_bytes()
    for there in (out, base):
        assert_refused(base, journal, there, "already holds")
    assert (out / "model.safetensors").read_bytes() == before


def test_a_journal_of_another_run_is_refused(run: tuple[Path, Path, Path]) -> None:
    """Of another table, of another map, or of no checkpoint."""
    base, journal, out = run
    table = make_table(named_weights(base))

    def refuse(reason: str, rows: list[dict[str, Any]] = table, **options: Any) -> None:
        journal.unlink()
        write_run(journal, base, rows, make_updates(), **options)
        assert_refused(base, journal, out, reason, JournalError)

    refuse("only the model has it", table[:-1])
    extra = table_row(len(table), "extra", (2,), "float32", (1,), True, 0, "normal")
    refuse("only the journal has it", [*table, extra])
    _, checkpoint_map = open_checkpoint(base)
    checkpoint_map.close()
    record = checkpoint_map.to_json()
    name, params = table[1]["name"], record["params"]
    others = params | {name: params["lm_head.weight"], "lm_head.weight": params[name]}
    refuse(f"parameter {name!r} is read from other places", checkpoint_map=record | {"params": others})
    journal.unlink()
    header = make_header(seed=0, base={"name": "", "files": {}}, table=table, groups=[{}, {}])
    Journal.create(journal, header).close()
    assert_refused(base, journal, out, "did not start from a checkpoint", JournalError)
    journal.unlink()
    write_run(journal, base, table, make_updates(), checkpoint_map=record)
    replay(base, journal, out, to_step=1, progress=False)


def cut_up(pieces: list[Piece], seed: int) -> list[Piece]:
    """The same elements in other pieces, cut where nothing is aligned, in another order."""
    draw = random.Random(seed)
    for _ in range(40):
        piece = pieces.pop(draw.randrange(len(pieces)))
        dims = [dim for dim, size in enumerate(piece.sizes) if size > 1]
        dim = draw.choice(dims) if dims else None
        pieces += [piece] if dim is None else piece.cut(dim, draw.randrange(1, piece.sizes[dim]))
    draw.shuffle(pieces)
    return pieces


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "deepseek_v3"])
def test_maps_are_compared_by_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A journal whose map is cut otherwise is one of the same run; one element elsewhere is of another."""
    monkeypatch.setattr(replay_module, "_COMPARED", 999)
    make(kind, tmp_path)
    _, ours = open_checkpoint(tmp_path)
    ours.close()
    record = ours.to_json()

    def check(params: Any, **fields: Any) -> None:
        _check_map(json.loads(json.dumps(record | {"params": params} | fields)), record, "journal")

    def cut(name: str, change: Callable[[list[Piece]], list[Piece]] = lambda pieces: pieces) -> dict[str, Any]:
        dtype, shape, pieces = record["params"][name]
        return record["params"] | {name: [dtype, shape, change(cut_up(list(pieces), 3))]}

    def other(pieces: list[Piece], **changes: int) -> list[Piece]:
        return [pieces[0]._replace(**changes), *pieces[1:]]

    (name, _, shape, _), *rest = record["tensors"]
    earlier = json.loads(json.dumps(record | {"tensors": [[name, "float32", shape, "first"], *rest]}))
    _check_map(earlier, record, "journal", {0})  # the first is made of others
    with pytest.raises(JournalError, match="other tensors"):
        _check_map(earlier, record, "journal", {1})
    for name, (_, shape, _) in record["params"].items():
        check(cut(name))
        if math.prod(shape) > 1000:
            for change in (
                lambda p: p[1:],
                lambda p: [*p, p[0]],
                lambda p: other(p, src_offset=p[0].src_offset + 1),
                lambda p: other(p, source=(p[0].source + 1) % 3),
                lambda p: other(p, dst_offset=p[0].dst_offset + 1),
                lambda p: other(p, src_offset=p[1].src_offset) if p[0].source == p[1].source else p[1:],
                lambda p: other(p, source="x"),
                lambda p: [7, *p],
            ):
                with pytest.raises(JournalError, match=f"{name!r} is read from other places"):
                    check(cut(name, change))
    empty = {key: [] for key in record["params"]}
    for params in ([], [1], "x", None, 3, {}, empty, dict.fromkeys(record["params"])):
        with pytest.raises(JournalError, match="is read from other places"):
            check(params)
    with pytest.raises(JournalError, match="holds other tensors"):
        check(record["params"] | {"more": record["params"][name]})
    with pytest.raises(JournalError, match="holds other tensors"):
        check(record["params"], tensors=[])
    with pytest.raises(JournalError, match="is read from other places"):
        _check_map(["params"], record, "journal")


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 20])
def test_pieces_cover_every_element_once_and_are_bounded(run: tuple[Path, Path, Path], piece_bytes: int) -> None:
    base, _, _ = run
    weights = named_weights(base)
    table = make_table(weights)
    _, checkpoint_map = open_checkpoint(base)
    pieces = plan_pieces(checkpoint_map, table, piece_bytes)
    checkpoint_map.close()
    seen = dict.fromkeys(weights, 0)
    for piece in pieces:
        end = 0
        for part in piece:
            where = part.segment
            assert where.byte_offset >= end and where.byte_offset % 64 == 0
            end = where.byte_offset + part.num_bytes
            assert where.element_offset == seen[part.name]
            seen[part.name] += where.numel
        assert end <= max(piece_bytes, 4)
    assert seen == {name: w.numel() for name, w in weights.items()}


# A run of the optimizer


@pytest.mark.parametrize(
    ("name", "dtype", "weights"),
    [
        ("opt-tied", torch.bfloat16, "disk"),
        ("mixtral", torch.bfloat16, "host"),
        ("gpt2", torch.float32, "disk"),
    ],
)
def test_replay_equals_the_live_weights(tmp_path: Path, name: str, dtype: torch.dtype, weights: str) -> None:
    case, base = BY_NAME[name], tmp_path / "base"
    case.build().to(dtype).save_pretrained(base)
    model = distzo2.from_pretrained(base, weights=weights, directory=tmp_path if weights == "disk" else None)
    journal = tmp_path / "journal.jsonl"
    opt = distzo2.ZOSGD(model, lr=0.05, weight_decay=0.1, num_probes=2, seed=SEED, journal=journal)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=NUM_STEPS)
    for step in range(NUM_STEPS):
        loss, scale = case.closure(model, step), math.nan if step == 2 else 1.0  # a loss that is not finite: skipped
        opt.step(lambda loss=loss, scale=scale: loss() * scale)
        schedule.step()
    opt.close()
    distzo2.save_pretrained(model, tmp_path / "live")
    report = replay(base, journal, tmp_path / "out", progress=False, piece_bytes=5000)
    assert report.num_steps == NUM_STEPS
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "live" / file).read_bytes()
    before, after = named_weights(base), named_weights(tmp_path / "out")
    assert not any(torch.equal(before[key], after[key]) for key in before if "norm" in key)
