"""The one error voice: every complaint names op, argument, what was expected, what came, and a remedy.

Only metadata is looked at here, except where a function says that it reads values (and then only on CPU tensors outside
tracing, so that nothing synchronises a device or breaks a graph).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def fail(op: str, problem: str, remedy: str = "", *, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise: `op: problem. remedy`."""
    return error(f"{op}: {problem}" + (f" {remedy}" if remedy else ""))


class Sizes:
    """Letters bound to sizes while an op's arguments are checked, with the argument that bound each."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.bound: dict[str, tuple[int, str]] = {}

    def __getitem__(self, letter: str) -> int:
        return self.bound[letter][0]

    def bind(self, letter: str, size: int, source: str) -> None:
        """Give `letter` a size before any tensor does."""
        self.bound[letter] = (size, source)

    def match(self, name: str, tensor: Tensor, spec: str, remedy: str = "") -> None:
        """Check `tensor` against `spec`, a string such as "b t d", binding the letters it meets first.

        Raises TypeError if it is no dense tensor, ValueError naming the sizes that disagree and who set them.
        """
        if not isinstance(tensor, Tensor):
            raise fail(self.op, f"{name} is a {type(tensor).__name__}, expected a tensor ({spec})", error=TypeError)
        if tensor.layout is not torch.strided or tensor.is_nested or without_memory(tensor):
            dense(self.op, name, tensor)
        letters = spec.split()  # as fast as a cache, which torch.compile would warn of
        shape = tensor.shape
        if len(shape) != len(letters):
            raise fail(self.op, f"{name} has shape {tuple(shape)}, expected {_tuple(letters)}.", remedy)
        for letter, size in zip(letters, shape, strict=True):
            if letter not in self.bound:
                self.bound[letter] = (size, name)
                continue
            expected, source = self.bound[letter]
            if size != expected:
                wanted = f"{_tuple(letters)} with {letter} = {expected} (set by {source})"
                raise fail(self.op, f"{name} has shape {tuple(shape)}, expected {wanted}.", remedy)


def _tuple(letters: Sequence[str]) -> str:
    return "(" + ", ".join(letters) + ("," if len(letters) == 1 else "") + ")"


def dense(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError if the tensor's values do not lie in memory each: sparse, nested, or zeros that are nowhere."""
    kind, to = str(tensor.layout).removeprefix("torch."), "to_dense()"
    if tensor.is_nested:
        kind, to = "nested", "to_padded_tensor(0.0)"
    elif tensor.layout is torch.strided:
        if not without_memory(tensor):
            return
        kind, to = "zeros without memory (torch._efficientzerotensor)", "clone()"
    raise fail(op, f"{name} is {kind}, expected a dense tensor.", f"{name}.{to} makes one.", error=TypeError)


def without_memory(tensor: Tensor) -> bool:
    """Whether the tensor stands for zeros that are nowhere, as autograd's do."""
    return not torch.compiler.is_compiling() and tensor._is_zerotensor()


def dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], remedy: str = "") -> None:
    """Raise TypeError unless the tensor's dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(_name(d) for d in allowed)
        raise fail(op, f"{name} is {_name(tensor.dtype)}, expected one of {names}.", remedy, error=TypeError)


def same_device(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless all given tensors live on one device."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise fail(
                op,
                f"{name} is on {tensor.device}, {first[0]} is on {first[1]}.",
                f"Move it with {name}.to({first[0]}.device).",
            )


def slots(op: str, sizes: Sizes, state: Tensor, index: Tensor | None) -> None:
    """Check a step form's state and slot index; reads the index's values only on CPU tensors outside tracing."""
    if not state.is_contiguous():
        raise fail(op, "state is not contiguous.", "It is written in place: keep it as state.contiguous().")
    rows, b = state.shape[0], sizes["b"]
    if index is None:
        if rows != b:
            raise fail(op, f"state has {rows} rows for a batch of {b}.", "Give index= to pick rows.")
        return
    sizes.match("index", index, "b")
    dtype(op, "index", index, INTEGERS)
    if can_read(index) and b:
        used = [i for i in index.tolist() if i >= 0]
        if used and (max(used) >= rows or len(set(used)) < len(used)):
            raise fail(op, f"index is {index.tolist()}, expected distinct slots below {rows} (negative: skip).")


def choice(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise fail(op, f"{name} is {value!r}, expected one of {', '.join(repr(a) for a in allowed)}.")


def number(
    op: str,
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    integer: bool = False,
) -> None:
    """Raise unless `value` is a finite number in [low, high] ((low, high] with `open_low`), whole if `integer`.

    Python's and NumPy's numbers are; True and False are not.
    """
    kind = "a whole number" if integer else "a number"
    whole = isinstance(value, int | np.integer)
    if isinstance(value, bool) or not (whole or (not integer and isinstance(value, float | np.floating))):
        raise fail(op, f"{name} is {value!r}, expected {kind}.", error=TypeError)
    # Comparisons only (NaN fails them all): math.isfinite would break a graph traced with symbolic numbers.
    finite = -math.inf < value < math.inf
    if not finite or not low <= value <= high or (open_low and value == low):
        bounds = [f"{'above' if open_low else 'at least'} {low:g}"] if low > -math.inf else []
        bounds += [f"at most {high:g}"] if high < math.inf else []
        raise fail(op, f"{name} is {value!r}, expected {kind} {' and '.join(bounds) or 'that is finite'}.")


def probability(op: str, name: str, value: float) -> None:
    """Raise unless `value` is a number strictly between 0 and 1."""
    number(op, name, value)
    if not 0 < value < 1:
        remedy = f"In per cent it would be {value:g} %: give {value / 100:g}." if 1 < value < 100 else ""
        raise fail(op, f"{name} is {value!r}, expected a probability between 0 and 1, such as 0.95.", remedy)


def plain(value: Any) -> Any:
    """Ready for JSON: NumPy's numbers as Python's own, also within dicts, lists and tuples; anything else as it is."""
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(v) for v in value)
    return value.item() if isinstance(value, np.generic) else value


def can_read(tensor: Tensor) -> bool:
    """Whether values may be looked at: a real CPU tensor, outside tracing."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def not_finite(op: str, tensors: Mapping[str, Tensor | None], *, steps: bool = True) -> Exception | None:
    """What to raise for the first value that is not finite, naming its tensor and place; None if all are.

    Where values may be looked at: of CPU tensors. In y (…, T, m), or (b, m) without `steps`, NaN means missing.
    """
    for name, v in tensors.items():
        if v is None or not can_read(v):
            continue
        bad = torch.isinf(v) if name == "y" else ~torch.isfinite(v)
        if not bool(bad.any()):
            continue
        place = bad.nonzero()[0].tolist()
        value = float(v.detach()[tuple(place)])
        if name != "y":
            where = f"{name}{place} is {value}, expected finite values."
            return fail(op, where, "Only observations may be missing (NaN).")
        series = place[: -2 if steps else -1]
        which = f" {'of' if steps else 'in'} series {series[0] if len(series) == 1 else series}" if series else ""
        when = f" at step {place[-2]}" if steps else ""
        return fail(op, f"y is {value}{when}{which}.", "NaN, and NaN alone, says that a value is missing.")
    return None


def _name(d: torch.dtype) -> str:
    return str(d).removeprefix("torch.")
