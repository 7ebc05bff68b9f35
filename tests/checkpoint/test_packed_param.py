"""Bytes of packed parameters: where pieces begin, reads, and scales that no weight can be made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distzo2.checkpoint.packed_param import PackedParam, Piece, starts
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2_core.packed import Field, Kind, PackedLayout


def param(directory: Path, scales: torch.Tensor, kind: Kind, rows: int = 6) -> PackedParam:
    """[rows, 128] in groups of 32 whose scales, one line for every second row, begin at byte 3 of a file."""
    path = directory / "scales"
    path.write_bytes(b"abc" + bytes(scales.contiguous().view(torch.uint8).flatten().tolist()))
    codes = Piece.made(rows * 64, lambda: torch.zeros(rows * 64, dtype=torch.uint8))
    pieces = (codes, Piece(path, 3, scales.nbytes))
    line = 4 * scales.itemsize
    scale = Field(kind, starts(pieces)[1], row_stride=line, stride=scales.itemsize, rows=2, cols=32)
    layout = PackedLayout(rows, 128, 128, Field(Kind.NIBBLES_LOW, 0, 64), scale)
    return PackedParam("model.q.weight", (rows, 128), "test", pieces, layout)


def test_pieces_follow_each_other_from_multiples_of_64_bytes(tmp_path: Path) -> None:
    scales = torch.arange(12, dtype=torch.float32).view(3, 4)
    found = param(tmp_path, scales, Kind.FLOAT32, rows=5)
    assert starts(found.pieces) == [0, 320] and found.num_bytes == 320 + 48
    assert torch.equal(found.read()[320:].view(torch.float32).view(3, 4), scales)
    part = found.pieces[1].part(4, 8)
    assert (part.offset, part.read().view(torch.float32).tolist()) == (7, [1.0, 2.0])
    made = Piece.made(12, lambda: torch.arange(3, dtype=torch.int32)).part(4, 4)
    assert made.read().view(torch.int32).tolist() == [1]


@pytest.mark.parametrize(
    ("kind", "bad", "told"),
    [
        (Kind.FLOAT32, torch.tensor(torch.inf), "inf"),
        (Kind.FLOAT16, torch.tensor(torch.nan, dtype=torch.float16), "nan"),
        (Kind.BFLOAT16, torch.tensor(-torch.inf, dtype=torch.bfloat16), "-inf"),
        (Kind.FLOAT8_E4M3, torch.tensor(torch.nan).to(torch.float8_e4m3fn), "nan"),
        (Kind.E8M0, torch.tensor(255, dtype=torch.uint8), "255"),
    ],
)
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, kind: Kind, bad: torch.Tensor, told: str) -> None:
    scales = torch.ones(3, 4).to(bad.dtype)
    param(tmp_path, scales, kind).check_scales()
    scales[1, 3] = bad
    found = param(tmp_path, scales, kind)
    with pytest.raises(
        CheckpointError, match=rf"model.q.weight \(test\), row 2: expected finite .* scale, got {told}$"
    ):
        found.check_scales()


def test_scales_are_checked_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distzo2.checkpoint.packed_param.CHUNK_BYTES", 40)  # two lines
    scales = torch.ones(3, 4)
    scales[2, 0] = torch.nan
    with pytest.raises(CheckpointError, match="row 4:"):
        param(tmp_path, scales, Kind.FLOAT32).check_scales()


def test_a_file_that_is_too_short_is_told(tmp_path: Path) -> None:
    found = param(tmp_path, torch.ones(3, 4), Kind.FLOAT32)
    (tmp_path / "scales").write_bytes(b"abc" + bytes(40))
    with pytest.raises(CheckpointError, match="scales: truncated while it was read: expected 48 bytes at 3, got 40"):
        found.read()
    (tmp_path / "scales").unlink()
    with pytest.raises(CheckpointError, match="scales: cannot be opened: No such file"):
        found.read()
