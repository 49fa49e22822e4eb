"""What users of state space libraries have complained about for years, end to end; each test fails if it comes back.

| pain | test |
|---|---|
| installing needs nvcc, a matching torch build, a compiler | test_installs_without_a_compiler |
| needs Linux and CUDA: importing it imports Triton, no CPU path; a first call that compiles for half a minute | \
test_runs_on_any_cpu_and_nothing_is_compiled_at_the_first_call |
| falls back to something slow in silence | test_the_slow_path_is_announced |
| no initial state, no gradient through it, chunks and packed sequences that leak | test_states_pass_through_chunks… |
| the prompt in one pass and token by token give different answers | test_prefill_equals_steps |
| states and time constants in 16 bits; NaN at large steps | test_large_steps_in_16_bits…, test_time_constants_stay… |
| weight decay that pulls on time constants | test_time_constants_stay_in_float32_and_are_not_decayed |
| an initialiser that zeroes biases makes all step sizes the same | test_initialisers_leave_step_sizes_alone |
| widths that must be multiples of 8, at most 256 states, at most 4 taps | test_any_size_works |
| another answer at every run, in every batch | test_same_call_same_bits, test_a_row_does_not_depend_on_its_batch |
| padding changes the result, or only at batch 1 | test_padding_changes_nothing |
| wrong or missing gradients, tested at a tolerance of 0.1 | test_gradients_hold_the_published_bound |
| adapters and quantised layers are bypassed | test_adapters_are_trained…, test_quantised_projections_are_called |
| no torch.compile, no export | test_traces_whole_with_free_sizes (more in test_compile, test_export, test_onnx) |
| no way back: a rejected draft or a shared prefix is computed again | test_states_roll_back_and_are_shared |
| papers and code disagree on the discretisation | test_the_discretisation_is_the_documented_one |
| a checkpoint of another layout fails with a size mismatch | test_checkpoints_of_every_layout…, test_another_family… |
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from makers import FORMATS, small
from test_layers import BOUND as LAYER_BOUND
from test_layers import close
from test_ops import BACKENDS, USUAL, check, scan_case
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stateline
from stateline import backends, ops, state
from stateline import nn as sl

ROOT = Path(__file__).parents[1]


def ids(b: int, t: int) -> Tensor:
    return torch.randint(61, (b, t))


# ---- installing and starting -----------------------------------------------------------------------------------------


def test_installs_without_a_compiler() -> None:
    """Building needs neither torch nor nvcc, a failed build still gives a wheel, and the library links no torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [r for r in project["build-system"]["requires"] if "torch" in r or "cuda" in r]
    (override,) = project["tool"]["scikit-build"]["overrides"]
    assert override["if"] == {"failed": True}
    assert override["wheel"] == {"cmake": False}
    if backends.native_problem() is None:
        library = Path(backends.load_native()._name).read_bytes()
        assert not [name for name in (b"libtorch", b"libc10", b"libcuda", b"libpython") if name in library]


START = """
import sys, torch
sys.modules["triton"] = sys.modules["mamba_ssm"] = sys.modules["causal_conv1d"] = None  # importing them fails
before = set(sys.modules)
import stateline
model = stateline.LanguageModel(stateline.ModelConfig(d_model=16, n_layer=1, vocab_size=61))
x = torch.randint(61, (1, 5))
model.loss(x, x).backward()
model.step_(x[:, 0], model.init_state(1))
print([m for m in set(sys.modules) - before if m.startswith(("torch.utils.cpp_extension", "torch._inductor"))])
"""


def test_runs_on_any_cpu_and_nothing_is_compiled_at_the_first_call() -> None:
    """Forward, backward and step without Triton, CUDA packages or any program to compile with."""
    nothing = {"PATH": "", "STATELINE_DISABLE_NATIVE": os.environ.get("STATELINE_DISABLE_NATIVE", "0")}
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=nothing, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_slow_path_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the C++ library the answers are the same, and a warning says why they come slowly."""
    model, x = small(), ids(1, 6)
    want = model(x)
    monkeypatch.setattr(backends, "native_problem", lambda: "no compiler at install time.")
    backends._say_slow_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"slow reference: no compiler at install time"):
        got = model(x)
    close(got, want, torch.float32)
    with pytest.raises(backends.BackendError, match="no compiler at install time"):
        ops.rms_norm(torch.ones(1, 2), torch.ones(2), backend="cpu")  # a forced one is refused, never replaced


# ---- states ----------------------------------------------------------------------------------------------------------


def test_states_pass_through_chunks_packs_and_gradients() -> None:
    """Chunks continue, packed neighbours do not leak, and the gradient reaches the state that came in."""
    model, x = small(), ids(1, 12)
    start = pytree.tree_map(lambda s: torch.randn_like(s).requires_grad_(), model.init_state(1))
    want, end = model.extend(x, start)
    first, middle = model.extend(x[:, :5], start)
    second, last = model.extend(x[:, 5:], middle)
    close((torch.cat([first, second], 1), last), (want, end), torch.float32)
    leaves = pytree.tree_leaves(start)
    cut = torch.autograd.grad(second.square().sum() + last.layers[1].ssm.sum(), leaves)
    whole = torch.autograd.grad(want[:, 5:].square().sum() + end.layers[1].ssm.sum(), leaves)
    assert all((g != 0).any() for g in whole)
    close(cut, whole, torch.float32)
    other = ids(1, 4)
    both = torch.cat([other, x], 1)
    packed, _ = model.extend(both, cu_seqlens=torch.tensor([0, 4, 16], dtype=torch.int32))
    close(packed[:, 4:], model(x), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_prefill_equals_steps(dtype: torch.dtype) -> None:
    """A prompt in one pass and token by token, then on, with a state in float32 under 16-bit weights; odd sizes."""
    model, x = small(d_model=13, ssm_cfg={"d_state": 3, "d_conv": 3, "expand": 1.5}).to(dtype), ids(2, 11)
    _, filled = model.extend(x[:, :6], model.init_state(2))
    walked = model.init_state(2)
    for i in range(6):
        model.step_(x[:, i], walked)
    close(walked, filled, dtype)
    assert {leaf.dtype for leaf in pytree.tree_leaves(filled)} == {torch.float32}
    rest = torch.stack([model.step_(x[:, i], filled) for i in range(6, 11)], 1)
    close(rest, model(x)[:, 6:], dtype)


@torch.no_grad()
def test_states_roll_back_and_are_shared() -> None:
    """A rejected draft costs a copy, not the prompt again; a prefix is read once and forks into many."""
    model, x = small(), ids(1, 9)
    _, prefix = model.extend(x, model.init_state(1))
    kept, draft = state.clone(prefix), state.clone(prefix)
    for token in (3, 4, 5):
        model.step_(torch.tensor([token]), draft)
    assert all(map(torch.equal, pytree.tree_leaves(kept), pytree.tree_leaves(prefix)))
    assert torch.equal(model.step_(torch.tensor([7]), prefix), model.step_(torch.tensor([7]), kept))
    fork = state.index(prefix, [0, 0, 0])
    branches, _ = model.extend(torch.tensor([[1], [2], [3]]), fork)
    for i in range(3):
        alone, _ = model.extend(torch.tensor([[i + 1]]), prefix)
        close(branches[i : i + 1], alone, torch.float32)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_steps_in_16_bits_stay_finite(backend: str, dtype: torch.dtype) -> None:
    """dt·A of −10⁶ and dt of 10⁻⁷ side by side: values and all gradients finite, no exponent above 0."""
    x = scan_case(USUAL | {"dtype": dtype, "t": 70, "n": 4}).leaves
    x["A"] = torch.tensor([-1e4, -1.0, -1e-4, -0.0]).expand(5, 4).clone()
    x["dt"] = torch.linspace(-16, 100, 70)[None, :, None].expand(2, 70, 5).to(dtype)
    given = {k: v.clone().requires_grad_() for k, v in x.items()}
    y, last = ops.selective_scan(**given, dt_softplus=True, backend=backend)
    grads = torch.autograd.grad(y.float().mean() + last.mean(), list(given.values()))
    for name, value in zip(["y", "state", *given], [y, last, *grads], strict=True):
        assert value.isfinite().all(), name


def test_time_constants_stay_in_float32_and_are_not_decayed() -> None:
    """A_log, D and the step bias survive .bfloat16() and .half() unrounded, and weight decay spares them."""
    model = small()
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("A_log", ".D", "dt_proj.bias"))}
    assert len(kept) == 6
    decayed, plain = (group["params"] for group in sl.param_groups(model, 0.1))
    spared = {id(p) for p in plain}
    for cast in (nn.Module.bfloat16, nn.Module.half):
        cast(model)
        assert model.lm_head.weight.dtype in (torch.bfloat16, torch.float16)
        for name, value in kept.items():
            assert torch.equal(model.get_parameter(name), value), name
    model.float()
    assert all(id(model.get_parameter(name)) in spared for name in kept)
    assert decayed


def test_initialisers_leave_step_sizes_alone() -> None:
    """Those that ask a bias, as mamba_ssm's and most training code for its models do."""
    for layer in (sl.Mamba(16), sl.Mamba2(16, 4, headdim=8), sl.Mamba3(16, 4, headdim=8)):
        kept = {name: p.detach().clone() for name, p in layer.named_parameters() if "dt" in name and "bias" in name}
        for module in layer.double().float().modules():
            if (
                isinstance(module, nn.Linear)
                and module.bias is not None
                and not getattr(module.bias, "_no_reinit", False)
            ):
                nn.init.zeros_(module.bias)
        assert kept
        assert all(torch.equal(layer.get_parameter(name), p) for name, p in kept.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("d", "n", "k", "t"), [(1, 300, 2, 3), (13, 17, 9, 1), (31, 1, 1, 5)])
def test_any_size_works(backend: str, d: int, n: int, k: int, t: int) -> None:
    """Widths of no multiple, more than 256 states, more than four taps, one token; with gradients, at full accuracy."""
    check(scan_case(USUAL | {"backend": backend, "d": d, "n": n, "t": t}), torch.float32, False)
    x, w = torch.randn(2, t, d), torch.randn(d, k)
    y, _ = ops.causal_conv1d(x, w, backend=backend)
    want = nn.functional.conv1d(nn.functional.pad(x.mT.double(), (k - 1, 0)), w.double()[:, None], groups=d).mT
    assert torch.allclose(y.double(), want, atol=1e-4)


def test_same_call_same_bits() -> None:
    """Loss and every gradient, twice, on one thread and on several: no atomics, nothing tuned by timing."""
    model, x = small(), ids(3, 40)
    leaves = scan_case(USUAL | {"t": 300, "d": 64}).leaves
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            scan = {k: v.detach().requires_grad_() for k, v in leaves.items()}
            y, last = ops.selective_scan(**scan, dt_softplus=True)
            results.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), list(scan.values()))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    grads = [torch.autograd.grad(model.loss(x, x), list(model.parameters())) for _ in range(2)]
    assert all(map(torch.equal, *grads))


def test_a_row_does_not_depend_on_its_batch() -> None:
    """An operation gives a sequence the same bits alone as among others."""
    x = scan_case(USUAL | {"t": 50, "d": 19, "n": 16}).leaves
    y, last = ops.selective_scan(**x, dt_softplus=True)
    rows = {k: v[1:] if k in ("u", "dt", "B", "C", "z", "initial_state") else v for k, v in x.items()}
    alone, end = ops.selective_scan(**rows, dt_softplus=True)
    assert torch.equal(alone, y[1:])
    assert torch.equal(end, last[1:])


@pytest.mark.parametrize("b", [1, 3])
def test_padding_changes_nothing(b: int) -> None:
    """Padded rows, a batch of one among them, equal their sequences alone: outputs, states, and gradients."""
    model, lengths = small(), torch.tensor([4, 0, 7][:b])
    x = ids(b, 7)
    for i, n in enumerate(lengths.tolist()):
        x[i, n:] = -1  # no token at all
    logits, last = model.extend(x, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        alone, end = model.extend(x[i : i + 1, :n])
        close(logits[i : i + 1, :n], alone, torch.float32)
        assert not logits[i, n:].any()
        close(state.index(last, [i]), end, torch.float32)
    names = ("u", "dt", "B", "C", "z")
    for side in ("right", "left"):
        s = scan_case(USUAL | {"layout": side, "t": 9})
        check(s, torch.float32, False)  # NaN in the padding reaches neither values nor gradients
    assert set(names) <= set(s.leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["real", "constant B", "complex"])
def test_gradients_hold_the_published_bound(backend: str, kind: str) -> None:
    """Gradients of every argument, states and conjugates included, against another algorithm in float64."""
    changes = {"real": {}, "constant B": {"B": "constant"}, "complex": {"complex": True, "B": "constant"}}[kind]
    for layout in ("whole", "packed"):
        case = scan_case(USUAL | {"backend": backend, "t": 65, "d": 7, "layout": layout} | changes)
        assert "initial_state" in case.leaves
        check(case, torch.float32, False)


def test_the_discretisation_is_the_documented_one() -> None:
    """A by zero-order hold, B by Euler, as the layer's page says; ZOH for B would give 0.316 where Euler gives 0.5."""
    dt, a = 0.5, -2.0
    one = torch.ones(1, 1, 1)
    y, h = ops.selective_scan(one, dt * one, torch.tensor([[a]]), one, one, initial_state=3 * one)
    want = torch.exp(torch.tensor(a * dt)) * 3 + dt
    assert torch.allclose(y.squeeze(), want)
    assert torch.allclose(h.squeeze(), want)
    for documented in (ops.selective_scan.__doc__, sys.modules[sl.Mamba.__module__].__doc__):
        text = " ".join((documented or "").split())
        assert "A by zero-order hold, B by Euler" in text


# ---- the ecosystem ---------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """An adapter as peft's LoRA: the layer it wraps, plus up(down(x))."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))  # type: ignore[no-any-return]  # modules


class Int8(nn.Module):
    """A weight-only quantised Linear; it has no `weight` that anybody could read past it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.packed = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.called = 0

    def forward(self, x: Tensor) -> Tensor:
        self.called += 1
        return x @ (self.packed * self.scale).T.to(x.dtype)


def replaced(model: nn.Module, names: tuple[str, ...], make: type[nn.Module]) -> list[nn.Module]:
    made = []
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, make(getattr(module, name)))
                made.append(getattr(module, name))
    return made


def test_adapters_are_trained_in_every_projection() -> None:
    """None is bypassed by a fused path: each gets a gradient and changes what comes out, in steps as in sequences."""
    model, x = small(), ids(2, 6)
    before = model(x)
    adapters = replaced(model, ("in_proj", "x_proj", "dt_proj", "out_proj"), LowRank)
    assert len(adapters) == 8
    model.loss(x, x).backward()
    for adapter in adapters:
        for matrix in (adapter.down.weight, adapter.up.weight):
            assert matrix.grad is not None, "bypassed"
            assert matrix.grad.any()
    for adapter in adapters:
        kept = adapter.up.weight.detach().clone()
        with torch.no_grad():
            adapter.up.weight.mul_(3)
            changed = model(x)
            adapter.up.weight.copy_(kept)
        assert not torch.allclose(changed, model(x))
    assert not torch.allclose(model(x), before)
    with torch.no_grad():
        walked = model.init_state(2)
        steps = torch.stack([model.step_(x[:, i], walked) for i in range(6)], 1)
    close(steps, model(x).detach(), torch.float32)


@torch.no_grad()
def test_quantised_projections_are_called() -> None:
    """int8 Linears without a readable weight serve the sequence form and the step form."""
    model, x = small(), ids(2, 6)
    before = model(x)
    quantised = replaced(model, ("in_proj", "x_proj", "out_proj"), Int8)
    assert len(quantised) == 6
    after = model(x)
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
    walked = model.init_state(2)
    steps = torch.stack([model.step_(x[:, i], walked) for i in range(6)], 1)
    close(steps, after, torch.float32)
    assert {q.called for q in quantised} == {7}
    assert {leaf.dtype for leaf in pytree.tree_leaves(walked)} == {torch.float32}


@torch.no_grad()
def test_traces_whole_with_free_sizes() -> None:
    """One graph, no break, for any batch and length."""
    model = small(n_layer=1)
    free = {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}
    program = torch.export.export(model, (ids(2, 4),), dynamic_shapes=(free,), strict=False).module()
    for b, t in ((1, 1), (3, 33)):
        x = ids(b, t)
        close(program(x), model(x), torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_checkpoints_of_every_layout_are_recognised(format: str, tmp_path: Path) -> None:
    """`load` finds out by itself, from .bin and safetensors, and gives the same model back."""
    model, x = small(), ids(1, 5)
    stateline.save(model, tmp_path, format)
    assert torch.equal(stateline.load(tmp_path)(x), model(x))


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    """Not by a size mismatch deep inside."""
    stateline.save(small(), tmp_path, "huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "jamba"}))
    with pytest.raises(ValueError, match=r"config.json has model_type 'jamba'.*supported: 'mamba', 'mamba2'"):
        stateline.load(tmp_path)


def test_the_table_names_every_test() -> None:
    """The mapping above cannot drift: each test is in it, in full or up to an ellipsis."""
    table = __doc__ or ""
    for name in [n for n in globals() if n.startswith("test_") and n != "test_the_table_names_every_test"]:
        parts = [name[:size] + "…" for size in range(len("test_"), len(name))]
        assert name in table or any(part in table for part in parts), name
    assert LAYER_BOUND
