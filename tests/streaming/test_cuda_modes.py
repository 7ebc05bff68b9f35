"""On a GPU, weights on the device, in host memory and on disk give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_models import IDS, adapted
from kernel_cases import DTYPES
from same_bits import assert_same
from zoo import BY_NAME, Case

import distzo2

pytestmark = pytest.mark.cuda
State = dict[str, torch.Tensor]


def train(
    case: Case, weights: str, directory: Path, dtype: torch.dtype, max_lanes: int | None = None
) -> tuple[list, State]:
    """Losses of three steps on the GPU, and the weights after them."""
    model = distzo2.offload(case.build().to(dtype), device="cuda", weights=weights, directory=directory)
    opt = distzo2.ZOSGD(model, lr=1e-2, eps=1e-3, seed=11, num_probes=2, max_lanes=max_lanes)
    losses = []
    for step in range(3):
        opt.step(case.closure(model, step, dtype, "cuda"))
        losses.append(opt.last.losses)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    distzo2.runtime_of(model).close()
    return losses, state


def _vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(2)
    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8,
                       patch_size=4, attn_implementation="eager")  # fmt: skip
    return ViTForImageClassification(config).float().eval()


def _pixels(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1])}


ADAPTED = Case("adapted", adapted, lambda step: {"ids": (IDS + step) % 32})  # a frozen base streams one way
NESTED = Case("vit", _vit, _pixels)  # its owner uses parameters after an inner unit has been and gone
CASES = [(BY_NAME[name], dtype) for name in ("opt-tied", "llama", "conv") for dtype in DTYPES]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*CASES, (NESTED, torch.float32), (ADAPTED, torch.float32)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_streamed_modes_have_the_bits_of_the_resident_one(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    resident = train(case, "device", tmp_path, dtype)
    assert resident[0][0][0] != resident[0][0][1]
    for mode in ("host", "disk"):
        assert_same(train(case, mode, tmp_path, dtype), resident)


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_the_caller_may_use_a_stream_of_its_own(weights: str, tmp_path: Path) -> None:
    """A default stream that is kept busy does not matter to a model that is stepped on another, and shares no order."""
    case = BY_NAME["llama"]
    expected = train(case, "device", tmp_path, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_same(train(case, weights, tmp_path, torch.bfloat16), expected)


@pytest.mark.parametrize("max_lanes", [1, 3])
def test_waves_have_the_bits_of_one_pass(max_lanes: int, tmp_path: Path) -> None:
    case = BY_NAME["opt-tied"]
    expected = train(case, "host", tmp_path, torch.bfloat16)
    assert_same(train(case, "host", tmp_path, torch.bfloat16, max_lanes), expected)


def test_lanes_share_a_workspace(tmp_path: Path) -> None:
    """What stays allocated after a step does not grow with the number of lanes, each of which has a thread."""
    import gc

    left = []
    for probes in (1, 12):
        model = distzo2.offload(BY_NAME["llama"].build().to(torch.bfloat16), device="cuda", weights="device")
        opt = distzo2.ZOSGD(model, lr=1e-2, num_probes=probes)
        opt.step(BY_NAME["llama"].closure(model, 0, torch.bfloat16, "cuda"))
        gc.collect()
        left.append(torch.cuda.memory_allocated())
        distzo2.runtime_of(model).close()
        del model, opt
        gc.collect()
    assert left[1] - left[0] < 16 * 2**20


def test_losses_are_read_without_a_copy() -> None:
    from distzo2.optim.step_lanes import _read

    values = [torch.tensor(x, dtype=torch.float64, device="cuda") for x in (0.1, -3.5, float("inf"))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert _read(values) == [0.1, -3.5, float("inf")]
    assert not [event for event in profile.events() if "Memcpy" in event.name and "DtoH" in event.name]
