"""Backbone: embedding, a stack of blocks, a final norm; its configuration and its state."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stateline import checks
from stateline.nn import (
    S4,
    S4D,
    S5,
    Attention,
    Block,
    GatedMLP,
    GatedSSM,
    LayerNorm,
    Mamba,
    Mamba2,
    Mamba3,
    Mixer,
    RMSNorm,
)
from stateline.nn.mixer import Lengths, padding, zero_padding
from stateline.nn.precision import keep_wide

#: Mixers by the name `ssm_cfg["layer"]` gives them; its other keys go to the constructor. Add your own under any name.
MIXERS: dict[str, type[Mixer]] = {
    "Mamba1": Mamba,
    "Mamba2": Mamba2,
    "Mamba3": Mamba3,
    "GatedSSM": GatedSSM,
    "S4": S4,
    "S4D": S4D,
    "S5": S5,
}
_INT32, _INT64 = torch.int32, torch.int64


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a model; names and defaults follow mamba_ssm where it has them.

    Args:
        d_model: width of the residual stream.   n_layer: blocks.   vocab_size: token ids are below it.
        d_intermediate: hidden width of a gated MLP in every block, 0 for none.
        ssm_cfg: {"layer": "Mamba1"}, or another name of MIXERS, and its arguments, e.g. {"d_state": 32}.
        attn_layer_idx: numbers of the blocks, from 0, whose mixer is `nn.Attention` instead.
        attn_cfg: arguments of that, e.g. {"num_heads": 8, "rotary_emb_dim": 32, "window": 1024}.
        rms_norm: RMSNorm, else LayerNorm.   norm_eps: of every norm.
        residual_in_fp32: keep the residual stream in float32 under 16-bit weights.
        pad_vocab_size_multiple: embedding rows are rounded up to it; logits are not.
        tie_embeddings: the output matrix is the embedding.

    >>> ModelConfig(d_model=64, n_layer=2, vocab_size=50277).embedding_rows
    50280
    """

    d_model: int = 768
    n_layer: int = 24
    vocab_size: int = 50277
    d_intermediate: int = 0
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            checks.number("ModelConfig", name, getattr(self, name), low=1, integer=True)
        checks.number("ModelConfig", "d_intermediate", self.d_intermediate, low=0, integer=True)
        checks.number("ModelConfig", "norm_eps", self.norm_eps, low=0, open_low=True)
        for name in ("rms_norm", "residual_in_fp32", "tie_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise checks.fail("ModelConfig", f"{name} is {value!r}, expected True or False.", error=TypeError)
        for name in ("ssm_cfg", "attn_cfg"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise checks.fail("ModelConfig", f"{name} is {value!r}, expected a dict.", error=TypeError)
            # ours: the caller's dict may change
            object.__setattr__(self, name, {key: _as_json(v) for key, v in value.items()})
        self._check_attention()
        for layer in {None, *self.attn_layer_idx[:1]}:
            self.make_mixer(layer, device="meta")  # the mixer checks its own arguments

    def _check_attention(self) -> None:
        given = self.attn_layer_idx
        if not isinstance(given, list | tuple):
            raise checks.fail("ModelConfig", f"attn_layer_idx is {given!r}, expected a list.", error=TypeError)
        for layer in given:
            checks.number("ModelConfig", "attn_layer_idx", layer, low=0, high=self.n_layer - 1, integer=True)
        object.__setattr__(self, "attn_layer_idx", sorted(set(given)))
        if self.attn_cfg and not given:
            raise checks.fail("ModelConfig", "attn_cfg is set, and attn_layer_idx names no block.", "Name some.")
        if given and "num_heads" not in self.attn_cfg:
            raise checks.fail("ModelConfig", "attn_layer_idx names blocks, and attn_cfg has no num_heads.", "Set it.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration with these fields; unknown ones are refused."""
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise checks.fail("ModelConfig", f"unknown keys {', '.join(unknown)}; known are {', '.join(names)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; those about attention only where there is some, as releases before it wrote."""
        values = checks.plain(dataclasses.asdict(self))
        return values if self.attn_layer_idx else {k: v for k, v in values.items() if not k.startswith("attn_")}

    @property
    def embedding_rows(self) -> int:
        """vocab_size rounded up to pad_vocab_size_multiple."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def make_mixer(
        self, layer: int | None = None, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mixer:
        """The mixer of block number `layer`; None: of those that `ssm_cfg` describes."""
        if layer in self.attn_layer_idx:
            return self._make("attn_cfg", "Attention", Attention, self.attn_cfg, device, dtype)
        options = dict(self.ssm_cfg)
        name = options.pop("layer", "Mamba1")
        checks.choice("ModelConfig", 'ssm_cfg["layer"]', name, tuple(MIXERS))
        return self._make("ssm_cfg", name, MIXERS[name], options, device, dtype)

    def _make(
        self, source: str, name: str, kind: Callable[..., Mixer], options: dict[str, Any], device: Any, dtype: Any
    ) -> Mixer:
        known = [p for p in inspect.signature(kind).parameters if p not in ("d_model", "device", "dtype")]
        unknown = sorted(set(options) - set(known))
        if unknown:
            problem = f"{source} has unknown keys {', '.join(unknown)}; {name} knows {', '.join(known)}."
            raise checks.fail("ModelConfig", problem)
        return kind(self.d_model, **options, device=device, dtype=dtype)


def _as_json(value: Any) -> Any:
    """A mixer's argument as a checkpoint keeps it: pairs as lists, an infinite bound as None, a dtype by its name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if not isinstance(value, list | tuple):
        return value
    return [None if isinstance(v, float) and math.isinf(v) else v for v in value]


@dataclass
class ModelState:
    """What sequences carry through a whole model. layers: one state a block, in order, each with a row a sequence."""

    layers: list[Any]


torch.export.register_dataclass(ModelState, serialized_type_name="stateline.models.ModelState")


class Backbone(nn.Module):
    """Token ids (b, t) -> normalised hidden vectors (b, t, d_model): everything of a model but its head.

    checkpoint_activations: keep only what goes into each block, and compute the block again in the backward pass: the
        same numbers from less memory and more time. An attribute, set at will; no part of the configuration.
    token_gate: a number for each token id, a buffer of (embedding rows), all 1 at first, where mixers take a gate that
        is given to them (GatedSSM with gate="given"); None elsewhere. It is saved with the weights.
    dropout: share of the numbers that the embedding and each block write into the residual stream which are set to 0 in
        training mode, the others growing to make up for it. An attribute too.
    """

    full_precision = ("token_gate",)
    token_gate: Tensor | None

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.dropout = 0.0
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_class = RMSNorm if config.rms_norm else LayerNorm

        def norm() -> RMSNorm | LayerNorm:
            return norm_class(config.d_model, config.norm_eps, **made)

        def block(i: int) -> Block:
            mixer, first = config.make_mixer(i, **made), norm()
            if not config.d_intermediate:
                return Block(mixer, first, residual_in_fp32=config.residual_in_fp32)
            mlp = GatedMLP(config.d_model, config.d_intermediate, **made)
            return Block(mixer, first, mlp=mlp, norm2=norm(), residual_in_fp32=config.residual_in_fp32)

        self.embedding = nn.Embedding(config.embedding_rows, config.d_model, **made)
        self.layers = nn.ModuleList(block(i) for i in range(config.n_layer))
        #: Blocks whose state can be full; asking all of them would cost a good part of a small model's token.
        self._bounded = [i for i in range(config.n_layer) if _can_be_full(self._blocks()[i].mixer)]
        self.norm_f = norm()
        gated = any(block.mixer.takes_gate for block in self._blocks())
        ones = torch.ones(config.embedding_rows, dtype=torch.float32, device=device) if gated else None
        self.register_buffer("token_gate", ones)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """mamba_ssm's initial values: what writes into the residual stream shrinks with depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, module in self.layers.named_modules():
            last = name.rpartition(".")[2]
            if last in ("in_proj", "out_proj") and getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if last in ("out_proj", "fc2"):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                module.weight /= math.sqrt(self.config.n_layer)

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> ModelState:
        """The state of `batch` sequences before their first token; `max_tokens` bounds layers whose state grows."""
        return ModelState([block.init_state(batch, max_tokens=max_tokens, device=device) for block in self._blocks()])

    def forward(self, input_ids: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """input_ids (b, t) -> (b, t, d_model), 0 at padding. `lengths`, `cu_seqlens`: as for `Mixer.extend`."""
        x, lengths = self._embed(input_ids, lengths)
        residual, gate = None, self._gate(input_ids, lengths)
        for block in self._blocks():
            more = gate if block.mixer.takes_gate else {}
            x, residual = self._run(block, x, residual, lengths=lengths, cu_seqlens=cu_seqlens, **more)
            x = self._thinned(x)
        return zero_padding(self.norm_f(x, residual)[0], lengths)

    def extend(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """`forward` from a state, which is never changed; None starts afresh: (hidden vectors, state)."""
        before = self._layer_states(state)
        x, lengths = self._embed(input_ids, lengths)
        residual, gate = None, self._gate(input_ids, lengths)
        after = []
        for block, given in zip(self._blocks(), before, strict=True):
            more = gate if block.mixer.takes_gate else {}
            where: dict[str, Any] = {"lengths": lengths, "cu_seqlens": cu_seqlens, **more}
            x, residual, new = self._run(block.extend, x, residual, given, **where)
            x = self._thinned(x)
            after.append(new)
        return zero_padding(self.norm_f(x, residual)[0], lengths), ModelState(after)

    @torch.no_grad()
    def step_(self, input_ids: Tensor, state: ModelState) -> Tensor:
        """One token each: input_ids (b) -> (b, d_model), writing into `state`. No gradient."""
        x, _ = self._embed(input_ids, None, form="b")
        self.check_room(state)
        residual, gate = None, self._gate(input_ids, None)
        for block, given in zip(self._blocks(), self._layer_states(state), strict=True):
            x, residual = block.step_(x, residual, given, **(gate if block.mixer.takes_gate else {}))
        return self.norm_f(x, residual)[0]

    def check_room(self, state: ModelState, tokens: int = 1) -> None:
        """Raise ValueError if some layer has no room for so many more tokens a sequence, while the state is whole."""
        for i in self._bounded:
            cast(Block, self.layers[i]).check_room(self._layer_states(state)[i], tokens)

    def _run(self, block: Callable[..., Any], *given: Any, **where: Any) -> Any:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False, **where)
        return block(*given, **where)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers))

    def _layer_states(self, state: ModelState | None) -> list[Any]:
        if state is None:
            return [None] * len(self.layers)
        if not isinstance(state, ModelState) or len(state.layers) != len(self.layers):
            got = f"{len(state.layers)} layers" if isinstance(state, ModelState) else f"a {type(state).__name__}"
            raise checks.fail(
                "state", f"is {got}, expected a ModelState of {len(self.layers)}.", "Make it with init_state."
            )
        return state.layers

    def _embed(self, ids: Tensor, lengths: Lengths | None, form: str = "b t") -> tuple[Tensor, Tensor | None]:
        sizes = checks.Sizes("input_ids")
        sizes.match("input_ids", ids, form)
        checks.dtype("input_ids", "input_ids", ids, (_INT32, _INT64), "Token ids are whole numbers.")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=ids.device)
            sizes.match("lengths", lengths, "b")
            ids = ids.masked_fill(padding(ids, lengths), 0)  # whatever stands there is not looked up
        check_ids("input_ids", ids, self.config.vocab_size)
        return self._thinned(self.embedding(ids)), lengths

    def _gate(self, ids: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
        """What blocks get whose mixer takes a gate."""
        if self.token_gate is None:
            return {}
        if lengths is not None:
            ids = ids.masked_fill(padding(ids, lengths), 0)
        return {"gate": self.token_gate[ids]}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Gates are never rounded below float32: 16 bits cannot tell 0.999 from 1."""
        gate = None if self.token_gate is None else keep_wide(fn)(self.token_gate)
        super()._apply(fn, recurse)
        self.token_gate = gate
        return self

    def _thinned(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


def _can_be_full(mixer: Mixer) -> bool:
    return type(mixer).check_room is not Mixer.check_room


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for ids outside 0 … vocab_size − 1; reads values, so CPU tensors outside tracing only."""
    if not checks.can_read(ids) or ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise checks.fail(
            name, f"token id {wrong} is outside the vocabulary, 0 to {vocab_size - 1}.", "Is it the right tokenizer?"
        )
