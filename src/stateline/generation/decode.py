"""Models prepared for decoding: matrices packed to 16, 8 or 4 bits, and a whole token in one native call.

>>> import stateline
>>> model = stateline.prepare_for_decode(stateline.load("bundled"), weights="int8")
>>> text = "".join(stateline.generate(model, "My fellow citizens", max_tokens=8))
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from stateline import backends, checks
from stateline.models import LanguageModel, ModelState
from stateline.nn import Block, LayerNorm, Mamba, Mamba2, PackedEmbedding, PackedLinear
from stateline.nn.linear import PackedMatrix, gather
from stateline.ops.decode_token import HeadLayer, Heads, Layer, Matrix, Network, Norm, decode_token_
from stateline.ops.ssd import check_limit

OP = "prepare_for_decode"
LOG2E = 1.4426950408889634
#: The format of each kind of matrix, by the last part of its name; others take the first. Step sizes decide how long a
#: model remembers, and their matrix is small: they keep 16 bits. The head's errors reach every logit.
FORMATS: dict[str, dict[str, str]] = {
    "bf16": {"": "bf16"},
    "int8": {"": "int8", "dt_proj": "bf16"},
    "int4": {"": "int4", "dt_proj": "bf16", "x_proj": "int8", "lm_head": "int8"},
}


def prepare_for_decode(model: LanguageModel, weights: str = "bf16") -> LanguageModel:
    """A copy of `model` whose Linears and embedding are packed, and whose `step_` is one native call; for inference.

    Args:
        weights: "bf16" halves float32; "int8" keeps a scale a row, "int4" a scale for 32 weights. Decay rates,
            step-size biases, skips, convolutions, norms and states stay float32, as is all between the matrices.

    `extend`, `step_`, `generate`, streams and states are used as before; a state of one form goes on in another of the
    same model within the form's precision. Training, saving and casting need the model itself. For stacks of Mamba or
    of Mamba2 blocks `step_` is one call on the CPU, with the C++ library, and on CUDA devices of compute capability 9.0
    or later, where it pays for up to 64 sequences; elsewhere it goes layer by layer, and `explain` says why.

    Raises ValueError for another name of weights, TypeError for what is no LanguageModel or is packed already.
    """
    checks.choice(OP, "weights", weights, tuple(FORMATS))
    if not isinstance(model, LanguageModel):
        raise checks.fail(OP, f"model is a {type(model).__name__}, expected a LanguageModel.", error=TypeError)
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        raise checks.fail(OP, "model is packed already.", "Prepare the model as it was loaded.", error=TypeError)
    if type(model.lm_head) is not nn.Linear or type(model.backbone.embedding) is not nn.Embedding:
        kinds = f"{type(model.lm_head).__name__} and {type(model.backbone.embedding).__name__}"
        raise checks.fail(OP, f"lm_head and embedding are {kinds}, expected Linear and Embedding.", error=TypeError)
    formats = FORMATS[weights]
    replaced: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if module._forward_hooks or module._forward_pre_hooks:
                raise checks.fail(OP, f"{name} has forward hooks, which packing would drop.", "Remove them first.")
            replaced[id(module)] = PackedLinear.pack(module, formats.get(name.rpartition(".")[2], formats[""]))
    head = replaced[id(model.lm_head)].matrix
    if not model.config.tie_embeddings:
        head = PackedMatrix(model.backbone.embedding.weight.detach(), head.format)
    replaced[id(model.backbone.embedding)] = PackedEmbedding(head)
    packed: LanguageModel = copy.deepcopy(model, replaced).float().eval().requires_grad_(False)
    if packed.backbone.norm_f.weight.device.type == "cpu":
        gather([m for m in packed.modules() if isinstance(m, PackedMatrix)])
    packed.token_step = None if (why := explain(packed)) else TokenStep(packed)
    if why and packed.backbone.norm_f.weight.is_cuda:
        backends.say_once(
            f"{OP}: each token goes layer by layer and unpacks every matrix, slower than the model as it was: {why}"
        )
    packed.register_load_state_dict_post_hook(_forget)
    return packed


def _forget(model: LanguageModel, _: Any) -> None:
    """After weights were loaded: what the native call read of the old ones is gone."""
    if model.token_step is not None:
        model.token_step.network = None  # type: ignore[attr-defined]  # a TokenStep, as it was put here


def explain(model: LanguageModel) -> str | None:
    """Why `step_` of a prepared model goes layer by layer; None if it is one native call."""
    device = model.backbone.norm_f.weight.device.type
    if (why := _rejected(device)) is not None:
        return why
    kinds: set[type] = set()
    for block in model.backbone.layers:
        mixer = getattr(block, "mixer", block)
        if not isinstance(block, Block) or type(mixer) not in (Mamba, Mamba2):
            return f"a block holds {type(mixer).__name__}, the native call knows Mamba and Mamba2"
        if type(mixer) is Mamba and mixer.b_c_dt_rms_eps is not None:
            return "a block's Mamba normalises dt, B and C, the native call knows it without"
        kinds.add(type(mixer))
        if len(kinds) > 1:
            return "some blocks hold Mamba and others Mamba2, the native call knows stacks of one of them"
        wrapped = [
            n
            for n, m in block.named_modules()
            if n.endswith(("_proj", "fc1", "fc2")) and not isinstance(m, PackedLinear)
        ]
        if wrapped:
            kind = type(block.get_submodule(wrapped[0])).__name__
            return f"{wrapped[0]} is a {kind}, the native call needs plain matrices"
    return _rejected(device, network_of(model))


def _rejected(device: str, *network: Network) -> str | None:
    """Why the reference computes a token of a network, or of any, on this device; None where faster code does."""
    choice = backends.choose("decode_token", device, args=network)
    return choice.rejected["gpu" if device == "cuda" else "cpu"] if choice.name == "reference" else None


class TokenStep:
    """`LanguageModel.step_` of a prepared model, as one call. A copy of the model gets one of its own.

    What the call reads is put together at the first token: vectors as copies, while the matrices are the model's own
    and are looked for again when they have moved.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.network: Network | None = None

    def renew(self) -> TokenStep | None:
        """A new one after the model's tensors were moved; None where the model now is no native call serves."""
        return None if explain(self.model) else TokenStep(self.model)

    def __call__(self, ids: Tensor, state: ModelState) -> Tensor:
        """ids (b) -> logits (b, v), writing into `state`."""
        if self.network is None or not self.network.at_home():
            self.network = network_of(self.model)
        states = [x for layer in state.layers for x in (layer.conv, layer.ssm)]
        return decode_token_(states, ids, self.network)[:, : self.model.config.vocab_size]

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenStep:
        return TokenStep(copy.deepcopy(self.model, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "network": None}


def network_of(model: LanguageModel) -> Network:
    """What the native call reads of a prepared model."""
    backbone = model.backbone
    embedding, head = cast(PackedEmbedding, backbone.embedding), cast(PackedLinear, model.lm_head)
    return Network(
        vocabulary=model.config.vocab_size,
        layers=tuple(_layer(block) for block in backbone.layers),
        norm=_norm(backbone.norm_f),
        eps=model.config.norm_eps,
        embedding=_matrix(embedding.matrix, None),
        head=_matrix(head.matrix, None),
    )


def _layer(block: Any) -> Layer | HeadLayer:
    mixer = block.mixer
    shared: dict[str, Any] = {
        "norm": _norm(block.norm),
        "in_proj": _linear(mixer.in_proj),
        "out_proj": _linear(mixer.out_proj),
        "taps": _own(mixer.conv1d.weight.squeeze(1).T),
        "conv_bias": None if mixer.conv1d.bias is None else _own(mixer.conv1d.bias),
        "mlp": None if block.mlp is None else (_norm(block.norm2), _linear(block.mlp.fc1), _linear(block.mlp.fc2)),
    }
    A = -torch.exp(mixer.A_log.float())
    if isinstance(mixer, Mamba2):
        D = mixer.D if mixer.D_has_hdim else mixer.D.repeat_interleave(mixer.headdim)
        scale = torch.ones(mixer.d_ssm, device=A.device) if mixer.norm is None else mixer.norm.weight
        own: dict[str, Any] = {"A": A, "D": D, "dt_bias": mixer.dt_bias, "scale": scale}
        return HeadLayer(**shared | {name: _own(x) for name, x in own.items()}, heads=_heads(mixer))
    shared |= {"x_proj": _linear(mixer.x_proj), "dt_proj": _linear(mixer.dt_proj)}
    return Layer(**shared, A2=_own(A * LOG2E), D=_own(mixer.D), dt_bias=_own(mixer.dt_proj.bias))


def _heads(mixer: Mamba2) -> Heads:
    norm = mixer.norm
    low, high = check_limit(OP, mixer.dt_limit)
    return Heads(
        mixer.headdim,
        mixer.d_state,
        mixer.ngroups,
        low,
        high,
        beside=mixer.d_mlp,
        normalise=norm is not None,
        gate_last=norm is not None and norm.norm_before_gate,
        eps=0.0 if norm is None else norm.eps,
        narrow=mixer.state_dtype is not None,
    )


def _linear(linear: PackedLinear) -> Matrix:
    return _matrix(linear.matrix, None if linear.leaves_bias_out or linear.bias is None else _own(linear.bias))


def _own(x: Tensor) -> Tensor:
    """A float32 copy that nobody else can move or change."""
    return x.detach().to(torch.float32, copy=True).contiguous()


def _matrix(m: PackedMatrix, bias: Tensor | None) -> Matrix:
    return Matrix(m.data, m.scales, bias, m.format, m.rows, m.columns)


def _norm(norm: nn.Module) -> Norm:
    return Norm(_own(cast(Tensor, norm.weight)), _own(norm.bias) if isinstance(norm, LayerNorm) else None)
