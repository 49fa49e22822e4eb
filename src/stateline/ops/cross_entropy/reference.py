"""cross_entropy, defined.

    loss = log Σ_j exp(x_j) − x_target          dx_j = (exp(x_j − log Σ exp) − [j = target]) · dloss

j runs over the first `classes` columns; later ones only pad the matrix. A row whose target is `ignore_index` has loss
and gradient 0, whatever it holds. In float32 (float64 where the data is), one rounding at the end.
Suffixes: r row, v column.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(logits: Tensor, targets: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logits (r, v), targets (r) -> loss (r), log Σ exp (r), 0 where ignored; both float32 (float64)."""
    real = compute_dtype(logits)
    ignored = targets == ignore_index
    x = logits[:, :classes].to(real)
    total = torch.logsumexp(x, 1)
    own = x.gather(1, targets.long().masked_fill(ignored, 0)[:, None])[:, 0]
    return (total - own).masked_fill(ignored, 0), total.masked_fill(ignored, 0)


def backward(
    dloss: Tensor, logits: Tensor, log_sum: Tensor, targets: Tensor, classes: int, ignore_index: int
) -> Tensor:
    """The gradient of logits (r, v), from the log Σ exp that `forward` returned."""
    ignored = targets == ignore_index
    grad = torch.zeros(logits.shape, dtype=compute_dtype(logits), device=logits.device)
    p = grad[:, :classes]
    torch.sub(logits[:, :classes].to(grad.dtype), log_sum[:, None], out=p).exp_()
    rows = torch.arange(len(targets), device=logits.device)
    p[rows, targets.long().masked_fill(ignored, 0)] -= 1
    p *= dloss[:, None]
    return grad.masked_fill_(ignored[:, None], 0).to(logits.dtype)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 data, else float32; also the dtype of losses."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
