"""Unmodified models of transformers on our kernels: `accelerate(model)`, and `restore(model)` to undo it.

Each mixer in the table gets a subclass of its own class whose `forward` computes the same with our operations: weights,
names, caches and everything around the mixer stay transformers'. Other models and other modules are not touched.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from stateline import checks
from stateline.interop import transformers_mamba as mamba
from stateline.interop import transformers_mamba2 as mamba2

__all__ = ["accelerate", "restore", "MIXERS"]

OP = "accelerate"
#: The oldest release whose mixers and caches are as below, and the newest one tested.
OLDEST, TESTED = (5, 15, 1), (5, 23, 0)
MARK = "_stateline_original"  # on our subclasses: the class they stand in for
SIGNATURE = ("self", "hidden_states", "cache_params", "attention_mask", "kwargs")
#: What transformers' cache must offer: method -> parameters we give by name or place.
CACHE: dict[str, tuple[str, ...]] = {
    "has_previous_state": ("layer_idx",),
    "update_conv_state": ("conv_states", "layer_idx", "kwargs"),
    "update_recurrent_state": ("recurrent_states", "layer_idx"),
}

Run = Callable[[Any, Any, Any, Any, dict[str, Any]], Any]


@dataclass(frozen=True)
class Row:
    """A mixer we can stand in for.

    module, name: of its class.   run: (mixer, hidden states, cache, mask, options) -> hidden states.
    reads: every attribute of itself that its own forward uses, `NEUTRAL` ones aside. With one more or less it may
        compute something else.
    """

    module: str
    name: str
    run: Run
    reads: frozenset[str]


_READS = frozenset({
    "A_log", "D", "activation", "conv1d", "conv_kernel_size", "in_proj", "layer_idx", "out_proj", "ssm_state_size",
    "time_step_rank",
})  # fmt: skip
_LINEARS = frozenset({"dt_proj", "x_proj"})
_NORMS = frozenset({"b_layernorm", "c_layernorm", "dt_layernorm", "config"})
_FUSED = frozenset({"use_bias", "use_conv_bias"})  # of the call to a fused kernel
#: They choose how transformers computes a thing, and not what.
NEUTRAL = frozenset({"training", "use_associative_scan", "use_mambapy"})
_HEADS = frozenset({"dt_proj_bias", "dt_proj_weight", "mamba_head_dim", "n_mamba_heads", "x_proj_weight"})


_READS2 = frozenset({
    "A_log", "D", "activation", "chunk_size", "conv1d", "conv_dim", "conv_kernel_size", "dt_bias", "head_dim",
    "in_proj", "intermediate_size", "layer_idx", "n_groups", "norm", "num_heads", "out_proj", "ssm_state_size",
    "time_step_limit",
})  # fmt: skip
_SCALES = frozenset({"mamba_rms_norm", "mup_vector", "ssm_in_multiplier"})


def _row(package: str, name: str, kind: mamba.Kind, *reads: frozenset[str]) -> Row:
    return Row(_module(package), name, functools.partial(mamba.run, kind), _READS.union(*reads))


def _row2(package: str, name: str, kind: mamba2.Kind = mamba2.MAMBA2, *reads: frozenset[str]) -> Row:
    return Row(_module(package), name, functools.partial(mamba2.run, kind), _READS2.union(*reads))


def _module(package: str) -> str:
    return f"transformers.models.{package}.modeling_{package}"


#: Everything that can be accelerated: one row a mixer.
MIXERS = {
    row.name: row
    for row in (
        _row("mamba", "MambaMixer", mamba.MAMBA, _LINEARS, _FUSED),
        _row("falcon_mamba", "FalconMambaMixer", mamba.NORMED, _LINEARS, _NORMS, _FUSED, frozenset({"rms_eps"})),
        _row("jamba", "JambaMambaMixer", mamba.NORMED, _LINEARS, _NORMS),
        _row("zamba", "ZambaMambaMixer", mamba.HEADS, _HEADS),
        _row2("mamba2", "Mamba2Mixer"),
        _row2("bamba", "BambaMixer"),
        _row2("zamba2", "Zamba2MambaMixer"),
        _row2("nemotron_h", "NemotronHMamba2Mixer"),
        _row2("granitemoehybrid", "GraniteMoeHybridMambaLayer"),
        _row2("falcon_h1", "FalconH1Mixer", mamba2.SCALED, _SCALES),
    )
}


class Accelerated:
    """What `accelerate` gives back: a context manager that restores the model at its end. Need not be kept."""

    def __init__(self, model: nn.Module, mixers: list[nn.Module]) -> None:
        self.model = model
        self._mixers = mixers

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for mixer in self._mixers:
            _become(mixer, getattr(type(mixer), MARK, type(mixer)))

    def __repr__(self) -> str:
        return f"<{type(self.model).__name__} with {len(self._mixers)} accelerated mixers>"


def accelerate(model: nn.Module) -> Accelerated:
    """Let the Mamba mixers of a transformers model compute with our kernels, in place, until `restore(model)`.

    Args:
        model: any module that contains mixers of `MIXERS`: a model of transformers, bare or in an adapter.

    Weights, names and caches stay as they are, so the model trains, generates, saves and loads as before. For a block
    of code alone: `with accelerate(model): …`.

    Raises:
        ImportError: transformers is not installed, or too old.
        ValueError: the model has no such mixer, or one with another activation than silu.
        RuntimeError: this release of transformers has changed a mixer, so that ours might compute something else.

    >>> with accelerate(model):  # doctest: +SKIP
    ...     model.generate(input_ids, max_new_tokens=20)
    """
    if not isinstance(model, nn.Module):
        raise checks.fail(OP, f"model is a {type(model).__name__}, expected a torch.nn.Module.", error=TypeError)
    _check_version()
    found = [m for m in model.modules() if type(m).__name__ in MIXERS and _is_theirs(type(m))]
    if not found:
        if any(hasattr(type(m), MARK) for m in model.modules()):
            return Accelerated(model, [])  # already
        raise checks.fail(
            OP, f"{type(model).__name__} has no module that can be accelerated.", f"Those are {', '.join(MIXERS)}."
        )
    for cls in dict.fromkeys(type(m) for m in found):
        check_contract(cls)  # type: ignore[arg-type]  # a module's class
    for mixer in found:
        _check_mixer(mixer)
    for mixer in found:
        _become(mixer, standing_in(type(mixer).__name__))
    return Accelerated(model, found)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every mixer is of its own class again. Nothing happens to a model that was not accelerated."""
    for module in model.modules():
        if hasattr(type(module), MARK):
            _become(module, getattr(type(module), MARK))


@functools.cache
def standing_in(name: str) -> type[nn.Module]:
    """Our subclass of the mixer class of that name in `MIXERS`."""
    from transformers.integrations.accelerate import force_accelerate_hooks

    row = MIXERS[name]
    original = getattr(importlib.import_module(row.module), name)

    @force_accelerate_hooks("conv1d")  # its weights are read without a call, and may lie elsewhere until hooks run
    def forward(
        self: Any, hidden_states: Any, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        return row.run(self, hidden_states, cache_params, attention_mask, kwargs)

    # of this name and in this module, where `__getattr__` finds it, so that models can be pickled
    return type(name, (original,), {"forward": forward, MARK: original, "__module__": __name__})


def __getattr__(name: str) -> Any:
    if name in MIXERS:
        return standing_in(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_theirs(cls: type) -> bool:
    return cls.__module__ == MIXERS[cls.__name__].module


def _become(mixer: nn.Module, cls: type) -> None:
    mixer.__class__ = cls
    if "_old_forward" in vars(mixer):  # accelerate's hooks hold the forward that they surround
        vars(mixer)["_old_forward"] = MethodType(vars(cls)["forward"], mixer)


def _check_version() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{OP}: transformers is missing. pip install 'stateline[hf]'") from error
    version = transformers.__version__
    if release(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"{OP}: transformers is {version}, expected {oldest} or newer. pip install 'stateline[hf]'")
    if release(version) > TESTED:
        _say_untested(version)


@functools.cache
def _say_untested(version: str) -> None:
    warnings.warn(
        f"{OP}: transformers {version} is newer than {'.'.join(map(str, TESTED))}, the newest tested. Its mixers look"
        " the same; compare outputs with those of the model before.",
        UserWarning,
        stacklevel=4,
    )


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (5, 23, 0) of "5.23.0.dev0"."""
    numbers = []
    for part in version.split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


# ---- the contract with transformers ----------------------------------------------------------------------------------


@functools.cache
def check_contract(cls: type[nn.Module]) -> None:
    """Raise RuntimeError unless a mixer class and transformers' caches are as our forward expects them."""
    import transformers
    from transformers.cache_utils import Cache

    problems = [f"{cls.__name__}.{p}" for p in mixer_problems(cls)]
    for name, wanted in CACHE.items():
        method = getattr(Cache, name, None)
        lost = set(wanted) - set(inspect.signature(method).parameters if method else ())
        if lost:
            problems.append(f"Cache.{name} has no parameter {', '.join(sorted(lost))}")
    if problems:
        raise RuntimeError(
            f"{OP}: transformers {transformers.__version__} has changed: {'; '.join(problems)}. This release of"
            f" stateline knows {'.'.join(map(str, TESTED))}: install that, or a newer stateline."
        )


def mixer_problems(cls: type[nn.Module]) -> Iterator[str]:
    """How the forward of a class named in `MIXERS` differs from the one that we stand in for."""
    forward = own_forward(cls)
    parameters = tuple(inspect.signature(forward).parameters)
    if parameters != SIGNATURE:
        yield f"forward takes {', '.join(parameters)}, expected {', '.join(SIGNATURE)}"
    used, known = attributes_read(forward) - NEUTRAL, MIXERS[cls.__name__].reads
    if used - known:
        yield f"forward reads {', '.join(sorted(used - known))}, which is new"
    if known - used:
        yield f"forward reads {', '.join(sorted(known - used))} no longer"


def own_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward that a class was written with, without what transformers wraps around it."""
    forward = inspect.unwrap(vars(cls)["forward"])
    return inspect.getclosurevars(forward).nonlocals.get("forward_func", forward)  # older releases leave no __wrapped__


def attributes_read(function: Callable[..., Any]) -> set[str]:
    """The names x of every `self.x` in the source of a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    return {n.attr for n in nodes if n.value.id == "self"}  # type: ignore[attr-defined]  # names only


def _check_mixer(mixer: Any) -> None:
    if mixer.activation not in ("silu", "swish"):
        raise checks.fail(OP, f"a mixer's activation is {mixer.activation!r}, supported is 'silu'.")
