"""Units that no lane entered: a step's update leaves them as they are, live, resumed and replayed alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same_bits import assert_same_tensors, same_bits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import distzo2
import distzo2_core
from distzo2.models.replay import replay
from distzo2.record.header import with_older_rules
from distzo2.record.journal import read_journal
from distzo2.record.line import encode_line
from distzo2.weights.units import ranges_of

SEED, LR, DECAY = 7, 2e-2, 0.1
NUM_BLOCKS, STEPS = 4, 7
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def depth(step: int) -> int:
    """How many blocks the step's forwards enter: the second half on even steps only, the last block never."""
    return 2 if step % 2 else 3


def uses(step: int, name: str) -> bool:
    return not name.startswith("model.layers.") or int(name.split(".")[2]) < depth(step)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=NUM_BLOCKS, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def parameters_of(base: Path) -> dict[str, torch.Tensor]:
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def begin(base: Path, journal: Path, weights: str = "host", **options: Any) -> tuple[nn.Module, distzo2.ZOSGD]:
    ours = {key: options.pop(key) for key in ("resume", "branch_from", "max_lanes", "momentum") if key in options}
    model = distzo2.from_pretrained(base, weights=weights, directory=journal.parent, **options)
    return model, distzo2.ZOSGD(model, lr=LR, seed=SEED, weight_decay=DECAY, journal=journal, **ours)


def advance(
    model: nn.Module, opt: distzo2.ZOSGD, until: int, depth_of: Callable[[int], int] = depth, each: Any = None
) -> list[list[float]]:
    """Steps until step `until`; the coefficients."""
    coefs = []
    while opt.step_count < until:
        model.config.num_hidden_layers = depth_of(opt.step_count)
        scale = math.nan if opt.step_count == 4 else 1.0  # this step is skipped
        opt.step([lambda i=i, s=scale: model(input_ids=IDS[i : i + 1], labels=IDS[i : i + 1]).loss * s for i in (0, 1)])
        coefs.append(opt.last.coefs)
        if each is not None:
            each()
    model.config.num_hidden_layers = NUM_BLOCKS
    return coefs


def end(model: nn.Module, opt: distzo2.ZOSGD) -> dict[str, torch.Tensor]:
    opt.close()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    distzo2.runtime_of(model).close()
    return state


def expected(base: Path, coefs: list[list[float]], used: Callable[[int, str], bool] = uses) -> dict[str, torch.Tensor]:
    """The base with one update after another, each of the parameters that its step used."""
    weights = parameters_of(base)
    for step, made in enumerate(coefs):
        for index, (name, w) in enumerate(weights.items()):
            if made and used(step, name):
                decay = DECAY if w.dim() > 1 else 0.0
                place = {"seed": SEED, "step": step, "param": index}
                distzo2_core.update_(w, LR, made[0], weight_decay=decay, backend="reference", **place)
    return weights


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The journal of a run and its weights, which are those that the coefficients say."""
    journal = tmp_path_factory.mktemp("run") / "journal.jsonl"
    model, opt = begin(base, journal)
    coefs = advance(model, opt, STEPS)
    state = end(model, opt)
    assert_same_tensors(state, expected(base, coefs))
    assert [bool(c) for c in coefs] == [True] * 4 + [False] + [True] * 2
    before = parameters_of(base)
    for name, value in state.items():  # the last block is never entered
        assert same_bits(value, before[name]) == (name.startswith("model.layers.3.")), name
    return journal, state


def test_the_journal_lists_their_parameters(base: Path, undisturbed: Any) -> None:
    names = [name for name, _ in parameters_of(base).items()]
    entries = read_journal(undisturbed[0]).entries
    assert len(entries) == STEPS and entries[4].skipped == "non-finite loss"
    for entry in entries:
        listed = [names[i] for first, last in entry.unused for i in range(first, last + 1)]
        assert listed == [name for name in names if not uses(entry.step, name)] and len(entry.unused) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "disk"},
        {"weights": "disk", "write_every": 3},
        {"weights": "disk", "write_every": 3, "slots": 2, "max_lanes": 1},
        {"weights": "device"},
    ],
    ids=str,
)
@pytest.mark.parametrize("reads", [False, True])
def test_wherever_weights_live_they_have_the_same_bits(
    base: Path, undisturbed: Any, options: Any, reads: bool, tmp_path: Path
) -> None:
    """Also where everything is read, and so brought up to date, after each step."""
    model, opt = begin(base, tmp_path / "journal.jsonl", **options)
    advance(model, opt, STEPS, each=(lambda: model.state_dict()) if reads else None)
    weights = distzo2.runtime_of(model).weights
    assert len(weights.updates.last) <= 3 and len(weights.updates.excluded) <= 3  # neither grows with the run
    assert_same_tensors(end(model, opt), undisturbed[1])


@pytest.mark.parametrize(("weights", "at"), [("host", 1), ("disk", 2), ("disk", 5)])
def test_a_resumed_run_has_their_bits(base: Path, undisturbed: Any, weights: str, at: int, tmp_path: Path) -> None:
    model, opt = begin(base, tmp_path / "journal.jsonl", weights)
    advance(model, opt, at)
    end(model, opt)
    model, opt = begin(base, tmp_path / "journal.jsonl", weights, resume=True)
    advance(model, opt, STEPS)
    assert_same_tensors(end(model, opt), undisturbed[1])
    ours, theirs = (read_journal(path).entries for path in (tmp_path / "journal.jsonl", undisturbed[0]))
    assert [(e.update, e.unused) for e in ours] == [(e.update, e.unused) for e in theirs]


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_a_resumed_run_with_a_weight_file_has_their_bits(
    base: Path, undisturbed: Any, weights: str, tmp_path: Path
) -> None:
    """Blocks of the file hold different numbers of updates; those that left a unit as it was are not missed by it."""
    journal, told = tmp_path / "journal.jsonl", []
    for until in (3, 6, STEPS):
        file = distzo2.WeightFile(tmp_path / "weights.dzo2", journal, 1, pace=1.0, log=told.append)
        model, opt = begin(base, journal, weights, weight_file=file, write_every=2, resume=journal.exists())
        advance(model, opt, until)
        state = end(model, opt)
    assert_same_tensors(state, undisturbed[1])
    assert any("units, with" in line for line in told)


@pytest.mark.parametrize(("to_step", "piece_bytes"), [(1, 1 << 20), (2, 1000), (5, 1 << 20), (STEPS, 1000)])
def test_a_replay_has_their_bits(base: Path, undisturbed: Any, to_step: int, piece_bytes: int, tmp_path: Path) -> None:
    replay(base, undisturbed[0], tmp_path / "out", to_step, progress=False, piece_bytes=piece_bytes)
    terms = [entry.update.terms for entry in read_journal(undisturbed[0]).entries[:to_step]]
    assert_same_tensors(parameters_of(tmp_path / "out"), expected(base, [[t.c for t in each] for each in terms]))


def test_a_branch_has_their_bits(base: Path, undisturbed: Any, tmp_path: Path) -> None:
    model, opt = begin(base, tmp_path / "journal.jsonl", "disk", branch_from=(undisturbed[0], 5))
    advance(model, opt, STEPS)
    assert_same_tensors(end(model, opt), undisturbed[1])
    replay(base, tmp_path / "journal.jsonl", tmp_path / "out", progress=False)
    assert_same_tensors(parameters_of(tmp_path / "out"), undisturbed[1])


def test_momentum_reaches_no_unit_that_its_step_did_not_use(base: Path, tmp_path: Path) -> None:
    """Updates of even steps reach a block more than odd steps used, and so list no terms of these."""
    journal = tmp_path / "journal.jsonl"
    for until in (3, STEPS):
        model, opt = begin(base, journal, "disk", resume=until > 3, momentum=0.5)
        advance(model, opt, until)
        state = end(model, opt)
    entries = read_journal(journal).entries
    listed = [[term.step for term in entry.update.terms] for entry in entries]
    assert listed == [[0], [0, 1], [0, 2], [0, 1, 2, 3], [], [0, 1, 2, 3, 5], [0, 2, 6]]
    replay(base, journal, tmp_path / "out", progress=False)
    assert_same_tensors(parameters_of(tmp_path / "out"), state)


@pytest.mark.parametrize("how", ["resumed", "branched"])
def test_an_older_run_goes_on_updating_them(base: Path, how: str, tmp_path: Path) -> None:
    """As it began: under versions 1 and 2 a step's update reaches all. Replay agrees."""
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    model, opt = begin(base, old)
    coefs = advance(model, opt, 2, lambda step: NUM_BLOCKS)  # both steps enter all
    end(model, opt)
    lines = old.read_bytes().splitlines(True)
    old.write_bytes(encode_line(with_older_rules(read_journal(old).header), 1 << 20) + b"".join(lines[1:]))
    if how == "resumed":
        new.write_bytes(old.read_bytes())
    model, opt = begin(base, new, **({"resume": True} if how == "resumed" else {"branch_from": (old, None)}))
    coefs += advance(model, opt, STEPS)
    state = end(model, opt)
    assert_same_tensors(state, expected(base, coefs, lambda step, name: True))
    assert not any(entry.unused for entry in read_journal(new).entries)
    replay(base, new, tmp_path / "out", progress=False)
    assert_same_tensors(parameters_of(tmp_path / "out"), state)


@pytest.mark.parametrize("older", [False, True])
def test_they_are_reported_once(base: Path, older: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = tmp_path / "journal.jsonl"
    if older:
        end(*begin(base, journal))
        journal.write_bytes(encode_line(with_older_rules(read_journal(journal).header), 1 << 20))
    model, opt = begin(base, journal, resume=older)
    with caplog.at_level(logging.WARNING, "distzo2"):
        advance(model, opt, STEPS)
    end(model, opt)
    (told,) = [r.getMessage() for r in caplog.records if "used none of" in r.getMessage()]
    assert told.startswith("step 0 used none of the 9 parameters of model.layers.3: ")
    assert ("their updates are noise" in told) == older


def test_a_model_that_enters_all_reports_and_lists_nothing(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, opt = begin(base, tmp_path / "journal.jsonl")
    coefs = advance(model, opt, 3, lambda step: NUM_BLOCKS)
    assert not distzo2.runtime_of(model).weights.updates.excluded and not caplog.records
    assert_same_tensors(end(model, opt), expected(base, coefs, lambda step, name: True))
    assert b"unused" not in (tmp_path / "journal.jsonl").read_bytes()


def test_frozen_units_and_those_without_elements_are_not_listed(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("used", "frozen", "tower")})
    model["frozen"].requires_grad_(False)
    model["tower"].bias.requires_grad_(False)
    distzo2.offload(model, units=["used", "frozen", "tower"])
    opt = distzo2.ZOSGD(model, lr=LR)
    opt.step(lambda: model["used"](torch.ones(4)).sum())
    index = [name for name, _ in model.named_parameters()].index("tower.weight")
    assert opt.last.unused == [[index, index + 1]]
    assert [u.name for u in distzo2.runtime_of(model).weights.left_out([0])] == ["tower"]


class Pairs(nn.Module):
    """Units of a pair of layers, or of one each; the second of a pair may be left out."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.pairs = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, _ in self.pairs:
            x = first(x)
        return x.square().mean()


def test_a_resume_whose_units_mix_them_is_refused_by_name(tmp_path: Path) -> None:
    model = distzo2.offload(Pairs(), units=["pairs.*.*"])
    opt = distzo2.ZOSGD(model, lr=LR, journal=tmp_path / "journal.jsonl")
    opt.step(lambda: model(torch.ones(2, 6)))
    opt.close()
    model = distzo2.offload(Pairs())
    message = (
        r"step 0 of the journal used pairs\.0\.0\.weight and not pairs\.0\.1\.weight, and both are in unit 'pairs\.0'"
    )
    with pytest.raises(distzo2.DistZO2Error, match=message):
        distzo2.ZOSGD(model, lr=LR, journal=tmp_path / "journal.jsonl", resume=True)
    model = distzo2.offload(Pairs(), units=["pairs.*.*"])  # and the journal can be resumed as it was
    opt = distzo2.ZOSGD(model, lr=LR, journal=tmp_path / "journal.jsonl", resume=True)
    opt.step(lambda: model(torch.ones(2, 6)))
    assert opt.last.unused == [[2, 3], [6, 7], [10, 11]]
    opt.close()


def test_without_a_journal_they_keep_their_bits_too() -> None:
    model = Pairs()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    distzo2.offload(model, units=["pairs.*.*"])
    opt = distzo2.ZOSGD(model, lr=LR, num_probes=2)
    for _ in range(3):
        opt.step(lambda: model(torch.ones(2, 6)))
    for name, value in model.state_dict().items():
        assert same_bits(value, before[name]) == (name.split(".")[2] == "1"), name


@pytest.mark.parametrize(
    ("indices", "ranges"),
    [([], []), ([4], [[4, 4]]), ([3, 1, 2], [[1, 3]]), ([0, 2, 3, 7], [[0, 0], [2, 3], [7, 7]])],
)
def test_ranges(indices: list[int], ranges: list[list[int]]) -> None:
    assert ranges_of(indices) == ranges


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_the_vision_tower_of_a_model_that_reads_text_keeps_its_bits(
    weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **sizes)
    text = LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    torch.manual_seed(4)
    model = LlavaForConditionalGeneration(config).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sees = [name for name in before if "vision_tower" in name or "multi_modal_projector" in name]
    distzo2.offload(model, weights=weights, directory=tmp_path)
    opt = distzo2.ZOSGD(model, lr=LR, journal=tmp_path / "journal.jsonl")
    for _ in range(3):
        opt.step(lambda: model(input_ids=IDS % 60, labels=IDS % 60).loss)
    opt.close()
    (told,) = [r.getMessage() for r in caplog.records if "used none of" in r.getMessage()]
    assert f"none of the {len(sees)} parameters of " in told and len(sees) > 30
    names = list(before)
    for entry in read_journal(tmp_path / "journal.jsonl").entries:
        assert [names[i] for first, last in entry.unused for i in range(first, last + 1)] == sees
    state = model.state_dict()
    for name, value in before.items():
        assert same_bits(state[name], value) == (name in sees), name
