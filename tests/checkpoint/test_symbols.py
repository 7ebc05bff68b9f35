"""Symbols: transformers' own conversions are followed, and what cannot be expressed is refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_models import SMALL, T, make
from safetensors.torch import save_file

from distzo2.checkpoint.layout import Layout, LayoutError
from distzo2.checkpoint.reading import SINGLE_FILE, CheckpointFiles
from distzo2.checkpoint.symbols import LayoutTensor, Trace
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.models.pretrained import open_checkpoint


def conversions() -> list[tuple[str, Callable[[list[torch.Tensor]], Any]]]:
    """Each of transformers' own conversion operations as a function of tensors."""
    ops = transformers.core_model_loading
    config = T.LlamaConfig(**SMALL)

    def run(op: Any, tensors: list[torch.Tensor], sources: list[str], targets: list[str]) -> Any:
        given = {
            s: [t for t, name in zip(tensors, names, strict=True) if name == s]
            for s in sources
            for names in [sources * (len(tensors) // len(sources))]
        }
        made = op.convert(
            given, source_patterns=sources, target_patterns=targets, config=config, full_layer_name="w", model=None
        )
        return [made[key][0] if isinstance(made[key], list) else made[key] for key in made]

    one = partial(run, sources=["s"], targets=["t"])
    return [
        ("merge", lambda ts: one(ops.MergeModulelist(0), ts)),
        ("concatenate", lambda ts: run(ops.Concatenate(1), ts, ["s", "u"], ["t"])),
        ("chunk", lambda ts: run(ops.Chunk(0), ts[:1], ["s"], ["t", "u"])),
        ("split_list", lambda ts: run(ops.SplitModulelist(0), ts[:1], ["s"], ["t.*"])),
        ("transpose", lambda ts: one(ops.Transpose(0, 1), ts[:1])),
        ("interleave", lambda ts: one(ops.Interleave(1), ts[:1])),
        ("deinterleave", lambda ts: one(ops.Interleave(0, inverse=True), ts[:1])),
        ("rope", lambda ts: one(ops.PermuteForRope(), ts[:1])),
        ("ernie", lambda ts: run(ops.ErnieFuseAndSplitTextVisionExperts(), ts, ["s", "u"], ["t", "v"])),
    ]


@pytest.mark.parametrize("number", range(9))
def test_transformers_conversions(tmp_path: Path, number: int) -> None:
    name, convert = conversions()[number]
    tensors = [torch.randn(16, 24) for _ in range(4)]
    save_file({f"w{i}": t for i, t in enumerate(tensors)}, tmp_path / SINGLE_FILE)
    files = CheckpointFiles(tmp_path)
    trace = Trace([e.name for e in files.entries])
    where = {e.name: (i, e) for i, e in enumerate(files.entries)}
    symbols = [LayoutTensor(Layout.leaf(where[f"w{i}"][0], (16, 24)), torch.float32, trace) for i in range(4)]
    expected, got = convert(list(tensors)), convert(symbols)
    assert len(got) == len(expected) > 0, name
    for symbol, tensor in zip(got, expected, strict=True):
        out = torch.empty(tensor.shape)
        files.read_pieces(symbol.where.pieces, out)
        assert torch.equal(out, tensor), name


def test_a_conversion_that_computes_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", tmp_path)
    loading, mapping = (
        importlib.import_module(f"transformers.{name}") for name in ("core_model_loading", "conversion_mapping")
    )

    class Double(loading.ConversionOps):
        def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **_: Any) -> dict:
            return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}

    real = mapping.get_checkpoint_conversion_mapping

    def with_double(model_type: str) -> Any:
        if model_type == "llama":
            return [loading.WeightConverter("q_proj.weight", "q_proj.weight", operations=[Double()])]
        return real(model_type)

    monkeypatch.setattr(mapping, "get_checkpoint_conversion_mapping", with_double)
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.self_attn.q_proj.weight' cannot be mapped .*: aten.mul"
    ) as e:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_what_symbols_cannot_express_is_refused() -> None:
    trace = Trace(["a", "b"])
    a, b = (LayoutTensor(Layout.leaf(n, (4, 6)), torch.float32, trace) for n in range(2))
    cases = {
        "a, b: aten.add": a + b,
        "a: aten.diagonal.default: steps of [7]": a.diagonal(),
        "a: aten.expand": a.expand(3, 4, 6),
        "a: a second conversion, from torch.bfloat16": a.bfloat16().float(),
        "a: aten.sum": a.sum(),
        "b: aten.mul": torch.cat([a, 2 * b]).t()[:2],
    }
    for problem, result in cases.items():
        assert result.problem.startswith(problem), result.problem
    assert a[1::2].where == a.reshape(2, 12)[:, 6:].where and a[::2].problem is None  # rows in turn are no computation
    assert cases["b: aten.mul"].shape == (2, 8) and cases["b: aten.mul"].zero_() is cases["b: aten.mul"]
    with pytest.raises(LayoutError, match=r"a: other values are written over"):
        a[1].fill_(0)  # the values of a checkpoint are not changed unseen
    with pytest.raises(LayoutError, match=r"a: the values of a checkpoint are compared"):
        torch.equal(a, torch.ones(4, 6))


def test_constants_that_are_there_already_may_be_written(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([3.0, 4.0, -1.0]), "b": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    files = CheckpointFiles(tmp_path)
    trace = Trace(["a", "b"], files.equal)
    a, b = (LayoutTensor(Layout.leaf(n, e.shape), e.dtype, trace) for n, e in enumerate(files.entries))
    a[-1] = -1.0
    a[:2] = torch.tensor([3.0, 4.0])
    b[1] = 1.0
    b[0].fill_(1)
    assert a.problem is None and a.where == Layout.leaf(0, (3,))
    for number, value in ((-1, -2.0), (0, 4.0), (slice(0, 2), 3.0)):
        with pytest.raises(LayoutError, match="a: other values are written over those of the checkpoint"):
            a[number] = value
    with pytest.raises(LayoutError, match="other values are written"):
        b[0] = a
    files.close()
