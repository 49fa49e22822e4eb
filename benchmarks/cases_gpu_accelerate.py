"""Mixers of transformers on a GPU as they come, and the same modules after `accelerate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from benchmarks.cases import OURS
from benchmarks.cases_accelerate import D_MODEL, FORWARD, mixer, work
from benchmarks.cases_gpu import BF16, DEVICE, Case
from benchmarks.measure import Work

from stateline.interop.transformers import accelerate


def accelerated() -> Iterator[Case]:
    """One mixer of Mamba and one of Mamba-2, forward, and with gradients of everything."""
    if not find_spec("transformers"):
        return
    for name, needs in (("mamba", ("causal_conv1d", "selective_scan")), ("mamba2", ("causal_conv1d",))):
        for backward in (False, True):

            def make(name: str = name, backward: bool = backward) -> dict[str, Work]:
                slow = mixer(name).to(DEVICE, BF16)
                fast = copy.deepcopy(slow)
                accelerate(fast)
                x = torch.randn(1, FORWARD, D_MODEL, device=DEVICE, dtype=BF16)
                return {OURS: work(fast, x, backward), "transformers": work(slow, x, backward)}

            op = f"accelerate {name} {'fwd+bwd' if backward else 'fwd'}"
            # transformers' own scan launches several kernels a token
            yield Case(op, f"b1 t{FORWARD} d{D_MODEL}", make, needs, tokens=FORWARD, many=True)
