"""Matrices in eight bits, as checkpoints store them: whole numbers from −127 to 127 and a scale for each row.

The scale makes a row's largest magnitude ±127, so that `prepare_for_decode(model, "int8")` packs a matrix that was
read from such a file as the very same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

SCALES = ".scales"  # what is added to a matrix's name


class RoundingError(ValueError):
    """A matrix cannot be rounded, or stored numbers and scales do not belong together; the message names it."""


def rounded(tensors: Mapping[str, Tensor], exact: Collection[str]) -> dict[str, Tensor]:
    """Every matrix (rows, columns) not named in `exact` as int8, with its scales (rows) float32; the rest as it is.

    Raises RoundingError for numbers that are not finite.

    >>> sorted(rounded({"w": torch.eye(2), "b": torch.ones(2)}, exact=[]))
    ['b', 'w', 'w.scales']
    """
    found = {}
    for name, x in tensors.items():
        if x.dim() != 2 or name in exact:
            found[name] = x
            continue
        scales = x.float().abs().amax(1) / 127
        if not scales.isfinite().all():
            raise RoundingError(f"{name} holds numbers that are not finite")
        whole = torch.where(scales == 0, 1.0, scales)[:, None]
        found[name] = (x.float() / whole).round_().clamp_(-127, 127).to(torch.int8)
        found[name + SCALES] = scales
    return found


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `rounded` was given, float32 where it was rounded; tensors without scales as they are.

    Raises RoundingError for scales that fit no matrix of whole numbers.
    """
    found = {name: x for name, x in tensors.items() if not name.endswith(SCALES)}
    for name, scales in tensors.items():
        if name.endswith(SCALES):
            matrix = name.removesuffix(SCALES)
            x = tensors.get(matrix)
            if x is None or x.dtype != torch.int8 or scales.shape != x.shape[:1] or not scales.is_floating_point():
                got = "missing" if x is None else f"{x.dtype} {tuple(x.shape)} beside scales {tuple(scales.shape)}"
                raise RoundingError(f"{matrix} is {got}, expected int8 (rows, columns) beside scales (rows,)")
            found[matrix] = x.float() * scales.float()[:, None]
    return found
