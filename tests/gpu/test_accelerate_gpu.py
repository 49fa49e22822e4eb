"""Models of transformers on a CUDA device: the same numbers as their own code there, from our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_models import KINDS, KINDS2, assert_close, cached, in_pieces, padded, pair, worst_gradient
from where import INTERPRETED

from stateline import ops

pytestmark = pytest.mark.skipif(INTERPRETED, reason="models on a device need one, not Triton's interpreter")


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would round the inputs of transformers' own float32 convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The devices on which our scans were called."""
    seen: list[str] = []
    for name in ("selective_scan", "selective_scan_step_", "ssd", "ssd_step_"):
        plain = getattr(ops, name)

        def told(x: torch.Tensor, *rest: Any, plain: Any = plain, **options: Any) -> Any:
            seen.append(x.device.type)
            return plain(x, *rest, **options)

        monkeypatch.setattr(ops, name, told)
    yield seen
    assert set(seen) == {"cuda"}, "the scans were not ours"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind: str, scans: list[str]) -> None:
    fast, slow = pair(kind, "cuda")
    ids, mask = padded("cuda")
    logits = []
    for model in (fast, slow):
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        logits.append(out.logits.detach())
    assert_close(*logits)
    assert worst_gradient(fast, slow) < 2e-5  # the bound of operations


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_as_near_the_truth_as_transformers(kind: str, scans: list[str]) -> None:
    fast, slow = pair(kind, "cuda")
    ids, mask = padded("cuda")
    with torch.no_grad():
        truth = slow(ids, attention_mask=mask).logits
        errors = []
        for model in (fast, slow):
            logits = model.to(torch.bfloat16)(ids, attention_mask=mask).logits
            errors.append(float((logits.float() - truth).abs().mean()))
    assert errors[0] <= 1.25 * errors[1], errors
    fast(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", cached(KINDS))
@torch.no_grad()
def test_pieces_and_single_tokens_after_a_cache_equal_the_whole(kind: str, scans: list[str]) -> None:
    fast, slow = pair(kind, "cuda")
    ids = torch.randint(61, (2, 12), device="cuda")
    whole = slow(ids).logits
    for lengths in ([5, 2, 1, 4], [1] * 12):
        assert_close(torch.cat(in_pieces(fast, kind, ids, lengths), 1), whole)


@pytest.mark.parametrize("kind", cached(KINDS))
def test_generation_token_for_token(kind: str, scans: list[str]) -> None:
    fast, slow = pair(kind, "cuda")
    ids, mask = padded("cuda")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **options), slow.generate(ids, **options))


@pytest.mark.parametrize("kind", cached(KINDS2))
@torch.no_grad()
def test_step_limits_hold_for_single_tokens_too(kind: str, scans: list[str]) -> None:
    limits = {"time_step_min": 0.7} if kind in ("zamba2", "nemotron_h") else {"time_step_limit": [0.6, 0.8]}
    fast, slow = pair(kind, "cuda", **limits)
    ids, _ = padded("cuda")
    assert_close(torch.cat(in_pieces(fast, kind, ids, [1] * 13), 1), slow(ids).logits)
