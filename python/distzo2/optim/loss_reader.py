"""What closures return, as float64 losses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distzo2.errors import DistZO2Error


class LossReader:
    """Each lane's loss, a mean in float64; one transfer for all where they are on a device. Warns once of losses in 16
    bits: a step is made of their differences."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, results: Sequence[Any]) -> np.ndarray:
        """float64 [results], of tensors (a scalar or per-example losses) or numbers.

        Raises:
            DistZO2Error: one is neither, or empty.
        """
        if not results:
            return np.zeros(0)
        means = []
        for result in results:
            if isinstance(result, torch.Tensor):
                if result.dtype in (torch.float16, torch.bfloat16) and not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"the closure returned a {result.dtype} loss: a step is made of differences of losses, so "
                        "compute the loss in float32",
                        stacklevel=4,
                    )
                if result.numel() == 0:
                    raise DistZO2Error("the closure returned an empty tensor; a loss was expected")
                means.append(result.detach().double().mean())
            else:
                try:
                    means.append(torch.tensor(float(result), dtype=torch.float64))
                except (TypeError, ValueError):
                    raise DistZO2Error(
                        f"the closure returned {type(result).__name__}; a loss was expected (a tensor or a number)"
                    ) from None
        return torch.stack([m.to(means[0].device) for m in means]).cpu().numpy()
