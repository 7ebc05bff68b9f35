"""Packed tensors that are not decoded are refused by name, from the headers or a few numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_forms import FORMS, Tensors
from safetensors.torch import save_file

from distzo2.checkpoint.tensor_files import CheckpointError, TensorEntry, TensorFile
from distzo2.formats.matrices import find_matrices

SHAPE = (32, 256)


def stored(directory: Path, tensors: Tensors) -> dict[str, TensorEntry]:
    """The tensors of a layer `q` in a file."""
    path = directory / "model.safetensors"
    save_file({f"q{end}": t.contiguous() for end, t in tensors.items()}, path)
    with TensorFile(path) as file:
        return file.tensors


def made(form: str, shape: tuple[int, ...] = SHAPE, **changes: torch.Tensor | None) -> Tensors:
    """A layer in this form; changes are tensors by the last part of their names, None for one that is not there."""
    tensors = FORMS[form](shape, torch.Generator().manual_seed(0))[0]
    changed = {next((n for n in tensors if n.endswith(end)), f".{end}"): t for end, t in changes.items()}
    return {name: t for name, t in (tensors | changed).items() if t is not None}


def state(**changes: Any) -> torch.Tensor:
    fields = {"shape": SHAPE, "blocksize": 64} | changes
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


I32, F8 = torch.int32, torch.float8_e4m3fn
G_IDX = (torch.arange(256) // 128).int()
REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "act-order": (lambda: made("gptq int4 g128", g_idx=G_IDX.flip(0)), "act-order .desc_act.*'q.g_idx'"),
    "act-order of compressed-tensors": (
        lambda: made("pack-quantized int4 g128", weight_g_idx=G_IDX.flip(0)),
        "act-order .*'q.weight_g_idx'",
    ),
    "a group that is not there": (lambda: made("gptq int4 g128", g_idx=G_IDX[:7]), r"expected \[256\].*g_idx.*\[7\]"),
    "three bits": (
        lambda: made("gptq int4 g128", qweight=torch.zeros(24, 32, dtype=I32), qzeros=torch.zeros(2, 3, dtype=I32)),
        r"expected GPTQ of 4 or 8 bits or AWQ \(gemm\), got qweight \[24, 32\]",
    ),
    "awq gemv": (
        lambda: made("awq int4 g64", qweight=torch.zeros(32, 32, dtype=I32), scales=torch.ones(32, 4)),
        "or AWQ .gemm., got",
    ),
    "no zero points": (lambda: made("awq int4 g64", qzeros=None), "expected a tensor 'q.qzeros' beside it, got none"),
    "zero points of another dtype": (
        lambda: made("awq int4 g64", qzeros=torch.zeros(4, 4)),
        "expected int32 in 'q.qzeros', got float32",
    ),
    "groups of another length": (
        lambda: made("awq int4 g64", qzeros=torch.zeros(3, 4, dtype=I32), scales=torch.ones(3, 32).half()),
        "groups that divide the 256 columns, got 3",
    ),
    "three bits in words": (
        lambda: made("pack-quantized int4 g128", weight_packed=torch.zeros(32, 24, dtype=I32)),
        "expected codes of 4 or 8 bits",
    ),
    "scales of other rows": (
        lambda: made("pack-quantized int4 g128", weight_scale=torch.ones(31, 2)),
        r"rows or blocks of \[32, 256\], got \[31, 2\]",
    ),
    "zero points of other rows": (
        lambda: made("pack-quantized int4 g64 asymmetric", weight_zero_point=torch.zeros(3, 4, dtype=I32)),
        r"expected \[4, 4\] of int32 in 'q.weight_zero_point', got int32 \[3, 4\]",
    ),
    "a block over two rows": (
        lambda: made("nf4 g64", bitsandbytes__nf4=state(shape=[64, 96], blocksize=64)),
        "blocks that divide the columns",
    ),
    "no blocksize": (lambda: made("nf4 g64", bitsandbytes__nf4=torch.zeros(3).byte()), "expected JSON with the shape"),
    "codes of another shape": (
        lambda: made("nf4 g64", bitsandbytes__nf4=state(shape=[64, 256])),
        "expected 8192 bytes in 'q.weight'",
    ),
    "an absmax too few": (lambda: made("fp4 g128", absmax=torch.ones(63)), r"expected \[64\] .*absmax.*\[63\]"),
    "blocks that are cut short": (
        lambda: {".weight": torch.zeros(128, 192).to(F8), ".weight_scale_inv": torch.ones(1, 2)},
        "blocks of 128 x 128 that divide the 192 columns",
    ),
    "float8 with zero points": (
        lambda: made("float-quantized channel", weight_zero_point=torch.ones(32, 1).to(F8)),
        "expected zero points of 0 beside float8",
    ),
    "nvfp4 without its scale": (
        lambda: made("nvfp4-pack-quantized", weight_global_scale=None),
        "'q.weight_global_scale' beside it",
    ),
    "nvfp4 with two": (
        lambda: made("nvfp4 of ModelOpt", weight_scale_2=torch.ones(2)),
        "expected one number in 'q.weight_scale_2'",
    ),
    "mxfp4 without scales": (
        lambda: {"_blocks": torch.zeros(2, 4, 8, 16, dtype=torch.uint8)},
        "'q_scales' beside it, got none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_decoded_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, why = REFUSED[case]
    with pytest.raises(CheckpointError, match=why) as error:
        find_matrices(stored(tmp_path, tensors()), {})
    assert "model.safetensors: tensor 'q" in str(error.value) and "\n" not in str(error.value)


def test_float8_with_zero_points_of_zero_is_symmetric(tmp_path: Path) -> None:
    tensors = made("float-quantized channel", weight_zero_point=torch.zeros(32, 1).to(F8))
    (matrix,), used = find_matrices(stored(tmp_path, tensors), {})
    assert matrix.format == "float8_e4m3fn channel" and used == {f"q{name}" for name in tensors}


@pytest.mark.parametrize("case", FORMS)
def test_tensors_of_a_form_are_all_accounted_for(tmp_path: Path, case: str) -> None:
    tensors = FORMS[case](SHAPE, torch.Generator().manual_seed(0))[0]
    (matrix,), used = find_matrices(stored(tmp_path, tensors), {})
    assert (matrix.name, matrix.shape) == ("q.weight", SHAPE) and used == {f"q{name}" for name in tensors}
    size = matrix.planes["codes"][0].num_bytes
    assert size == (SHAPE[0] * SHAPE[1] >> (0 if re.search("int8|float-|fp8|int-", case) else 1))


def test_plain_weights_and_activations_are_left_alone(tmp_path: Path) -> None:
    tensors = stored(
        tmp_path, {".weight": torch.ones(4, 4), ".input_scale": torch.ones(1), ".logit_scale": torch.ones(1)}
    )
    assert find_matrices(tensors, {}) == ([], set())
