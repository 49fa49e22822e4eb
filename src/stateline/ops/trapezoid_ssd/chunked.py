"""trapezoid_ssd as matrix products, in PyTorch: the fast form where there is no kernel of our own.

What token j adds to a later one is known when token j + 1 is: its own end of its trapezoid, blend dt, and the next
one's other end, (1 − blend) dt. So a chunk is a masked matrix, (q kᵀ) ∘ L with L[i, j] = exp of the sum of dt·A from
step j + 1 to i times that sum, and blend dt alone on the diagonal; chunks hand a state on, which is the definition's
plus the next token's end of its trapezoid. Exponents and angles are summed in float64.

Suffixes: b batch, c chunk, q and k steps of a chunk, h head, r rank, p head width, n state. Time runs forwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops.trapezoid_ssd.reference import Piece, State, backward_by, forward_by, outer, step, whole

__all__ = ["backward", "forward", "step"]

#: Rows of a chunk's matrix: steps times ranks, where a chunk has as many steps as `FEWEST`.
ROWS, FEWEST = 64, 16


def split(v_bthx: Tensor, steps: int) -> Tensor:
    """(b, t, h, …) -> (b, c, h, q, …), zeros after the last step."""
    v = F.pad(v_bthx, [0, 0] * (v_bthx.dim() - 2) + [0, -v_bthx.shape[1] % steps])
    return v.unflatten(1, (-1, steps)).transpose(2, 3)


def join(v_bchqx: Tensor, t: int) -> Tensor:
    """The inverse of `split`."""
    return v_bchqx.transpose(2, 3).flatten(1, 2)[:, :t]


def spread(L_bchqk: Tensor, r: int) -> Tensor:
    """(b, c, h, q, k) -> (b, c, h, q·r, k·r), the same for all ranks."""
    b, c, h, q, k = L_bchqk.shape
    return L_bchqk[:, :, :, :, None, :, None].expand(b, c, h, q, r, k, r).reshape(b, c, h, q * r, k * r)


def scan(piece: Piece, state: State) -> tuple[Tensor, State]:
    """reference.scan, a chunk at a time."""
    angle, S, k, x = state
    real, (t, r) = S.dtype, (piece.x_bthp.shape[1], piece.K_bthrn.shape[3])
    steps = max(FEWEST, ROWS // r)
    newer, older = piece.weights()
    S = S + older[:, 0, :, None, None] * outer(piece.values(x), k)
    weight = newer + F.pad(older[:, 1:], (0, 0, 0, 1))
    angles = whole(angle[:, None].double() + piece.turns_bths.double().cumsum(1)).to(real)
    K, Q, V = piece.turned(piece.K_bthrn, angles), piece.turned(piece.Q_bthrn, angles), piece.values(piece.x_bthp)

    total = split(piece.dt_bth * piece.A_bth, steps).double().cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]
    later = torch.ones(steps, steps, dtype=torch.bool, device=gap.device).triu()
    L = gap.masked_fill(later, -torch.inf).exp().to(real) * split(weight, steps)[..., None, :]
    L = L + torch.diag_embed(split(newer, steps))
    enter, leave = total.exp().to(real), (total[..., -1:] - total).exp().to(real) * split(weight, steps)

    k_rows, q_rows, v_rows = (split(v, steps).flatten(3, 4) for v in (K, Q, V))  # (b, c, h, q·r, …)
    L, enter_rows, leave_rows = (
        spread(L, r),
        *(v[..., None].expand(*v.shape, r).flatten(3)[..., None] for v in (enter, leave)),
    )
    matrix = (q_rows @ k_rows.mT) * L
    gain = (v_rows * leave_rows).mT @ k_rows
    before = []
    for decay, more in zip(enter[..., -1, None, None].unbind(1), gain.unbind(1), strict=True):
        before.append(S)
        S = decay * S + more
    y = matrix @ v_rows + enter_rows * (q_rows @ torch.stack(before, 1).mT)
    y = join(y.unflatten(3, (steps, r)), t)
    return piece.finished(y), (angles[:, -1], S, K[:, -1], piece.x_bthp[:, -1])


def forward(*args: Any) -> tuple[Tensor, ...]:
    """As reference.forward."""
    return forward_by(scan, *args)


def backward(dy: Tensor, dangle: Tensor, dssm: Tensor, dk: Tensor, dv: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """As reference.backward."""
    return backward_by(scan, (dy, dangle, dssm, dk, dv), *args)
