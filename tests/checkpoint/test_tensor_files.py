"""Files of weights, safetensors and PyTorch: every tensor has its bytes, and damaged files are refused in one line."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_models import read_tensor
from hostile_files import raw_file, refused
from safetensors.torch import load_file, save_file

from distzo2.checkpoint.tensor_files import (
    DTYPES,
    MAX_SMALL_HEADER_BYTES,
    CheckpointError,
    SafetensorsWriter,
    TensorFile,
    bytes_of,
)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(5, 7).mul(3).to(dtype) for dtype in DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt"})
    with TensorFile(tmp_path / "f.safetensors") as file:
        assert file.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = read_tensor(file, name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert bytes(bytes_of(found)) == bytes(bytes_of(tensor)), name


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    made = {torch.bfloat16: torch.randn(3, 5), torch.float64: torch.randn(7), torch.bool: torch.ones(3)}
    tensors = {str(dtype): tensor.to(dtype) for dtype, tensor in made.items()}
    tensors["empty"] = torch.empty(0, 4)
    path = tmp_path / "w.safetensors"
    with SafetensorsWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name, tensor in reversed(tensors.items()):
            assert writer.tensors[name].offset % tensor.dtype.itemsize == 0
            writer.write_bytes(bytes_of(tensor), writer.tensors[name].offset)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())
    with pytest.raises(FileExistsError):
        SafetensorsWriter(path, {})
    with pytest.raises(CheckpointError, match="complex128 cannot be stored"):
        SafetensorsWriter(tmp_path / "c", {"a": (torch.complex128, (1,))})


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_FILES = {
    "empty": b"",
    "no header": struct.pack("<Q", 400) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"{\x00a}",
    "deep": struct.pack("<Q", 200000) + b"[" * 200000,
    "pickle": b"PK\x03\x04" + b"\x00" * 40,
    "unknown dtype": raw_file({"t": entry(dtype="F31")}),
    "dtype of half a byte": raw_file({"t": entry(dtype="F4", shape=[48])}),
    "negative size": raw_file({"t": entry(shape=[-2, 3])}),
    "too few bytes": raw_file({"t": entry(offsets=[0, 20])}),
    "hole": raw_file({"t": entry(offsets=[4, 28])}),
    "overlap": raw_file({"t": entry(), "u": entry(offsets=[12, 36])}),
    "truncated": raw_file({"t": entry()}, bytes(23)),
    "huge": raw_file({"t": entry(shape=[2**62, 4])}),
    "huge and empty": raw_file({"t": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, b""),
    "too many dimensions": raw_file({"t": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)),
    "long header": raw_file(b"{" + b" " * MAX_SMALL_HEADER_BYTES + b"}"),
    "longer than the file": struct.pack("<Q", 2**63 + 5) + b"{}",
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_FILES[case])
    assert refused(lambda: TensorFile(path), CheckpointError, f"{path}: ") < 1 << 20


def test_bin_files_are_read_in_place(tmp_path: Path) -> None:
    base = torch.randn(6, 5)
    tensors = {
        "whole": base, "rows": base[2:4], "half": torch.randn(3).half(), "long": torch.tensor(7),
        "param": torch.nn.Parameter(torch.randn(2, 2)), "none": torch.empty(0, 3), "bf16": torch.ones(3).bfloat16(),
        "bool": torch.tensor([True, False]),
    }  # fmt: skip
    path = tmp_path / "pytorch_model.bin"
    for content in (tensors, torch.nn.Linear(2, 3).state_dict(), torch.nn.ParameterDict({"a": base}).state_dict()):
        torch.save(content, path)
        with TensorFile(path) as file:
            assert list(file.tensors) == list(content)
            for name, tensor in content.items():
                found = read_tensor(file, name)
                assert found.dtype == tensor.dtype and found.shape == tensor.shape
                assert bytes(bytes_of(found)) == bytes(bytes_of(tensor.contiguous())), name
    whole = path.read_bytes()
    for length in (0, 10, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(lambda: TensorFile(path), CheckpointError, "expected an archive that torch.save wrote")


class Payload:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch it-ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": Payload()}, "posix.system has no place in a file of weights"),
        ({"w": bytearray(3)}, "has no place in a file of weights"),
        ({"state_dict": {"w": torch.ones(2)}}, r"save torch.load(file)['state_dict'] alone"),
        (
            {"epoch": 3, "model": {"w": torch.ones(2)}, "optimizer": {"state": {}}},
            r"save torch.load(file)['model'] alone",
        ),
        (
            {"a": {"b": {"w": torch.ones(2), "v": torch.ones(2), "n": 3}}},
            r"torch.load(file)['a']['b'] without 'n' alone",
        ),
        ({"w": torch.ones(2), "v": torch.ones(2), "step": 7}, r"save torch.load(file) without 'step' alone"),
        ([torch.ones(2)], "a flat dictionary of tensors"),
        ({7: torch.ones(2)}, "tensor 7: expected a name, and at most 64 dimensions"),
        ({"w": torch.ones(1).expand(10**9)}, "'w': shape (1000000000,) repeats few bytes"),
        ({"w": torch.ones(2).to_sparse()}, "has no place in a file of weights"),
    ],
)
def test_bin_files_with_more_than_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(lambda: TensorFile(tmp_path / "pytorch_model.bin"), CheckpointError, message)
    assert not Path("it-ran").exists()


def test_old_and_rewritten_bin_files_are_refused(tmp_path: Path) -> None:
    """A tool that packs the archive again, compressed or not, moves storages: they are never taken from elsewhere."""
    path, other = tmp_path / "pytorch_model.bin", tmp_path / "other.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(lambda: TensorFile(path), CheckpointError, "expected an archive that torch.save wrote")
    torch.save({"w": torch.ones(2000), "v": torch.zeros(2000)}, path)

    def pack(changed: str, kind: int = zipfile.ZIP_STORED, data: bytes | None = None) -> None:
        with zipfile.ZipFile(path) as stored, zipfile.ZipFile(other, "w") as archive:
            for info in stored.infolist():
                mine = info.filename.endswith(changed)
                content = data if mine and data is not None else stored.read(info)
                archive.writestr(info.filename, content, kind if mine else zipfile.ZIP_STORED)

    for name in ("data/0", "data.pkl", "byteorder"):
        pack(name, zipfile.ZIP_DEFLATED)
        refused(lambda: TensorFile(other), CheckpointError, f"expected stored bytes in '{name}', got compressed ones")
    pack("byteorder", data=b"big")
    refused(lambda: TensorFile(other), CheckpointError, "expected little-endian tensors")
    pack("data/0", data=bytes(7996))
    refused(lambda: TensorFile(other), CheckpointError, "expected 8000 bytes at byte 0 of a member of the archive")
    pack("nothing")
    try:
        file = TensorFile(other)
    except CheckpointError as error:
        assert "of a member of the archive" in str(error)
    else:
        assert torch.equal(read_tensor(file, "v"), torch.zeros(2000))
