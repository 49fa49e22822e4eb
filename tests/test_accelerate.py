"""Models of transformers on our kernels: the same logits, tokens, gradients, caches; and what may have changed."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import inspect
import pickle
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import (
    BOUND,
    CACHE_NAMES,
    KINDS,
    KINDS2,
    assert_close,
    cached,
    falcon_h1_goes_on,
    in_pieces,
    make,
    padded,
    pair,
    worst_gradient,
)
from hf_models import transformers as theirs
from torch import Tensor, nn

from stateline.interop import transformers as ours

# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_logits(kind: str, side: str) -> None:
    fast, slow = pair(kind)
    ids, mask = padded()
    given = {"none": None, "left": mask, "right": mask.flip(1)}[side]
    assert_close(fast(ids, attention_mask=given).logits, slow(ids, attention_mask=given).logits)


@pytest.mark.parametrize("kind", cached(KINDS))
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_token_for_token(kind: str, beams: int) -> None:
    fast, slow = pair(kind)
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **options), slow.generate(ids, **options))
    assert torch.equal(fast.generate(ids, **options, use_cache=False), slow.generate(ids, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 2, 9])
@torch.no_grad()
def test_caches_hold_the_same(kind: str, t: int) -> None:
    """After a prompt, shorter than the convolution or not, and after a step from it."""
    fast, slow = pair(kind)
    name = CACHE_NAMES.get(kind, "past_key_values")
    ids = torch.randint(61, (2, t + 1))
    caches = [model(ids[:, :t], use_cache=True)[name] for model in (fast, slow)]
    for step in range(2):
        for layer, wanted in zip(caches[0].layers, caches[1].layers, strict=True):
            if (getattr(wanted, "conv_states", None) or [None])[0] is not None:  # an MLP has none
                assert layer.conv_states[0].shape == wanted.conv_states[0].shape
                assert layer.recurrent_states[0].shape == wanted.recurrent_states[0].shape
                assert_close(layer.conv_states[0], wanted.conv_states[0])
                assert_close(layer.recurrent_states[0], wanted.recurrent_states[0])
        if step == 0:
            pairs = zip((fast, slow), caches, strict=True)
            logits = [model(ids[:, t:], **{name: cache}, use_cache=True).logits for model, cache in pairs]
            assert_close(*logits)


@pytest.mark.parametrize("kind", cached(KINDS))
@pytest.mark.parametrize("grad", [False, True])
def test_a_prompt_in_pieces_equals_the_prompt(kind: str, grad: bool) -> None:
    """transformers' Mamba-1 itself forgets the scan's state when more than one token follows a cache."""
    fast, _ = pair(kind)
    ids = torch.randint(61, (2, 12))
    with torch.set_grad_enabled(grad):
        whole = fast(ids).logits
        parts = in_pieces(fast, kind, ids, [5, 2, 1, 4])
    assert_close(torch.cat(parts, 1), whole)
    if grad:  # through the state too
        wanted = torch.autograd.grad(whole[:, -1].sum(), fast.get_input_embeddings().weight)[0]
        got = torch.autograd.grad(parts[-1][:, -1].sum(), fast.get_input_embeddings().weight)[0]
        assert_close(got, wanted, 4 * BOUND)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(kind: str, checkpointing: bool) -> None:
    fast, slow = pair(kind)
    ids, mask = padded()
    if checkpointing:
        fast.gradient_checkpointing_enable()
    for model in (fast, slow):
        model.train()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert worst_gradient(fast, slow) < 2e-5  # the bound of operations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_sixteen_bits_are_as_near_the_truth_as_transformers(kind: str, how: str) -> None:
    fast, slow = pair(kind)
    ids, mask = padded()
    with torch.no_grad():
        truth = slow(ids, attention_mask=mask).logits
        errors = []
        for model in (fast, slow):
            model = model.to(torch.bfloat16) if how == "bfloat16" else model
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                logits = model(ids, attention_mask=mask).logits
            errors.append(float((logits.float() - truth).abs().mean()))
    assert errors[0] <= 1.25 * errors[1], errors
    fast.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        fast(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", cached(KINDS2))
def test_step_limits(kind: str) -> None:
    """At every token; transformers itself leaves them out where one token follows a cache."""
    limits = {"time_step_min": 0.7} if kind in ("zamba2", "nemotron_h") else {"time_step_limit": [0.6, 0.8]}
    fast, slow = pair(kind, **limits)
    ids, mask = padded()
    wanted = slow(ids, attention_mask=mask)
    assert_close(fast(ids, attention_mask=mask).logits, wanted.logits)
    for model in (fast, slow):
        model(ids, labels=ids).loss.backward()
    assert worst_gradient(fast, slow) < 2e-5
    with torch.no_grad():
        whole = slow(ids).logits
        assert_close(torch.cat(in_pieces(fast, kind, ids, [1] * 13), 1), whole)
        for module in fast.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
        assert (fast(ids).logits - whole).abs().max() > 1e-3 * whole.abs().max()  # so they did something


@falcon_h1_goes_on
@pytest.mark.parametrize("norm", ["gate alone", "before the gate", "after the gate"])
def test_norms_of_falcon_h1(norm: str) -> None:
    chosen = {"mamba_rms_norm": norm != "gate alone", "mamba_norm_before_gate": norm == "before the gate"}
    fast, slow = pair("falcon_h1", **chosen)
    ids, mask = padded()
    for model in (fast, slow):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert worst_gradient(fast, slow) < 2e-5
    with torch.no_grad():
        assert_close(fast(ids, attention_mask=mask).logits, slow(ids, attention_mask=mask).logits)
        parts = [in_pieces(model, "falcon_h1", ids, [5, 1, 1, 6]) for model in (fast, slow)]
        assert_close(*(torch.cat(p, 1) for p in parts))


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
def test_compiled(kind: str) -> None:
    fast, slow = pair(kind)
    ids = torch.randint(61, (2, 11))
    step = torch.compile(lambda x: fast(x, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    assert_close(step(ids), slow(ids).logits)
    step(ids).sum().backward()
    slow(ids).logits.sum().backward()
    assert worst_gradient(fast, slow) < 2e-5


# ---- what must not be passed over ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", *KINDS2])
@pytest.mark.parametrize("first", ["adapters", "accelerate"])
def test_adapters_take_part(kind: str, first: str) -> None:
    peft = pytest.importorskip("peft")
    slow = make(kind)
    where = ["in_proj"] if kind in KINDS2 else ["in_proj", "x_proj", "dt_proj"]
    config = peft.LoraConfig(r=2, target_modules=where, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(slow), config)
    merged = copy.deepcopy(wrapped).merge_and_unload()  # an ordinary model, which transformers computes by itself
    if first == "adapters":
        ours.accelerate(wrapped)
    else:
        weights = {name: p.clone() for name, p in wrapped.named_parameters() if "lora" in name}
        fast = copy.deepcopy(slow)
        ours.accelerate(fast)
        wrapped = peft.get_peft_model(fast, config)
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "lora" in name:
                    p.copy_(weights[name])
    ids, mask = padded()
    assert_close(wrapped(ids, attention_mask=mask).logits, merged(ids, attention_mask=mask).logits)
    wrapped(ids, labels=ids).loss.backward()
    trained = [p for name, p in wrapped.named_parameters() if "lora" in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


class _Eighths(nn.Module):
    """A Linear as quantisation leaves it: no floating weight to read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter((linear.weight.detach() * 64).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", *KINDS2])
@torch.no_grad()
def test_quantised_linears_take_part(kind: str) -> None:
    fast, slow = pair(kind)
    for packed, plain in zip(list(fast.modules()), list(slow.modules()), strict=True):
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            if type(getattr(plain, name, None)) is nn.Linear:
                setattr(packed, name, _Eighths(getattr(plain, name)))
                getattr(plain, name).weight.copy_(getattr(packed, name).weight.float() / 64)
    ids, mask = padded()
    assert_close(fast(ids, attention_mask=mask).logits, slow(ids, attention_mask=mask).logits)


def test_hooks_take_part() -> None:
    fast, _ = pair("mamba")
    called: list[str] = []
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        linear = getattr(fast.backbone.layers[0].mixer, name)
        linear.register_forward_hook(lambda *_, name=name: called.append(name))
    fast(torch.randint(61, (1, 3)))
    assert called == ["in_proj", "x_proj", "dt_proj", "out_proj"]


def test_a_convolution_that_was_replaced_is_refused() -> None:
    fast, _ = pair("mamba")
    fast.backbone.layers[0].mixer.conv1d = nn.Sequential(fast.backbone.layers[0].mixer.conv1d)
    with pytest.raises(TypeError, match=r"conv1d is a Sequential.*leave it out"):
        fast(torch.randint(61, (1, 3)))


@pytest.mark.parametrize("order", ["hooks first", "accelerate first"])
@torch.no_grad()
def test_offloaded_weights_are_fetched(order: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    slow = make("mamba")
    fast = copy.deepcopy(slow)
    if order == "accelerate first":
        ours.accelerate(fast)
    fetched: list[str] = []

    class Fetch(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fetched.append(type(module).__name__)
            return args, kwargs

    mixer = fast.backbone.layers[0].mixer
    for module in (mixer, mixer.conv1d, mixer.dt_proj):
        hooks.add_hook_to_module(module, Fetch())
    if order == "hooks first":
        ours.accelerate(fast)
    assert (
        vars(mixer)["_old_forward"].__func__ is type(mixer).forward is not type(slow.backbone.layers[0].mixer).forward
    )
    ids = torch.randint(61, (1, 5))
    assert_close(fast(ids).logits, slow(ids).logits)
    assert fetched == ["MambaMixer", "Conv1d", "Linear"]
    ours.restore(fast)
    assert torch.equal(fast(ids).logits, slow(ids).logits)


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_restore_leaves_the_model_as_it_came(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = make(kind)
    fast = copy.deepcopy(slow)
    ids = torch.randint(61, (2, 7))
    calls: list[str] = []
    name = "ssd" if kind in KINDS2 else "selective_scan"
    scan = getattr(ours.mamba.ops, name)
    monkeypatch.setattr(ours.mamba.ops, name, lambda *a, **k: calls.append("scan") or scan(*a, **k))
    with torch.no_grad():
        with ours.accelerate(fast) as inside:
            assert inside is fast
            assert list(fast.state_dict()) == list(slow.state_dict())
            assert [type(m).__name__ for m in fast.modules()] == [type(m).__name__ for m in slow.modules()]
            fast(ids)
        assert calls
        calls.clear()
        assert [type(m) for m in fast.modules()] == [type(m) for m in slow.modules()]
        assert torch.equal(fast(ids).logits, slow(ids).logits)
        assert not calls


def test_twice_is_once() -> None:
    fast, slow = pair("mamba")
    with ours.accelerate(fast):
        pass  # which had nothing to do, and has nothing to undo
    assert type(fast.backbone.layers[0].mixer) is not type(slow.backbone.layers[0].mixer)
    ours.restore(fast)
    ours.restore(fast)
    assert type(fast.backbone.layers[0].mixer) is type(slow.backbone.layers[0].mixer)


def test_accelerated_models_are_copied_and_pickled() -> None:
    fast, _ = pair("mamba")
    ids = torch.randint(61, (2, 7))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(ids).logits, fast(ids).logits)
        ours.restore(other)
        assert type(other.backbone.layers[0].mixer) is theirs.models.mamba.modeling_mamba.MambaMixer


def test_what_cannot_be_accelerated_says_so() -> None:
    with pytest.raises(ValueError, match=r"accelerate: Linear has no module.*MambaMixer"):
        ours.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a torch"):
        ours.accelerate("mamba")  # type: ignore[arg-type]  # no model
    with pytest.raises(ValueError, match=r"activation is 'gelu'"):
        ours.accelerate(make("mamba", hidden_act="gelu"))
    with pytest.raises(ValueError, match=r"activation is 'gelu'"):
        ours.accelerate(make("mamba2", hidden_act="gelu"))
    fast, _ = pair("mamba")
    with pytest.raises(ValueError, match="seq_idx was given"):
        fast.backbone.layers[0].mixer(torch.randn(1, 3, 24), seq_idx=torch.zeros(1, 3, dtype=torch.int32))


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mamba")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.14.3")  # which replaces itself when first used
    with pytest.raises(ImportError, match=r"transformers is 5\.14\.3, expected 5\.15\.1 or newer"):
        ours.accelerate(model)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.99.0.dev0")
    ours._say_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 5\.99\.0\.dev0 is newer than"):
        ours.accelerate(model)


# ---- the contract with the installed release -------------------------------------------------------------------------

_ONE = dict.fromkeys(
    ("Mamba2Mixer", "BambaMixer", "Zamba2MambaMixer", "NemotronHMamba2Mixer", "GraniteMoeHybridMambaLayer")
)
#: release -> what each mixer's forward said when ours was tested with it, without its comments: see `fingerprint`.
WRITTEN_FOR: dict[str, dict[str, str]] = {
    "5.15.1 and 5.17.0": {
        "MambaMixer": "93fb8eebe4e86016", "FalconMambaMixer": "d044799ad10d3fa3", "JambaMambaMixer": "c3a65715a9636da5",
        "ZambaMambaMixer": "a9b0a708185b2b20", **dict.fromkeys(_ONE, "cae6d11fc42cd6bc"),
        "FalconH1Mixer": "6c0c9f55f4faafc8",
    },
    "5.20.0": {"ZambaMambaMixer": "2ae4da0c06dcedf4"},  # the others as before
    "5.23.0": {
        "MambaMixer": "7446e9fb932a431d", "FalconMambaMixer": "8493773c8ebfa58a", "JambaMambaMixer": "e5ecbf7521bdfbc8",
        "ZambaMambaMixer": "fe0bf13961e9fd2c", **dict.fromkeys(_ONE, "1f113c0e2bd340cd"),
        "FalconH1Mixer": "28d42cc087175e53",
    },
}  # fmt: skip


def original(name: str) -> Any:
    return getattr(importlib.import_module(ours.MIXERS[name].module), name)


def fingerprint(function: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ours.MIXERS)
def test_the_contract_has_not_changed(name: str) -> None:
    assert list(ours.mixer_problems(original(name))) == []
    ours.check_contract(original(name))
    found = fingerprint(ours.own_forward(original(name)))
    known = {written[name]: release for release, written in WRITTEN_FOR.items() if name in written}
    assert found in known, (
        f"transformers {theirs.__version__} has another {name}.forward ({found}) than those ours was tested with"
        f" ({known}). Read what changed, adapt interop/transformers_mamba*.py, test, note the new one."
    )


def test_the_newest_release_tested_is_the_one_that_is_pinned() -> None:
    """Whatever is installed: a user may have an older one, with which these tests run too."""
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text()
    newest = ".".join(map(str, ours.TESTED))
    assert f"transformers=={newest}\n" in pins
    assert newest in WRITTEN_FOR
    assert ours.OLDEST <= ours.release(theirs.__version__) <= ours.TESTED


def test_a_changed_contract_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class MambaMixer(nn.Module):
        def forward(self, hidden_states: Tensor, cache_params: Any = None, novelty: int = 0) -> Tensor:
            return self.novel(hidden_states)

    with pytest.raises(RuntimeError, match=r"has changed: MambaMixer.forward takes self, .*reads novel, which is new"):
        ours.check_contract(MambaMixer)
    monkeypatch.delattr(theirs.cache_utils.Cache, "update_conv_state")
    ours.check_contract.cache_clear()
    with pytest.raises(RuntimeError, match=r"Cache\.update_conv_state has no parameter"):
        ours.accelerate(make("mamba"))
    ours.check_contract.cache_clear()
