"""Packed files written anew with gains in their scales, as each format's own decoder reads them."""

from __future__ import annotations

import hashlib
import json
import resource
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

import tiny_gguf  # noqa: E402
from checkpoint_models import T  # noqa: E402
from gguf import GGMLQuantizationType as Type  # noqa: E402
from packed_forms import random_bytes  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import distzo2  # noqa: E402
from distzo2.checkpoint.tensor_files import CheckpointError  # noqa: E402
from distzo2.cli.main import main  # noqa: E402
from distzo2.models.replay import replay  # noqa: E402

IDS = torch.arange(3, 27).view(2, 12)
UP = "model.layers.0.mlp.up_proj.weight"
LLAMA = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "dtype": "bfloat16",
}  # fmt: skip


def make_nf4(directory: Path) -> Path:
    """A checkpoint as transformers saves one that bitsandbytes has quantized."""
    bnb = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    torch.manual_seed(0)
    T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        codes, state = bnb.quantize_4bit(tensors[name].float(), quant_type="nf4", blocksize=64)
        tensors |= {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def load(path: Path, values: dict[str, float] | None = None, **more: object) -> torch.nn.Module:
    """A model with gains, which are 1 but for those of some parameters."""
    model = distzo2.from_pretrained(path, prepare=distzo2.gains, dtype=torch.float32, **more)
    if values:
        with distzo2.edit(model):
            for name, value in values.items():
                model.get_parameter(f"{name}_gain").data.fill_(value)
    return model


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def train(model: torch.nn.Module, journal: Path) -> None:
    with closing(distzo2.ZOSGD(model, lr=1.0, eps=1e-2, noise="rademacher", journal=journal)) as opt:
        for _ in range(2):
            opt.step(lambda: model(input_ids=IDS, labels=IDS).loss)


def test_nf4_takes_trained_gains_as_bitsandbytes_reads_them(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    base, out = make_nf4(tmp_path / "base"), tmp_path / "out"
    model = load(base)
    train(model, tmp_path / "journal.jsonl")
    distzo2.save_packed(model, out)
    replay(base, tmp_path / "journal.jsonl", tmp_path / "again", progress=False, packed=True)
    assert digests(out) == digests(tmp_path / "again")
    before, after, weights = (
        load_file(base / "model.safetensors"),
        load_file(out / "model.safetensors"),
        model.state_dict(),
    )
    assert [*before] == [*after] and {*digests(out)} == {*digests(base)}
    assert {n for n in before if not before[n].equal(after[n])} == {n for n in before if n.endswith(".absmax")}
    read = distzo2.from_pretrained(out, dtype=torch.float32).state_dict()
    for name in (n.removesuffix(".absmax") for n in before if n.endswith(".absmax")):
        scale = weights[f"{name}_gain"] * before[f"{name}.absmax"]
        assert scale.equal(after[f"{name}.absmax"]) and not scale.equal(before[f"{name}.absmax"])
        parts = {key.removeprefix(f"{name}."): value for key, value in after.items() if key.startswith(f"{name}.")}
        decoded = bnb.dequantize_4bit(after[name], bnb.QuantState.from_dict(parts, device=torch.device("cpu"))).float()
        assert decoded.bfloat16().equal(read[name].bfloat16())  # bitsandbytes has the dtype of what was quantized
        torch.testing.assert_close(read[name], weights[name], rtol=2**-22, atol=0)  # three roundings instead of two


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_gguf_takes_powers_of_two_as_its_package_reads_them(tmp_path: Path, kind: str) -> None:
    base = tiny_gguf.write(tmp_path / f"m.{kind}.gguf", "llama", tiny_gguf.make_model("llama"), kind, quantized=True)
    (tmp_path / "out").mkdir()  # of a killed writer
    (tmp_path / "out" / ".distzo2-checkpoint").mkdir()
    query = "model.layers.1.self_attn.q_proj.weight"  # whose rows lie in another order in the file
    factors = {UP: 4.0, query: 2.0, "model.layers.0.mlp.down_proj.weight": 0.0}
    model = load(base, factors)
    distzo2.save_packed(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [base.name]
    changed = {"blk.0.ffn_up.weight": 4.0, "blk.1.attn_q.weight": 2.0, "blk.0.ffn_down.weight": 0.0}
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(tmp_path / "out" / base.name)
    assert old.data[: old.data_offset].tobytes() == new.data[: new.data_offset].tobytes()
    for a, b in zip(old.tensors, new.tensors, strict=True):
        if a.name not in changed:
            assert a.data.tobytes() == b.data.tobytes()
            continue
        values = [gguf.dequantize(each.data, Type[kind]) for each in (a, b)]
        assert np.array_equal(values[0] * np.float32(changed[a.name]), values[1])
    read, wanted = (
        distzo2.from_pretrained(tmp_path / "out" / base.name, dtype=torch.float32).state_dict(),
        model.state_dict(),
    )
    assert all(read[name].equal(wanted[name]) for name in read)


def test_scales_that_their_type_does_not_hold_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = tiny_gguf.write(tmp_path / "m.gguf", "llama", tiny_gguf.make_model("llama"), "Q4_0", quantized=True)
    third = 1 / 3
    model = load(base, {UP: third, "model.layers.1.mlp.up_proj.weight": 2.0})
    with pytest.raises(CheckpointError) as refused:
        distzo2.save_packed(model, tmp_path / "out")
    found = next(t for t in gguf.GGUFReader(base).tensors if t.name == "blk.0.ffn_up.weight")
    scales = found.data.reshape(-1, 18)[:, :2].copy().view(np.float16).astype(np.float32)
    wanted = np.float32(third) * scales
    rounded = wanted.astype(np.float16).astype(np.float32)
    bad, total = int((wanted != rounded).sum()), sum(p.numel for p in distzo2.runtime_of(model).params if p.is_gain)
    most = np.nanmax(np.abs((rounded - wanted) / wanted))
    assert f"{UP} (Q4_0 with gains): float16 does not hold the scales of {bad} of {total} groups" in str(refused.value)
    assert f"rounding would change one by {most:.2g} of itself: write decoded weights" in str(refused.value)
    assert 0 < bad < total and not (tmp_path / "out").exists()

    blocks = tiny_gguf.write(tmp_path / "k.gguf", "llama", tiny_gguf.make_model("llama"), "Q4_K", quantized=True)
    model = load(blocks)
    with distzo2.edit(model):
        model.get_parameter(f"{UP}_gain").data[0] = 2.0  # one group of the eight of a block
    with pytest.raises(CheckpointError, match=r"Q4_K .*: float16 does not hold the scales of 8 of \d+ groups"):
        distzo2.save_packed(model, tmp_path / "out")


def make_scaled(directory: Path, kind: str) -> Path:
    """A Llama whose matrices are nvfp4, mxfp4 or fp8 of blocks of any bytes."""
    torch.manual_seed(0)
    T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(directory)
    tensors, g = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, cols = tensors.pop(name).shape
        if kind == "fp8":
            codes = random_bytes((rows, cols), g) & 0x77  # no NaN
            tensors |= {
                name: codes.view(torch.float8_e4m3fn),
                f"{name}_scale_inv": torch.ones(-(-rows // 128), -(-cols // 128)),
            }
            tensors[f"{name}_scale_inv"] *= 0.01
            continue
        tensors[f"{name}_packed"] = random_bytes((rows, cols // 2), g)
        if kind == "mxfp4":
            tensors[f"{name}_scale"] = torch.randint(110, 130, (rows, cols // 32), generator=g, dtype=torch.uint8)
        else:
            tensors[f"{name}_scale"] = (torch.rand((rows, cols // 16), generator=g) + 0.5).to(torch.float8_e4m3fn)
            tensors[f"{name}_global_scale"] = torch.tensor([1234.567])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(("kind", "refused"), [("fp8", 0.0), ("mxfp4", 0.75), ("nvfp4", 1.1)])
def test_scales_of_other_types_take_what_they_hold(tmp_path: Path, kind: str, refused: float) -> None:
    base = make_scaled(tmp_path / "base", kind)
    factor = {"fp8": 0.3, "mxfp4": 0.25, "nvfp4": 2.0}[kind]
    model = load(base, {UP: factor})
    distzo2.save_packed(model, tmp_path / "out")
    read, wanted = distzo2.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict(), model.state_dict()
    for name in read:
        torch.testing.assert_close(read[name], wanted[name], rtol=2**-22 if kind == "fp8" else 0, atol=0)
    if refused:
        with pytest.raises(CheckpointError, match={"mxfp4": "e8m0", "nvfp4": "float8_e4m3fn"}[kind] + " does not hold"):
            distzo2.save_packed(load(base, {UP: refused}), tmp_path / "again")


def test_a_save_that_fails_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    base = tiny_gguf.write(tmp_path / "m.gguf", "llama", tiny_gguf.make_model("llama"), "Q4_0", quantized=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    model, before = load(base, {UP: 2.0}), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (base.stat().st_size // 2, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            distzo2.save_packed(model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    distzo2.save_packed(model, out)
    with pytest.raises(CheckpointError, match=r"already holds m\.gguf"):
        distzo2.save_packed(model, out)
    with distzo2.edit(model):
        model.model.norm.weight.data[0] += 1
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight was replaced, and only gains go into packed files"):
        distzo2.save_packed(model, tmp_path / "other")


def test_what_has_no_packed_files_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = tmp_path / "raw"
    T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)).save_pretrained(raw)
    with pytest.raises(
        CheckpointError, match=r"affine4 g64 with gains\): its scales are put into another order, or made"
    ):
        distzo2.save_packed(load(raw, store="affine4"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="LlamaForCausalLM trains no gains"):
        distzo2.save_packed(distzo2.from_pretrained(raw), tmp_path / "out")
    model = distzo2.from_pretrained(raw)
    train(model, tmp_path / "journal.jsonl")
    arguments = [
        "replay",
        str(raw),
        str(tmp_path / "journal.jsonl"),
        "--packed",
        f"--out={tmp_path / 'out'}",
        "--quiet",
    ]
    assert main(arguments) == 1
    assert "the run trains no gains" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
