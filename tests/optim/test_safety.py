"""What a user may do between, around and in the middle of steps without losing or mixing anything."""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import warnings

import pytest
import torch
from block_models import IDS, Blocks, offloaded, stepping
from same_bits import assert_same_tensors
from torch import nn
from zoo import BY_NAME

import distzo2
from distzo2.models.replay import replay
from distzo2.record import writer as journal_writer
from distzo2.record.journal import read_journal
from distzo2.record.line import encode_line
from distzo2.weights.unit_weights import UnitWeights


def test_a_journal_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    model, opt = stepping(Blocks(), tmp_path, journal=tmp_path / "journal")
    opt.step(lambda: model(IDS))
    opt.journal.sync()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_writer, "write_all", full)
    done = threading.Event()

    def train():
        with pytest.raises((distzo2.DistZO2Error, OSError), match="No space left"):
            for _ in range(10):
                opt.step(lambda: model(IDS))
        done.set()

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    assert done.wait(60), "the run hangs behind a journal that cannot be written"
    thread.join()
    with pytest.raises(OSError, match="No space left"):
        opt.close()
    assert len(read_journal(tmp_path / "journal").entries) == 1


def test_one_optimizer_at_a_time(tmp_path):
    model, first = stepping(Blocks(), tmp_path, seed=1, journal=tmp_path / "first")
    first.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match="first"):
        distzo2.ZOSGD(model, lr=1e-2, seed=2)
    first.step(lambda: model(IDS))
    first.close()
    with pytest.raises(distzo2.DistZO2Error, match="closed"):
        first.step(lambda: model(IDS))
    second = distzo2.ZOSGD(model, lr=1e-2, seed=2, journal=tmp_path / "second")
    for _ in range(3):  # its versions do not begin at zero, and the journal's lines do
        second.step(lambda: model(IDS))
    with pytest.raises(distzo2.DistZO2Error, match="second"):
        distzo2.ZOSGD(model, lr=1e-2)
    second.close()
    third = distzo2.ZOSGD(model, lr=1e-2)
    fourth = distzo2.ZOSGD(model, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="a newer optimizer"):
        third.step(lambda: model(IDS))
    fourth.step(lambda: model(IDS))
    assert [len(read_journal(tmp_path / name).entries) for name in ("first", "second")] == [2, 3]


def test_a_journal_names_its_checkpoint_only_while_the_weights_are_those(tmp_path):
    case = BY_NAME["llama"]
    case.build().save_pretrained(tmp_path / "base")
    model = distzo2.from_pretrained(tmp_path / "base", weights="host")
    opt = distzo2.ZOSGD(model, lr=1e-2)
    opt.step(case.closure(model))
    opt = distzo2.ZOSGD(model, lr=1e-2, journal=tmp_path / "journal")
    opt.step(case.closure(model))
    opt.close()
    base = read_journal(tmp_path / "journal").header["base"]
    assert base.keys() == {"name", "files", "checksums"} and base["files"] == {}
    with pytest.raises(distzo2.DistZO2Error):
        replay(tmp_path / "base", tmp_path / "journal", tmp_path / "out", progress=False)


def test_ctrl_c_drops_the_step_in_flight_whole(tmp_path):
    model, opt = stepping(Blocks(), tmp_path, journal=tmp_path / "journal")
    opt.step(lambda: model(IDS))
    before = model.state_dict()

    def closure():
        os.kill(os.getpid(), signal.SIGINT)
        return model(IDS)

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert opt.step_count == 1
    assert_same_tensors(model.state_dict(), before)
    opt.step(lambda: model(IDS))
    opt.close()
    assert len(read_journal(tmp_path / "journal").entries) == 2


def test_groups_cannot_change_under_a_journal_and_a_bad_group_is_rolled_back(tmp_path):
    model = offloaded(Blocks(), tmp_path)
    head, rest = [model.head.weight], [p for n, p in model.named_parameters() if n.startswith("blocks")]
    opt = distzo2.ZOSGD(model, head, lr=1e-2)
    with pytest.raises(distzo2.DistZO2Error, match="no parameter of the model"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    opt.step(lambda: model(IDS))
    opt.add_param_group({"params": rest})
    opt.step(lambda: model(IDS))
    opt = distzo2.ZOSGD(model, head, lr=1e-2, journal=tmp_path / "journal")
    with pytest.raises(distzo2.DistZO2Error, match="journal"):
        opt.add_param_group({"params": rest})
    opt.step(lambda: model(IDS))
    opt.close()


class Coarse:
    """A closure whose loss, near 0.74, has 16 bits."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        return (0.2 * self.model(IDS)).bfloat16()


@pytest.mark.parametrize("closure", [lambda loss: lambda: loss(), lambda loss: loss, functools.partial])
def test_a_16_bit_loss_is_warned_about_once_with_its_spacing_and_its_place(closure):
    model, opt = stepping(Blocks())
    closure = closure(Coarse(model))
    where = r"test_safety\.py:\d+ returned a loss in bfloat16: near 0\.\d+ it is quantised to 0\.004, .* in float32"
    with pytest.warns(UserWarning, match=where):
        opt.step([closure] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)


def test_check_finds_a_forward_that_is_not_deterministic():
    model, opt = stepping(Blocks())
    opt.check(lambda: model(IDS))
    calls = iter(range(100))
    with pytest.raises(distzo2.DistZO2Error, match="not deterministic"):
        opt.check(lambda: model(IDS) + next(calls))


@pytest.mark.parametrize("how", ["resumed", "branched"])
@pytest.mark.parametrize("weights", ["host", "disk", "weight file"])
def test_a_run_goes_on_from_the_weights_that_it_began_with_alone(how, weights, tmp_path):
    """There are no files that could tell: checksums of parameters in the header do."""
    path = tmp_path / "journal.jsonl"

    def run(change=lambda model: None, journal=path, steps=0, **options):
        """A model that is built in code and handed over, and steps."""
        model, kept = Blocks(), {}
        with torch.no_grad():
            change(model)
        if weights == "weight file":
            kept["weight_file"] = distzo2.WeightFile(journal.with_suffix(".dzo2"), journal)
        where = "host" if weights == "host" else "disk"
        distzo2.offload(model, weights=where, directory=tmp_path, units=options.pop("units", None), **kept)
        try:
            opt = distzo2.ZOSGD(model, lr=1e-2, journal=journal, **options)
            for _ in range(steps):
                opt.step(lambda: model(IDS))
            opt.close()
            return model.state_dict(), opt.step_count
        finally:
            distzo2.runtime_of(model).close()

    expected, _ = run(journal=tmp_path / "whole.jsonl", steps=4)
    run(steps=2)
    before = path.read_bytes()
    numbers = iter(range(9))

    def again(change=lambda model: None, **options):
        if how == "resumed":
            return run(change, resume=True, **options)
        return run(change, tmp_path / f"branch{next(numbers)}.jsonl", branch_from=(path, None), **options)

    def touched(model):
        model.blocks[2][0].bias[3] += 1e-6
        model.head.weight[0, 0] *= -1

    if not (weights == "weight file" and how == "resumed"):  # what the file holds is the run's, whatever is handed over
        with pytest.raises(distzo2.DistZO2Error, match=r"2 of 10 parameters differ, first blocks\.2\.0\.bias"):
            again(touched)
        with pytest.raises(distzo2.DistZO2Error, match=r"1 of 10 parameters differ, first head\.weight"):
            again(lambda model: model.head.weight.neg_(), units=["blocks.*.0"])
        assert path.read_bytes() == before
    state, num_steps = again(steps=2)
    assert num_steps == 4
    assert_same_tensors(state, expected)


def test_older_journals_have_no_checksums_and_resume(tmp_path):
    path = tmp_path / "journal.jsonl"
    model, opt = stepping(Blocks(), journal=path)
    opt.step(lambda: model(IDS))
    opt.close()
    header = read_journal(path).header
    del header["base"]["checksums"]
    path.write_bytes(encode_line(header, 1 << 20) + path.read_bytes().splitlines(True)[1])
    for options in ({"journal": path, "resume": True}, {"journal": tmp_path / "b", "branch_from": (path, None)}):
        again, opt = stepping(Blocks(), **options)
        opt.close()
        assert_same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("read", [lambda access: list(access.visit()), lambda access: access.weights.flush()])
def test_an_interrupt_while_weights_are_read_comes_after_the_note_of_an_update(read, monkeypatch) -> None:
    """Else the update would be made twice."""

    def trained() -> torch.nn.Module:
        model, opt = stepping(Blocks())
        opt.step(lambda: model(IDS).sum())
        return model

    def interrupted(self, *args) -> None:
        make(self, *args)
        signal.raise_signal(signal.SIGINT)

    expected, model, make = trained().state_dict(), trained(), UnitWeights._materialize
    access = distzo2.runtime_of(model).access
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UnitWeights, "_materialize", interrupted)
        read(access)
    copies = access.weights.copies
    assert {copy.version for copy in copies} == {0, 1}  # one of them was brought up to date
    assert_same_tensors(model.state_dict(), expected)
