"""What only a GPU shows, beside the kernels' bits (test_kernels.py): streams, copy engine, streamed modes alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_cases import DTYPES, assert_same_bits
from zoo import BY_NAME, Case

import distzo2
import distzo2_core

pytestmark = pytest.mark.cuda
MODES = ["device", "host", "disk"]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_kernels_run_on_the_current_stream(backend: str) -> None:
    """A launch goes behind the work that the current stream has: run before it, the zeroing would wipe it out."""
    if backend == "native" and not distzo2_core.build_info()["cuda"]:
        pytest.skip("distzo2_core._C was built without CUDA kernels")
    numel = 2**20
    place = {"seed": 1, "step": 0, "param": 0, "backend": backend}
    expected = distzo2_core.perturb_(torch.zeros(numel, device="cuda"), 1.0, **place)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        weights = torch.ones(numel, device="cuda")
        torch.cuda._sleep(50_000_000)
        weights.zero_()
        distzo2_core.perturb_(weights, 1.0, **place)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("source", ["host", "disk"])
def test_copy_engine_brings_blocks_there_and_back(source: str, tmp_path: Path) -> None:
    """Each block is uploaded, raised by one on the device and downloaded, through slots that begin poisoned."""
    sizes = [1 << 20, (1 << 20) + 4096, 12345, 1 << 20, 3 << 19, 64]
    content = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    staging = distzo2_core.HostPool([max(sizes)] * 4, "cuda:0")
    if source == "host":
        store = distzo2_core.HostPool(sizes, "cuda:0", pin=True)
        assert store.stats()["bytes_pinned"] >= sum(sizes)
        for block, value in enumerate(content):
            store.tensor(block).copy_(value)
    else:
        store = distzo2_core.BlockFile(str(tmp_path / "blocks"), sizes)
        for block, value in enumerate(content):
            store.write(block, value.data_ptr(), sizes[block])
    slots = [torch.full((max(sizes),), 0xA5, dtype=torch.uint8, device="cuda") for _ in range(3)]
    torch.cuda.synchronize()
    engine = distzo2_core.CopyEngine(
        "cuda:0", store, [slot.data_ptr() for slot in slots], max(sizes), None if source == "host" else staging
    )
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(2):
        for block, size in enumerate(sizes):
            slot = slots[engine.acquire(block, stream)]
            slot[:size].add_(1)
            engine.release(block, stream, dirty=True, version=0)
    engine.flush()
    back = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for block, value in enumerate(back):
        if source == "host":
            value.copy_(store.tensor(block))
        else:
            store.read(block, value.data_ptr(), sizes[block])
    engine.close()
    store.close()
    staging.close()
    for block, value in enumerate(back):
        assert torch.equal(value, content[block] + 2), block


def train(
    case: Case, weights: str, directory: Path, dtype: torch.dtype, max_lanes: int | None = None
) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses of three steps on the GPU, and the weights after them."""
    model = distzo2.offload(case.build().to(dtype), device="cuda", weights=weights, directory=directory)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=11, num_probes=2, max_lanes=max_lanes)
    losses = []
    for step in range(3):
        batch = {
            name: value.to("cuda", dtype if value.is_floating_point() else None)
            for name, value in case.batch(step).items()
        }

        def closure(batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
            output = model(**batch)
            return (output.loss if hasattr(output, "loss") else output).float()

        opt.step(closure)
        losses.append(opt.last.losses)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    distzo2.runtime_of(model).close()
    return losses, state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["opt-tied", "llama", "conv"])
def test_streamed_modes_have_the_bits_of_the_resident_one(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    results = {mode: train(BY_NAME[name], mode, tmp_path, dtype) for mode in MODES}
    losses, state = results["device"]
    for mode in ("host", "disk"):
        assert results[mode][0] == losses, mode
        for key, value in state.items():
            other = results[mode][1][key]
            assert_same_bits(other.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8), (mode, key))


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_the_caller_may_use_a_stream_of_its_own(weights: str, tmp_path: Path) -> None:
    """A default stream that is kept busy does not matter to a model that is stepped on another, and shares no order."""
    case = BY_NAME["llama"]
    expected = train(case, "device", tmp_path, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    with torch.cuda.stream(torch.cuda.Stream()):
        losses, state = train(case, weights, tmp_path, torch.bfloat16)
    assert losses == expected[0]
    for key, value in state.items():
        assert_same_bits(value, expected[1][key], key)


@pytest.mark.parametrize("max_lanes", [1, 3])
def test_waves_have_the_bits_of_one_pass(max_lanes: int, tmp_path: Path) -> None:
    case = BY_NAME["opt-tied"]
    expected = train(case, "host", tmp_path, torch.bfloat16)
    losses, state = train(case, "host", tmp_path, torch.bfloat16, max_lanes)
    assert losses == expected[0]
    for key, value in state.items():
        assert_same_bits(value, expected[1][key], key)


def _vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(2)
    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8,
                       patch_size=4, attn_implementation="eager")  # fmt: skip
    return ViTForImageClassification(config).float().eval()


def test_nested_windows(tmp_path: Path) -> None:
    """A ViT's owner uses parameters after an inner unit has been and gone."""

    def batch(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1])}

    case = Case("vit", _vit, batch)
    losses, state = train(case, "device", tmp_path, torch.float32)
    assert losses[0][0] != losses[0][1]
    for mode in ("host", "disk"):
        other = train(case, mode, tmp_path, torch.float32)
        assert other[0] == losses, mode
        for key, value in state.items():
            assert_same_bits(other[1][key], value, (mode, key))
