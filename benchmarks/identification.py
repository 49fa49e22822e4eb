"""Identify a two-mass spring and a pendulum from noisy records, beside nfoursid, and steer them with what was found.

    python -m benchmarks.identification                  # 20 seeds each, a minute or two
    python -m benchmarks.identification --seeds 3

Needs the extra (pip install 'stateline[classical]') and nfoursid, for its columns (pip install nfoursid).

A record has --steps steps: white input, a white disturbance of a twentieth of its size, and sensor noise 10 dB below
what is seen. Fit: 100 (1 − |ŷ − y| / |y − mean y|) of a free run over 1,000 new steps, from rest, without noise,
mean over sensors. nfoursid stands with windows of 10 rows, as in its documentation, and with the best of four sizes,
chosen by that very number. Cost: of a regulator of the output, LQG, in closed loop with the true plant, its disturbance
and its sensor noise, over that of the same design on the true model; all controllers meet the same noise.

"efficient" is where the data end: the fit that A, B and C of the plant's linear model have, on average, if they are off
by errors with the least covariance that any unbiased estimate has (Cramér and Rao), the noise being known.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stateline.classical import FitOptions, StateSpace, discretize, fit, kalman_filter, lqg, lqr, n4sid, simulate

NEW, DECIBELS, DISTURBANCE = 1000, 10.0, 0.05**2  # the last is a variance, beside 1 of the input
PLANTS, LOOP = 100, 300  # in closed loop: how many at once, for how many steps
WINDOWS = (10, 5, 15, 20)
TORQUE = 0.3  # of the pendulum's input, per mass and squared length
INPUT_COST = 1.0  # Bryson's rule: inputs and outputs count in units of what they were in the record
F64 = torch.float64


class Plant(NamedTuple):
    """after(h (N, n), force (N, 1)) -> h a step later; C, and the linear model of it (A, B)."""

    name: str
    after: Callable[[Tensor, Tensor], Tensor]
    A: Tensor
    B: Tensor
    C: Tensor


def two_mass_spring() -> Plant:
    """Unit masses on unit springs: wall, mass, mass; a force on the first, both places seen, every half second."""
    Ac = torch.tensor([[0, 1, 0, 0], [-2, -0.2, 1, 0.1], [0, 0, 0, 1], [1, 0.1, -1, -0.1]], dtype=F64)
    A, B, _ = discretize(Ac, torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=F64), 0.5)
    assert B is not None
    C = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]], dtype=F64)
    return Plant("two-mass spring", lambda h, f: h @ A.mT + f @ B.mT, A, B, C)


def pendulum() -> Plant:
    """One metre, damped, torque at its hinge, its angle (some 10 degrees) every 0.2 s; its equation is not linear."""

    def slope(h: Tensor, torque: Tensor) -> Tensor:
        return torch.stack([h[..., 1], -9.81 * h[..., 0].sin() - 0.5 * h[..., 1] + TORQUE * torque[..., 0]], -1)

    def after(h: Tensor, torque: Tensor, dt: float = 0.02) -> Tensor:
        for _ in range(10):  # Runge and Kutta's fourth order
            a = slope(h, torque)
            b = slope(h + dt / 2 * a, torque)
            c = slope(h + dt / 2 * b, torque)
            h = h + dt / 6 * (a + 2 * b + 2 * c + slope(h + dt * c, torque))
        return h

    A, B, _ = discretize(
        torch.tensor([[0, 1], [-9.81, -0.5]], dtype=F64), torch.tensor([[0.0], [TORQUE]], dtype=F64), 0.2
    )
    assert B is not None
    return Plant("pendulum", after, A, B, torch.tensor([[1.0, 0.0]], dtype=F64))


class Record(NamedTuple):
    """u, y: what is identified from.   u_new, y_new: what is predicted.   model: the plant's own, with its noise."""

    u: Tensor
    y: Tensor
    u_new: Tensor
    y_new: Tensor
    model: StateSpace


def record(plant: Plant, seed: int, steps: int) -> Record:
    """What a plant at rest makes of white inputs."""
    generator = torch.Generator().manual_seed(seed)
    n, m = len(plant.A), len(plant.C)

    def white(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    u, u_new, gust = white(steps, 1), white(NEW, 1), math.sqrt(DISTURBANCE) * white(steps, 1)
    clean, y_new = run(plant, u + gust), run(plant, u_new)
    deviation = clean.std(0) * 10 ** (-DECIBELS / 20)
    y = clean + deviation * white(steps, m)
    rest = torch.zeros(n, dtype=F64)
    Q = DISTURBANCE * plant.B @ plant.B.mT
    return Record(u, y, u_new, y_new, StateSpace(plant.A, plant.B, plant.C, None, Q, torch.diag(deviation**2), rest, Q))


def run(plant: Plant, inputs: Tensor) -> Tensor:
    """What sensors without noise see, from rest."""
    h, seen = torch.zeros(1, len(plant.A), dtype=F64), []
    for u in inputs:
        seen.append(h @ plant.C.mT)
        h = plant.after(h, u[None])
    return torch.cat(seen)


def score(found: StateSpace, made: Record) -> float:
    """Fit of the free run from rest, per cent; 0 for what runs away."""
    h, seen = torch.zeros(len(found.A), dtype=F64), []
    assert found.B is not None
    for u in made.u_new:
        seen.append(found.C @ h + (0 if found.D is None else found.D @ u))
        h = found.A @ h + found.B @ u
    y, made_y = torch.stack(seen), made.y_new
    fits = 1 - (y - made_y).norm(dim=0) / (made_y - made_y.mean(0)).norm(dim=0)
    return 100 * max(0.0, float(fits.mean().nan_to_num(0.0)))


def ours(made: Record, order: int) -> tuple[StateSpace, StateSpace]:
    """The subspace start, and what maximum likelihood makes of it."""
    start = n4sid(made.y, made.u, order=order).model
    options = FitOptions(errors=False, tolerance=1e-3)
    found = fit(start, made.y, made.u, learn=("A", "B", "C", "Q", "R"), method="lbfgs", steps=150, options=options)
    return start, found.model


def efficient(made: Record) -> float:
    """Mean fit of free runs of A, B and C that are off by what the Cramér–Rao bound leaves, the noise known."""
    names, model = ("A", "B", "C"), made.model
    start = torch.cat([getattr(model, name).flatten() for name in names])

    def at(x: Tensor) -> StateSpace:
        sizes = [getattr(model, name).shape for name in names]
        parts = x.split([size.numel() for size in sizes])
        return model._replace(**{k: v.reshape(size) for k, v, size in zip(names, parts, sizes, strict=True)})

    def seen(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Innovations (T, m), their covariances, and the free run (NEW, m)."""
        now = at(x)
        out, _ = kalman_filter(now, made.y, made.u)
        cov = now.C @ out.predicted_cov @ now.C.mT + now.R
        return made.y - out.predicted_mean @ now.C.mT, cov, simulate(now, NEW, made.u_new, noise=False)[1]

    step, slopes = 1e-5, []
    for move in step * torch.eye(len(start), dtype=F64):
        slopes.append([(a - b) / (2 * step) for a, b in zip(seen(start + move), seen(start - move), strict=True)])
    errors, spreads, runs = (torch.stack(part) for part in zip(*slopes, strict=True))
    inverse = torch.linalg.inv(seen(start)[1])
    information = torch.einsum("itm,tmk,jtk->ij", errors, inverse, errors)
    information += 0.5 * torch.einsum("itmk,tkl,jtlo,tom->ij", spreads, inverse, spreads, inverse)
    values, vectors = torch.linalg.eigh(information)
    inside = values > 1e-9 * values[-1]  # the state's coordinates are open, and no run shows them
    root = vectors[:, inside] / values[inside].sqrt()
    drawn = root @ torch.randn(int(inside.sum()), 400, dtype=F64, generator=torch.Generator().manual_seed(0))
    off = torch.einsum("itm,is->stm", runs, drawn) + seen(start)[2] - made.y_new
    return 100 * float((1 - off.norm(dim=1) / (made.y_new - made.y_new.mean(0)).norm(dim=0)).mean())


def nfoursid(made: Record, order: int) -> list[float]:
    """Fits with each of `WINDOWS`."""
    import numpy as np
    import pandas
    from nfoursid.nfoursid import NFourSID

    outputs, fits = [f"y{i}" for i in range(made.y.shape[1])], []
    frame = pandas.DataFrame(np.concatenate([made.u.numpy(), made.y.numpy()], 1), columns=["u", *outputs])
    for rows in WINDOWS:
        peer = NFourSID(frame, output_columns=outputs, input_columns=["u"], num_block_rows=rows)
        peer.subspace_identification()
        system, _ = peer.system_identification(rank=order)
        A, B, C, D = (torch.tensor(np.asarray(v), dtype=F64) for v in (system.a, system.b, system.c, system.d))
        fits.append(score(made.model._replace(A=A, B=B, C=C, D=D), made))
    return fits


def costs(plant: Plant, made: Record, found: StateSpace, seed: int) -> tuple[float, float, float]:
    """Mean cost of a step with regulators of the found model, of the true model, and of the true model seeing all."""
    size = made.y.var(0)
    weight, dear = torch.diag(1 / size), INPUT_COST * torch.eye(1, dtype=F64)
    designs = [lqg(model, model.C.mT @ weight @ model.C, dear) for model in (found, made.model)]
    gain, _ = lqr(plant.A, plant.B, plant.C.mT @ weight @ plant.C, dear)
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(LOOP, PLANTS, len(plant.C), dtype=F64, generator=generator) @ made.model.R.sqrt()
    gusts = math.sqrt(DISTURBANCE) * torch.randn(LOOP, PLANTS, 1, dtype=F64, generator=generator)
    states = [design.init_state(PLANTS) for design in designs]
    h, total = torch.zeros(3, PLANTS, len(plant.A), dtype=F64), torch.zeros(3, dtype=F64)
    for t in range(LOOP):
        clean = h @ plant.C.mT
        decisions = [design.step(clean[i] + noise[t], states[i]) for i, design in enumerate(designs)]
        states = [decision.state for decision in decisions]
        u = torch.stack([*(decision.u for decision in decisions), -h[2] @ gain.mT])
        total += ((clean**2 / size).sum(-1) + INPUT_COST * u[..., 0] ** 2).mean(-1)
        h = plant.after(h, u + gusts[t])
    found_cost, true_cost, seeing = (total / LOOP).tolist()
    return found_cost, true_cost, seeing


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="records of each plant (default: 20)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a record (default: 1000)")
    parser.add_argument("--plant", choices=("spring", "pendulum"), help="only this one")
    parser.add_argument("--alone", action="store_true", help="leave nfoursid out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("nfoursid", "its best window", "n4sid", "n4sid + fit", "efficient", "true linear model")
    plants = {"spring": two_mass_spring, "pendulum": pendulum}
    for plant in (make() for name, make in plants.items() if options.plant in (None, name)):
        order, rows, seconds = len(plant.A), [], 0.0
        for seed in range(options.seeds):
            made = record(plant, seed, options.steps)
            begin = time.perf_counter()
            start, found = ours(made, order)
            seconds += time.perf_counter() - begin
            peer = [math.nan] if options.alone else nfoursid(made, order)
            cost, of_true, seeing = costs(plant, made, found, seed)
            fits = [
                peer[0],
                max(peer),
                score(start, made),
                score(found, made),
                efficient(made),
                score(made.model, made),
            ]
            rows.append([*fits, cost / of_true, of_true / seeing])
            print(f"{plant.name}, seed {seed}: " + ", ".join(f"{v:.4g}" for v in rows[-1]), flush=True)
        mean, most = torch.tensor(rows).mean(0).tolist(), torch.tensor(rows).amax(0).tolist()
        print(f"{plant.name}, {options.seeds} seeds × {options.steps} steps, {seconds / options.seeds:.2f} s for ours")
        print("  fit: " + ", ".join(f"{name} {value:.2f}" for name, value in zip(names, mean, strict=False)))
        print(f"  cost of LQG over the true model's: {mean[6]:.3f}, at most {most[6]:.3f}")
        print(f"  cost of the true model's LQG over LQR that sees the state: {mean[7]:.3f}")


if __name__ == "__main__":
    main()
