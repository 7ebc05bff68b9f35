"""Safetensors files and strided layouts: what is refused, and that every element ends where it belongs."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_models import assert_checksums
from safetensors.torch import load_file, save_file

from distzo2.checkpoint import checkpoint_files
from distzo2.checkpoint.checkpoint_files import CheckpointFiles
from distzo2.checkpoint.layout import Layout, LayoutError
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor
from distzo2.checkpoint.symbols import LayoutTensor, Trace
from distzo2.checkpoint.torch_archive import TorchArchive
from distzo2.checkpoint.weight_files import (
    DTYPES,
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    bytes_of,
    sha256_file,
)
from distzo2.checkpoint.writing import CheckpointWriter


def write_raw(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64]
)
def test_reads_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(5, 7).mul(9).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "none": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            out = torch.empty_like(tensor)
            file.read(name, out)
            assert torch.equal(out, tensor)
        rows = torch.empty(2, 7, dtype=dtype)
        file.read("a", rows, begin=14)
        assert torch.equal(rows, tensors["a"][2:4])
        with pytest.raises(ValueError, match="cannot read elements"):
            file.read("a", rows, begin=22)


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    made = {torch.bfloat16: torch.randn(3, 5), torch.float64: torch.randn(7), torch.bool: torch.ones(3)}
    tensors = {str(dtype): tensor.to(dtype) for dtype, tensor in made.items()}
    tensors["empty"] = torch.empty(0, 4)
    path = tmp_path / "w.safetensors"
    writer = SafetensorsWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    for name, tensor in reversed(tensors.items()):
        assert writer.tensors[name].offset % tensor.dtype.itemsize == 0
        writer.write_bytes(bytes_of(tensor), writer.tensors[name].offset)
    writer.close()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert len(sha256_file(path)) == 64
    with pytest.raises(FileExistsError):
        SafetensorsWriter(path, {})
    assert set(DTYPES.values()) >= {t.dtype for t in tensors.values()}


BAD_FILES = {
    "empty": (b"", "at least 8 bytes"),
    "no_header": (struct.pack("<Q", 400) + b"{}", "announces a header of 400 bytes"),
    "huge_header": (struct.pack("<Q", 2**63) + b"{}", "announces a header of 9223372036854775808 bytes"),
    "not_json": (struct.pack("<Q", 4) + b"{\x00a}", "header in JSON"),
    "not_utf8": (struct.pack("<Q", 2) + b"\xff\xfe", "header in JSON"),
    "not_an_object": (struct.pack("<Q", 2) + b"[]", "expected a JSON object"),
    "deep": (struct.pack("<Q", 200000) + b"[" * 200000, "header in JSON"),
    "pickle": (b"PK\x03\x04" + b"\x00" * 40, "announces a header"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


BAD_HEADERS = {
    "unknown dtype": ({"t": entry(dtype="F31")}, "expected a dtype among"),
    "dtype is a list": ({"t": entry(dtype=["F32"])}, "expected a dtype among"),
    "negative size": ({"t": entry(shape=[-2, 3])}, "expected a shape of"),
    "size is a flag": ({"t": entry(shape=[True, 6])}, "expected a shape of"),
    "size is text": ({"t": entry(shape="23")}, "expected a shape of"),
    "one offset": ({"t": entry(offsets=[24])}, "data_offsets"),
    "offsets reversed": ({"t": entry(offsets=[24, 0])}, "expected 24 bytes"),
    "too few bytes": ({"t": entry(offsets=[0, 20])}, "expected 24 bytes for F32"),
    "no shape": ({"t": {"dtype": "F32", "data_offsets": [0, 24]}}, "expected dtype, shape and data_offsets"),
    "a number": ({"t": 3}, "expected dtype, shape and data_offsets"),
    "hole": ({"t": entry(offsets=[4, 28])}, "a hole or an overlap"),
    "overlap": ({"t": entry(), "u": entry(offsets=[12, 36])}, "a hole or an overlap"),
    "too long": ({"t": entry(shape=[1], offsets=[0, 4])}, "too long: expected"),
    "twice": (b'{"t":%s,"t":%s}' % ((json.dumps(entry()).encode(),) * 2), "'t' occurs twice"),
    "bad metadata": ({"__metadata__": [1], "t": entry()}, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_disagrees_is_refused(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "bad.safetensors", header, bytes(24))
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("lost", [1, 100, 2000])
def test_a_truncated_file_is_refused(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.randn(20, 30)}, path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(CheckpointError, match="truncated: expected"):
        SafetensorsFile(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.randn(4), "b": torch.randn(3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


def test_bin_files_are_read_in_place(tmp_path: Path) -> None:
    base = torch.randn(6, 5)
    tensors = {
        "whole": base, "rows": base[2:4], "half": torch.randn(3).half(), "long": torch.tensor(7),
        "param": torch.nn.Parameter(torch.randn(2, 2)), "none": torch.empty(0, 3), "bf16": torch.ones(3).bfloat16(),
    }  # fmt: skip
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path)
    with TorchArchive(path) as file:
        assert list(file.tensors) == list(tensors)
        for name, tensor in tensors.items():
            out = torch.empty(tensor.shape, dtype=tensor.dtype)
            file.read(name, out)
            assert torch.equal(out, tensor), name
    whole = path.read_bytes()
    for length in (0, 10, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"expected an archive that torch.save wrote|at least") as error:
            TorchArchive(path)
        assert "\n" not in str(error.value)


class Payload:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch it-ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": Payload()}, "posix.system has no place in a file of weights"),
        ({"state_dict": {"w": torch.ones(2)}}, "a flat dictionary of tensors"),
        ([torch.ones(2)], "a flat dictionary of tensors"),
        ({"w": torch.ones(2, 3).t()}, "'w' is not contiguous"),
        ({"w": torch.ones(2).to_sparse()}, "has no place in a file of weights"),
    ],
)
def test_bin_files_with_more_than_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        TorchArchive(tmp_path / "pytorch_model.bin")
    assert not Path("it-ran").exists()


def test_old_and_compressed_bin_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"expected an archive that torch\.save wrote"):
        TorchArchive(path)
    torch.save({"w": torch.ones(2000)}, path)
    for name, message in (
        ("data/0", "expected 8000 stored bytes in data/0"),
        ("data.pkl", "expected stored bytes in data.pkl"),
        ("byteorder", "expected stored bytes in byteorder"),
    ):
        with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "small.bin", "w") as small:
            for info in stored.infolist():
                kind = zipfile.ZIP_DEFLATED if info.filename.endswith(name) else zipfile.ZIP_STORED
                small.writestr(info.filename, stored.read(info), kind)
        with pytest.raises(CheckpointError, match=message):
            TorchArchive(tmp_path / "small.bin")


# Layouts: random chains of operations on symbols against the same on tensors.


def random_step(rng: random.Random, pool: list) -> tuple[torch.Tensor, LayoutTensor] | None:
    real, symbol = rng.choice(pool)
    dims = real.dim()
    kind = rng.choice(["transpose", "chunk", "cat", "stack", "reshape", "select", "slice", "permute"])
    if kind == "stack":
        other = rng.choice([pair for pair in pool if pair[0].shape == real.shape])
        dim = rng.randrange(dims + 1)
        if dims < 4 and real.numel() < 2000:
            return torch.stack([real, other[0]], dim), torch.stack([symbol, other[1]], dim)
        return None
    if kind == "reshape":
        sizes, rest = [], real.numel()
        while rest > 1 and len(sizes) < 4:
            sizes.append(rng.choice([d for d in range(2, rest + 1) if rest % d == 0]))
            rest //= sizes[-1]
        sizes.append(rest)
        rng.shuffle(sizes)
        return real.reshape(sizes), symbol.reshape(sizes)
    if not dims:
        return None
    dim = rng.randrange(dims)
    size = real.shape[dim]
    if kind == "transpose":
        other = rng.randrange(dims)
        return real.transpose(dim, other).contiguous(), symbol.transpose(dim, other).contiguous()
    if kind == "permute":
        order = rng.sample(range(dims), dims)
        return real.permute(order).contiguous(), symbol.permute(order).contiguous()
    if kind == "chunk":
        number = rng.randrange(len(real.chunk(3, dim)))
        return real.chunk(3, dim)[number], symbol.chunk(3, dim)[number]
    if kind == "select":
        index = rng.randrange(size)
        return real.select(dim, index), symbol.select(dim, index)
    if kind == "slice":
        begin = rng.randrange(size)
        end = rng.randrange(begin + 1, size + 1)
        return real.narrow(dim, begin, end - begin), symbol.narrow(dim, begin, end - begin)
    mates = [
        pair for pair in pool
        if pair[0].dim() == dims and all(pair[0].shape[d] == real.shape[d] for d in range(dims) if d != dim)
    ]  # fmt: skip
    other = rng.choice(mates)
    if real.numel() + other[0].numel() > 4000:
        return None
    return torch.cat([real, other[0]], dim), torch.cat([symbol, other[1]], dim)


@pytest.mark.parametrize("seed", range(40))
def test_symbols_follow_tensors_and_files_follow_symbols(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    # A small scratch block, so that pieces are cut into many.
    monkeypatch.setattr(checkpoint_files, "SCRATCH_BYTES", rng.choice([8, 64, 500]))
    shapes = [(4, 6), *(tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randrange(4))) for _ in range(2))]
    names = ["a", "b", "c"]
    generator = torch.Generator().manual_seed(seed)
    real = [torch.randn(shape, generator=generator) for shape in shapes]
    save_file(dict(zip(names, real, strict=True)), tmp_path / "model.safetensors")
    files = CheckpointFiles(tmp_path)
    trace = Trace([e.name for e in files.entries], files.equal)
    pool: list = []
    for number, e in enumerate(files.entries):
        pool.append((real[names.index(e.name)], LayoutTensor(Layout.leaf(number, e.shape), e.dtype, trace)))
    for _ in range(12):
        made = random_step(rng, pool)
        if made is None:
            continue
        tensor, symbol = made
        assert symbol.shape == tensor.shape == symbol.where.shape
        assert torch.equal(files.read_layout(symbol.where, torch.float32), tensor)
        assert torch.equal(files.read_layout(symbol.to(torch.bfloat16).where, torch.bfloat16), tensor.bfloat16())
        assert trace.equal(symbol, symbol)
        pool.append((tensor, symbol))


@pytest.mark.parametrize("seed", range(10))
def test_writing_runs_the_pieces_backwards(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(checkpoint_files, "SCRATCH_BYTES", 64)
    monkeypatch.setattr("distzo2.checkpoint.writing.SCRATCH_BYTES", 64)
    (tmp_path / "in").mkdir()
    stored = {"x": torch.randn(8, 6), "y": torch.randn(4, 6, 2), "z": torch.randn(8, 6)}
    save_file(stored, tmp_path / "in" / "model.safetensors")
    files = CheckpointFiles(tmp_path / "in")
    trace = Trace([e.name for e in files.entries])
    x, y, z = (
        LayoutTensor(Layout.leaf(n, e.shape), e.dtype, trace)
        for n, e in sorted(enumerate(files.entries), key=lambda item: item[1].name)
    )
    # A split and transposed source, an interleaved one, and two joined, as in converted checkpoints.
    left, right = x.t().contiguous().split([2, 4])
    params = {
        "left": left,
        "joined": torch.cat([z.reshape(4, 2, 6).transpose(0, 1).reshape(8, 6), right.reshape(8, 4)], 1),
        "even": y.unbind(2)[0],
        "odd": y.unbind(2)[1].t(),
    }
    mapped = {n: MappedTensor(n, torch.float32, tuple(s.shape), s.where.pieces) for n, s in params.items()}
    plan = CheckpointMap(files.entries, mapped, files=files)
    order = list(params)
    rng.shuffle(order)
    with CheckpointWriter(plan, tmp_path / "out") as writer:
        for name in order:
            value = torch.empty(mapped[name].shape)
            plan.read_param(name, value)
            if rng.random() < 0.5:
                writer.write_param(name, value)
            else:
                middle = rng.randrange(1, len(value))
                writer.write_range(name, middle, len(value), value[middle:])
                writer.write_range(name, 0, middle, value[:middle])
    assert_checksums(writer.checksums, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys() and all(torch.equal(written[n], stored[n]) for n in stored)


def test_reading_needs_one_scratch_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = checkpoint_files.scratch

    def watched(dtype: torch.dtype, numel: int) -> torch.Tensor:
        asked.append(numel * dtype.itemsize)
        return real(dtype, numel)

    monkeypatch.setattr(checkpoint_files, "scratch", watched)
    monkeypatch.setattr(checkpoint_files, "SCRATCH_BYTES", 1 << 16)
    weight = torch.randn(300, 500)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    files = CheckpointFiles(tmp_path)
    symbol = LayoutTensor(Layout.leaf(0, (300, 500)), torch.float32, Trace(["w"]))
    assert torch.equal(files.read_layout(symbol.t().where, torch.float32), weight.t())
    assert len(asked) >= weight.numel() * 4 // (1 << 16) and max(asked) <= 1 << 16
    asked.clear()
    assert torch.equal(files.read_layout(symbol.where, torch.float32), weight)
    assert not asked  # the same layout and dtype: straight into its place


def test_what_symbols_cannot_express_is_refused() -> None:
    trace = Trace(["a", "b"])
    a, b = (LayoutTensor(Layout.leaf(n, (4, 6)), torch.float32, trace) for n in range(2))
    cases = {
        "a, b: aten.add": a + b,
        "a: a slice with step 2": a[::2],
        "a: repeating [4, 6]": a.expand(3, 4, 6),
        "a: a second conversion, from torch.bfloat16": a.bfloat16().float(),
        "a: aten.sum": a.sum(),
        "b: aten.mul": torch.cat([a, 2 * b]).t()[:2],
    }
    for problem, result in cases.items():
        assert result.problem.startswith(problem), result.problem
    assert cases["b: aten.mul"].shape == (2, 8) and cases["b: aten.mul"].zero_() is cases["b: aten.mul"]
    with pytest.raises(LayoutError, match=r"a: aten.fill_.Scalar computes"):
        a[1].fill_(0)  # the values of a checkpoint are not changed unseen
    with pytest.raises(LayoutError, match=r"a: the values of a checkpoint are compared"):
        torch.equal(a, torch.ones(4, 6))
