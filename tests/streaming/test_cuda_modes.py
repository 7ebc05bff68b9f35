"""On a GPU, weights on the device, in host memory and on disk give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_cases import DTYPES, assert_same_bits
from zoo import BY_NAME, Case

import distzo2

pytestmark = pytest.mark.cuda
MODES = ["device", "host", "disk"]


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
