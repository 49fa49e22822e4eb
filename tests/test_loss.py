"""The loss of a language model: the cross-entropy of its logits, in chunks, with the gradients of the whole."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from test_models import ids, small
from torch import Tensor, nn

from stateline.models import LanguageModel, checkpoint
from stateline.models.loss import piece_of


@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 1000])
@pytest.mark.parametrize("where", ["plain", "padded", "packed"])
def test_loss_is_the_cross_entropy_of_the_logits(chunk: int, where: str) -> None:
    model = small(tie_embeddings=False).double()
    x, targets = ids(), ids()
    targets[0, 2] = -7
    options: dict[str, Any] = {"ignore_index": -7}
    if where == "padded":
        options["lengths"] = torch.tensor([7, 3])
        x[1, 3:] = -1
    if where == "packed":
        x, targets = x.view(1, 14), targets.view(1, 14)
        options["cu_seqlens"] = torch.tensor([0, 5, 14])
    place = {k: v for k, v in options.items() if k != "ignore_index"}
    counted = targets.clone()
    if where == "padded":
        counted[1, 3:] = -7
    want = F.cross_entropy(model(x, **place).flatten(0, 1), counted.flatten(), ignore_index=-7)
    got = model.loss(x, targets, chunk=chunk, **options)
    assert got.dtype == torch.float64
    assert abs(got - want) < 1e-12
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, g, w in zip(
        names, torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        assert (g - w).abs().max() <= 1e-10 * w.abs().max(), name


def test_loss_without_targets_is_zero_and_float32_in_16_bits() -> None:
    model, x = small(), ids()
    loss = model.loss(x, torch.full_like(x, -100))
    assert loss == 0
    loss.backward()
    want = model.loss(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.loss(x, x, chunk=3)
    assert got.dtype == torch.float32
    assert abs(got - want) < 2e-2 * want
    model = model.bfloat16()
    exact = F.cross_entropy(model(x).float().flatten(0, 1), x.flatten())
    assert abs(model.loss(x, x, chunk=3) - exact) < 1e-5  # softmax in bfloat16 would be off by 1e-2


@pytest.mark.parametrize("learns", [True, False])
def test_loss_never_holds_more_than_a_chunk_of_logits(learns: bool) -> None:
    """Counts the tokens that reach the head, and the logits that are alive when they do and afterwards."""
    model, x = small(vocab_size=5000), torch.randint(5000, (2, 40))
    sizes: list[int] = []
    logits: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, args: Any, out: Tensor) -> None:
        assert not any(ref() is not None for ref in logits), "logits of an earlier chunk are alive"
        sizes.append(out.shape[0])
        logits.append(weakref.ref(out))

    def pack(kept: Tensor) -> Tensor:
        assert not kept.dim() or kept.shape[-1] < 5000, "logits went through the hooks of the surrounding graph"
        return kept

    model.lm_head.register_forward_hook(watch)
    with torch.set_grad_enabled(learns), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        loss = model.loss(x, x, chunk=16)
    assert sizes == [16] * 5
    assert not any(ref() is not None for ref in logits), "logits are kept for the backward pass"
    if learns:
        loss.backward()
        assert sizes == [16] * 5, "the head ran again"


def test_chunks_follow_the_vocabulary() -> None:
    assert piece_of(50280, "cpu") == 1024
    assert piece_of(50280, "cuda") == 4096
    assert piece_of(256, "cpu") == 2**18
    assert piece_of(10**7, "cuda") == 256


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, list(learning.values()), allow_unused=True), strict=True))


def same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    assert any(g is not None for g in want.values())
    for name, w in want.items():
        assert (got[name] is None) == (w is None), name
        if w is not None:
            assert (got[name] - w).abs().max() <= bound * w.abs().max(), name


@pytest.mark.parametrize("frozen", ["nothing", "head", "backbone", "all but the norm"])
@pytest.mark.parametrize("tied", [True, False])
def test_chunks_give_the_gradients_of_the_whole_whatever_is_frozen(frozen: str, tied: bool) -> None:
    model, x = small(tie_embeddings=tied), ids(2, 9)
    for name, p in model.named_parameters():
        head = name in ("lm_head.weight", "backbone.embedding.weight")
        keep = {"nothing": True, "head": not head, "backbone": head, "all but the norm": "norm_f" in name}[frozen]
        p.requires_grad_(keep)
    want = gradients(model, 3 * model.loss(x, x, chunk=18))
    same_gradients(gradients(model, 3 * model.loss(x, x, chunk=5)), want)
    if frozen == "all but the norm":
        model.requires_grad_(False)
        assert not model.loss(x, x, chunk=5).requires_grad


def test_chunks_of_half_floats_keep_their_gradients() -> None:
    """float16 has neither room for sums over many tokens nor for probabilities divided by their number."""
    model, x = small(n_layer=1, tie_embeddings=False).half(), torch.zeros(1, 4096, dtype=torch.long)
    with torch.no_grad():
        model.backbone.norm_f.weight *= 40
        model.lm_head.weight *= 0.1
    twin = small(n_layer=1, tie_embeddings=False).double()
    twin.load_state_dict(model.state_dict())
    got, want = gradients(model, model.loss(x, x, chunk=2048)), gradients(twin, twin.loss(x, x))
    assert want["lm_head.weight"].abs().max() * 2048 > torch.finfo(torch.float16).max
    same_gradients({"": got["lm_head.weight"].double()}, {"": want["lm_head.weight"]}, 1e-2)


def test_chunked_loss_is_used_as_any_loss() -> None:
    """Backward twice, accumulated, offloaded, computed again, and under autocast; not differentiated twice."""
    model, x = small(), ids(2, 9)
    want = gradients(model, model.loss(x, x))
    loss = model.loss(x, x, chunk=4)
    for _ in range(2):
        names = list(want)
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        same_gradients(dict(zip(names, found, strict=True)), want)
    model.loss(x, x, chunk=4).backward()
    (2 * model.loss(x, x, chunk=4)).backward()
    same_gradients({name: p.grad / 3 for name, p in model.named_parameters() if p.grad is not None}, want)
    with torch.autograd.graph.save_on_cpu():
        offloaded = model.loss(x, x, chunk=4)
    same_gradients(gradients(model, offloaded), want)
    again = torch.utils.checkpoint.checkpoint(lambda ids: model.loss(ids, ids, chunk=4), x, use_reentrant=False)
    same_gradients(gradients(model, again), want)
    with torch.autocast("cpu", torch.bfloat16):
        whole, pieces = (gradients(model, model.loss(x, x, chunk=size)) for size in (18, 4))
    same_gradients(pieces, whole, 2e-2)
    for size in (4, 18):
        first = torch.autograd.grad(model.loss(x, x, chunk=size), model.lm_head.weight, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"a second derivative was asked for|once_differentiable"):
            first.square().sum().backward()


def test_a_head_may_learn_what_it_does_not_own() -> None:
    model, x = small(tie_embeddings=False), ids(2, 9)
    outside = nn.Parameter(torch.randn(64))
    head = model.lm_head.forward
    model.lm_head.forward = lambda h: head(h) * outside  # type: ignore[method-assign]  # as patches do
    want = torch.autograd.grad(model.loss(x, x), outside)[0]
    got = torch.autograd.grad(model.loss(x, x, chunk=4), outside)[0]
    assert want.abs().max() > 0
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_one_gradient_for_two_parameters_is_added_up_once() -> None:
    class Doubled(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(base.weight.detach() / 2), nn.Parameter(base.weight.detach() / 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a + self.b)

    model, x = small(tie_embeddings=False), ids(2, 9)
    model.lm_head = Doubled(model.lm_head)  # type: ignore[assignment]  # as adapter libraries do
    same_gradients(gradients(model, model.loss(x, x, chunk=4)), gradients(model, model.loss(x, x)))


def test_transforms_differentiate_the_loss() -> None:
    model, x = small(n_layer=1), ids(2, 9)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        call = lambda ids: model.loss(ids, ids, chunk=4)  # noqa: E731
        with torch.nn.utils.stateless._reparametrize_module(model, values, tie_weights=True):
            return call(x)

    got = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    same_gradients(got, gradients(model, model.loss(x, x)))


def test_loss_goes_through_the_head_as_a_module() -> None:
    """An adapter on the head is trained: nothing reads its weight."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.extra = base, nn.Linear(16, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.extra(x)  # type: ignore[no-any-return]  # modules

    model = small()
    model.lm_head = Adapter(model.lm_head)  # type: ignore[assignment]  # as adapter libraries do
    model.loss(ids(), ids(), chunk=4).backward()
    assert (model.lm_head.extra.weight.grad != 0).any()
    with pytest.raises(ValueError, match="Merge or remove adapters"):
        checkpoint.weights(model)
