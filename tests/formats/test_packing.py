"""Matrices packed at load: the rules in NumPy, which parameters, and bytes that depend on the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import T
from packed_decode import decode

from distzo2.checkpoint.mapping import CheckpointMap
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.formats import packing
from distzo2.formats.matrices import NF4
from distzo2.formats.packing import STORES, pack_map
from distzo2.models.pretrained import open_checkpoint

LLAMA = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip
DOWN = "model.layers.1.mlp.down_proj.weight"


def saved(
    directory: Path, kind: str = "Llama", dtype: torch.dtype = torch.bfloat16,
    change: Callable[[torch.Tensor], None] = lambda weight: None, **fields: Any,
) -> tuple[torch.nn.Module, CheckpointMap, dict[str, torch.Tensor]]:  # fmt: skip
    """A model of random weights saved and opened, and its weights; `change` edits one matrix, [128, 192]."""
    torch.manual_seed(0)
    model = getattr(T, f"{kind}ForCausalLM")(getattr(T, f"{kind}Config")(**LLAMA | fields)).to(dtype)
    if kind == "Llama":
        change(model.get_parameter(DOWN).data)
    model.save_pretrained(directory)
    return *open_checkpoint(directory), {name: param.data for name, param in model.named_parameters()}


def odd(weight: torch.Tensor) -> None:
    """Groups of zeros of both signs, of one value, of subnormal numbers, and of two sizes far apart."""
    weight[0] = 0.0
    weight[1] = -0.0
    weight[2] = -0.75
    weight[3] = 1e-40
    weight[4] *= 1e-38
    weight[5] *= 1e4
    weight[6, ::2] *= 1e-20


def bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def expected(store: str, weight: torch.Tensor) -> list[np.ndarray]:
    """Codes as numbers, scales, and minima, of groups of 64."""
    w = weight.float().view(-1, 64).numpy()
    largest = np.abs(w).max(1, keepdims=True)
    one = np.float32(1)
    if store in ("affine8", "affine16"):
        top, headroom = {"affine8": (127, 1.125), "affine16": (32767, 1.5)}[store]
        scale = largest / np.float32(top) * np.float32(headroom)
        codes = np.clip(np.rint(w / np.where(scale == 0, one, scale)), -top, top)
        return [codes.astype(np.int8 if top == 127 else np.int16), scale]
    if store == "affine4":
        low = bfloat16(w.min(1, keepdims=True))
        scale = bfloat16((w.max(1, keepdims=True) - low) / np.float32(15))
        codes = np.clip(np.rint((w - low) / np.where(scale == 0, one, scale)), 0, 15)
        return [codes.astype(np.uint8), scale, low]
    scale = bfloat16(largest)
    ratio = w / np.where(scale == 0, one, scale)
    distance = np.abs(ratio[..., None].astype(np.float64) - np.float32(NF4))
    return [distance.argmin(-1).astype(np.uint8), scale]


def planes(store: str, buffer: torch.Tensor, numel: int) -> list[np.ndarray]:
    """The same out of a parameter's bytes."""
    size = {"affine8": 1, "affine16": 2}.get(store, 0.5)
    scale_dtype = torch.float32 if size >= 1 else torch.bfloat16
    ends, found = int(numel * size), [buffer[: int(numel * size)]]
    while ends < len(buffer):
        begin = -(-ends // 64) * 64
        assert not buffer[ends:begin].any()
        ends = begin + numel // 64 * scale_dtype.itemsize
        found.append(buffer[begin:ends].view(scale_dtype).float().view(-1, 1))
    assert ends == len(buffer)
    if size < 1:  # of 32 weights, byte j holds j (low bits) and j + 16
        bytes_ = found[0].view(-1, 16)
        found[0] = torch.cat([bytes_ & 15, bytes_ >> 4], 1).view(-1, 64)
    else:
        found[0] = found[0].view(torch.int8 if size == 1 else torch.int16).view(-1, 64)
    return [each.numpy() for each in found]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_follow_the_rules(store: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, checkpoint_map, weights = saved(tmp_path, dtype=dtype, change=odd)
    opened, _ = pack_map(model, checkpoint_map, store)
    assert len(opened.packed) == 14 and opened.mapped.keys() == weights.keys()
    for name in ("model.layers.0.self_attn.k_proj.weight", DOWN):
        param, weight = opened.packed[name], weights[name].float()
        assert (param.shape, param.format) == (weight.shape, f"{store} g64")
        found = planes(store, param.read(), weight.numel())
        wanted = expected(store, weight)
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name
        low = found[2] if len(found) > 2 else np.float32(0)
        value = np.float32(NF4)[found[0]] * found[1] if store == "table4" else found[0] * found[1].astype(float) + low
        assert np.array_equal(decode(param).view(-1, 64).numpy(), value.astype(np.float32))  # one rounding, as by fma
        param.check_scales()


@pytest.mark.parametrize("store", STORES)
def test_bytes_depend_on_the_weights_alone(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint_map, _ = saved(tmp_path)
    whole = pack_map(model, checkpoint_map, store)[0].packed[DOWN].read()
    monkeypatch.setattr(packing, "_CHUNK_GROUPS", 7)
    monkeypatch.setattr(packing, "_SERIAL_GROUPS", 2)
    param = pack_map(model, checkpoint_map, store)[0].packed[DOWN]
    assert torch.equal(param.read(), whole)
    (piece,) = param.pieces
    for begin, num_bytes in ((0, 1), (130, 4097), (len(whole) - 70, 70), (len(whole) // 2, len(whole) // 2)):
        assert torch.equal(piece.part(begin, num_bytes).read(), whole[begin : begin + num_bytes])
        assert torch.equal(piece.part(begin, num_bytes).part(1, 0).read(), whole[:0])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(param.read(), whole)
    finally:
        torch.set_num_threads(threads)


def test_weights_are_read_once_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint_map, _ = saved(tmp_path)
    sizes, read = [], packing.read_ranges

    def counted(ranges: Any) -> None:
        ranges = list(ranges)
        sizes.append(sum(part.num_bytes for part in ranges))
        read(ranges)

    monkeypatch.setattr(packing, "read_ranges", counted)
    monkeypatch.setattr(packing, "_CHUNK_GROUPS", 8)
    param = pack_map(model, checkpoint_map, "affine4")[0].packed[DOWN]
    assert not sizes
    param.read()
    assert sum(sizes) == 128 * 192 * 2 and set(sizes) == {8 * 64 * 2}
    sizes.clear()
    param.check_scales()  # a parameter that is made is checked when it is
    assert not sizes


def test_float32_is_not_rounded_to_the_models_dtype(tmp_path: Path) -> None:
    _, _, weights = saved(tmp_path, dtype=torch.float32)
    model, checkpoint_map = open_checkpoint(tmp_path, dtype=torch.bfloat16)
    param = pack_map(model, checkpoint_map, "affine16")[0].packed[DOWN]
    assert np.array_equal(planes("affine16", param.read(), 128 * 192)[0], expected("affine16", weights[DOWN])[0])


def test_stacked_experts_are_packed_and_routers_are_not(tmp_path: Path) -> None:
    fields = {"num_local_experts": 4, "intermediate_size": 96, "hidden_size": 128}
    model, checkpoint_map, weights = saved(tmp_path, "Mixtral", **fields)
    opened, _ = pack_map(model, checkpoint_map, "affine8")
    ends = {name.split(".", 3)[3] for name in opened.packed}
    assert ends == {*(f"self_attn.{n}_proj.weight" for n in "qkvo"), "mlp.experts.gate_up_proj"}  # 96 is no multiple
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = planes("affine8", opened.packed[name].read(), weights[name].numel())
    assert all(map(np.array_equal, found, expected("affine8", weights[name])))


def test_the_error_is_told(tmp_path: Path) -> None:
    model, checkpoint_map, weights = saved(tmp_path)
    reports = {}
    for store in STORES:
        opened, error = pack_map(model, checkpoint_map, store)
        sums = np.zeros(2)
        for name, param in opened.packed.items():
            weight = weights[name].double()
            squares = (decode(param) - weight).square().sum(), weight.square().sum()
            assert error.of(name) == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-5)
            param.read()  # again: it counts once
            sums += squares
        reports[store] = error.of()
        assert reports[store] == pytest.approx(np.sqrt(sums[0] / sums[1]), rel=1e-5)
        worst = max(opened.packed, key=error.of)
        assert worst in error.report() and "\n" not in error.report()
    # Of normal weights: a step of 2.6 deviations * headroom / 2^(b-1), over sqrt(12).
    assert 0.08 < reports["affine4"] < reports["table4"] < 0.1
    assert reports["affine8"] < 0.008 and reports["affine16"] < 4e-5


@pytest.mark.parametrize(("value", "told"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf")])
@pytest.mark.parametrize("store", STORES)
def test_weights_that_are_not_finite_are_refused(store: str, value: float, told: str, tmp_path: Path) -> None:
    def change(weight: torch.Tensor) -> None:
        weight[77, 130] = value

    model, checkpoint_map, _ = saved(tmp_path, change=change)
    param = pack_map(model, checkpoint_map, store)[0].packed[DOWN]
    with pytest.raises(CheckpointError, match=rf"down_proj.weight', row 77: expected finite weights .*, got {told}$"):
        param.read()


def test_a_group_too_wide_for_its_scale_is_refused(tmp_path: Path) -> None:
    def change(weight: torch.Tensor) -> None:
        weight[5, 0], weight[5, 1] = 3e38, -3e38

    model, checkpoint_map, _ = saved(tmp_path, change=change)
    assert pack_map(model, checkpoint_map, "affine16")[0].packed[DOWN].read().numel()
    with pytest.raises(CheckpointError, match=r"row 5: expected .* with finite scales, got -?3.0\d*e\+38"):
        pack_map(model, checkpoint_map, "affine4")[0].packed[DOWN].read()


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    model, checkpoint_map, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a store among affine4, table4, .*, got 'affine5'"):
        pack_map(model, checkpoint_map, "affine5")
    narrow = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 1}
    model, checkpoint_map, _ = saved(tmp_path / "narrow", **narrow)
    with pytest.raises(CheckpointError, match="narrow: expected matrices of a multiple of 64 columns in blocks"):
        pack_map(model, checkpoint_map, "affine8")
