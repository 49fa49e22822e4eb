"""Keeps chosen parameters in full precision while the rest of a model is cast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def wide(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of states and of parameters that are never rounded: float64 beside float64 data, else float32.

    `dtype`: the data's; None means PyTorch's default.

    >>> wide(torch.bfloat16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32


def keep_wide(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`convert` (what nn.Module._apply maps over parameters), except that it never narrows below float32.

    Moves, copies and casts to float32 or float64 pass through; under a cast to 16 bits or fewer only the move happens.
    """

    def careful(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        if converted.is_floating_point() and converted.dtype.itemsize < torch.float32.itemsize:
            # From the original, not from `converted`: that one is rounded already.
            return tensor.to(device=converted.device, dtype=torch.float32)
        return converted

    return careful


def full_precision_names(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers that keep full precision, as modules list them in `full_precision`."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(type(module), "full_precision", ())
        if getattr(module, name) is not None
    }
