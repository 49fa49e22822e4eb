"""LanguageModel: a backbone and a head over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stateline import checks
from stateline.models.backbone import Backbone, ModelConfig, ModelState, check_ids
from stateline.models.loss import mean_cross_entropy, piece_of
from stateline.nn.attention import Attention, check_cache_dtype
from stateline.nn.mamba2 import Mamba2, check_state_dtype
from stateline.nn.mixer import Lengths, padding

INTEGERS = (torch.int32, torch.int64)
Commit = int | Tensor | Callable[[Tensor], int | Tensor]


class TokenStep(Protocol):
    """A `step_` in one piece: ids (b), state -> logits (b, v)."""

    def __call__(self, ids: Tensor, state: ModelState) -> Tensor:
        """Logits (b, v), writing into `state`."""
        ...

    def renew(self) -> TokenStep | None:
        """What serves after the model's tensors were moved."""
        ...


class LanguageModel(nn.Module):
    """Token ids (b, t) -> logits (b, t, v), v = config.vocab_size, continued from a state by any number of tokens.

    Names of parameters are mamba_ssm's. `metadata`: a dict that travels with checkpoints (tokenizer, training, card).
    `max_tokens`: how many tokens of a sequence states have room for where attention keeps them all (None: what
    `attn_cfg` says); set it at will. Other models need no such bound. `cache_dtype`: what attention keeps in them;
    `state_dtype`: what layers of Mamba-2 do.

    >>> model = LanguageModel(ModelConfig(d_model=16, n_layer=2, vocab_size=256))
    >>> ids = torch.randint(256, (1, 8))
    >>> first, state = model.extend(ids[:, :5], model.init_state(1))
    >>> rest, state = model.extend(ids[:, 5:], state)
    >>> torch.allclose(torch.cat([first, rest], 1), model(ids), atol=1e-5)
    True
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise checks.fail(
                "LanguageModel", f"config is a {type(config).__name__}, expected a ModelConfig.", error=TypeError
            )
        self.config = config
        self.metadata: dict[str, Any] = {}
        self.max_tokens: int | None = None
        #: Does all of `step_` at once, where an engine put it (`generation.prepare_for_decode`).
        self.token_step: TokenStep | None = None
        self.backbone = Backbone(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.embedding_rows, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """What states made from now on keep keys and values of attention in: a 16-bit dtype, or None for float32."""
        return next((layer.cache_dtype for layer in self._attention()), None)

    @cache_dtype.setter
    def cache_dtype(self, dtype: torch.dtype | str | None) -> None:
        """Choose it for all of the model's attention; ValueError where there is none, or for another dtype."""
        chosen = check_cache_dtype("LanguageModel", dtype)
        layers = self._attention()
        if chosen is not None and not layers:
            raise checks.fail("LanguageModel", f"cache_dtype is {chosen}, and the model has no attention to use it.")
        for layer in layers:
            layer.cache_dtype = chosen

    @property
    def state_dtype(self) -> torch.dtype | None:
        """What states made from now on keep the recurrence of Mamba-2 in: torch.bfloat16, or None for float32."""
        return next((layer.state_dtype for layer in self._mamba2()), None)

    @state_dtype.setter
    def state_dtype(self, dtype: torch.dtype | str | None) -> None:
        """Choose it for all Mamba2 layers; ValueError where there is none, for another dtype, or in a packed model."""
        chosen, layers = check_state_dtype("LanguageModel", dtype), self._mamba2()
        if chosen is not None and not layers:
            raise checks.fail("LanguageModel", f"state_dtype is {chosen}, and the model has no Mamba2 to use it.")
        if chosen != self.state_dtype and not isinstance(self.backbone.embedding, nn.Embedding):
            remedy = "Set it on the model that prepare_for_decode is given."
            raise checks.fail("LanguageModel", "state_dtype is set on a model that is packed for decoding.", remedy)
        for layer in layers:
            layer.state_dtype = chosen

    def _mamba2(self) -> list[Mamba2]:
        return [module for module in self.modules() if isinstance(module, Mamba2)]

    def _attention(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def tie_weights(self) -> None:
        """Make the output matrix the embedding again, where the configuration says so (after weights were replaced)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        """A packed model is moved, and never cast: its matrices cannot be, and its vectors belong to them."""
        packed = not isinstance(self.backbone.embedding, nn.Embedding)
        super()._apply(_only_moved(fn) if packed else fn, recurse)
        if self.token_step is not None:
            self.token_step = self.token_step.renew()
        return self

    def num_parameters(self) -> int:
        """How many numbers the model has learnt; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def init_state(
        self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None
    ) -> ModelState:
        """The state of `batch` sequences before their first token. `max_tokens` bounds attention; None: the model's."""
        bound = self.max_tokens if max_tokens is None else max_tokens
        return self.backbone.init_state(batch, max_tokens=bound, device=device)

    def forward(self, input_ids: Tensor, *, lengths: Lengths | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) for input_ids (b, t).

        Args:
            lengths: (b) valid tokens a row; what follows is skipped, whatever it holds.
            cu_seqlens: (n_seq + 1) bounds of sequences packed along time in a batch of 1.

        Raises:
            ValueError, TypeError: ids outside the vocabulary (on the CPU), wrong shapes or dtypes.
        """
        return self._logits(self.backbone(input_ids, lengths=lengths, cu_seqlens=cu_seqlens))

    def extend(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """`forward` from a state, which is never changed; None starts afresh.

        last_only: logits (b, v), or (n_seq, v) packed, of each sequence's last valid token; 0 where there is none.
        Returns logits and the new state.
        """
        x, state = self.backbone.extend(input_ids, state, lengths=lengths, cu_seqlens=cu_seqlens)
        if last_only:
            x = _last(x, lengths, cu_seqlens)
        return self._logits(x), state

    def check_room(self, state: ModelState, tokens: int = 1) -> None:
        """Raise ValueError if some sequence cannot become so many tokens longer, because attention keeps them all."""
        self.backbone.check_room(state, tokens)

    @torch.no_grad()
    def step_(self, input_ids: Tensor, state: ModelState) -> Tensor:
        """One token each: input_ids (b) -> logits (b, v), writing into `state`. No gradient: for engines."""
        if self.token_step is not None and not torch.compiler.is_compiling():  # a graph takes the layers one by one
            return self.token_step(input_ids, state)
        return self._logits(self.backbone.step_(input_ids, state))

    @torch.no_grad()
    def step_many(self, input_ids: Tensor, state: ModelState, commit: Commit) -> Tensor:
        """Logits (b, k, v) of k tokens each, input_ids (b, k), after which `state` has advanced in place by fewer.

        Args:
            commit: how many of the k tokens the state takes in: 0 to k, for all rows or (b) one number a row; or a
                function of the logits that says so, to keep of a guess what the model agrees with.

        For forced tokens, speculation and looking ahead: the logits are those of `extend` with the k tokens, the state
        is, to the bit, that of `extend` with the tokens committed (`lengths` where rows differ). Unless all k are, the
        committed ones are read a second time, for a state of constant size keeps no trace of the tokens between.
        No gradient. Raises ValueError or TypeError for counts outside 0 to k; then the state is unchanged.
        """
        if state is None:
            raise checks.fail("step_many", "state is None, expected one to advance.", "Make it with init_state.")
        logits, after = self.extend(input_ids, state)
        b, k = input_ids.shape
        counts = _counts(commit(logits) if callable(commit) else commit, b, k)
        longest = max(counts, default=0)
        if longest == 0:
            return logits
        if min(counts) < k:
            lengths = None if min(counts) == longest else torch.tensor(counts, device=input_ids.device)
            _, after = self.extend(input_ids[:, :longest], state, lengths=lengths, last_only=True)
        for old, new in zip(pytree.tree_leaves(state), pytree.tree_leaves(after), strict=True):
            old.copy_(new)
        return logits

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
        ignore_index: int = -100,
        chunk: int | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the targets in nats a token, a scalar; 0 where no target counts.

        Args:
            input_ids: (b, t).   targets: (b, t) what each position should predict (shift them yourself).
            lengths, cu_seqlens: as in `forward`; targets at padding do not count.
            ignore_index: targets equal to it do not count.
            chunk: logits are held for at most this many tokens at once; None: for as many, a power of two and at least
                256, as make 64 million of them, 256 million on a GPU. The gradients of a chunk are formed with its
                loss, so no logits are kept for the backward pass, and the head runs once. (Compiled, or where hooks
                look at the head's gradients, the backward pass computes each chunk again.)

        Softmax runs in float32 (float64 in a float64 model). First derivatives only.
        """
        if chunk is not None:
            checks.number("loss", "chunk", chunk, low=1, integer=True)
        targets = self._targets(input_ids, targets, lengths, ignore_index)
        chunk = chunk or piece_of(self.config.embedding_rows, targets.device.type)
        x = self.backbone(input_ids, lengths=lengths, cu_seqlens=cu_seqlens).flatten(0, 1)
        return mean_cross_entropy(self.lm_head, x, targets, self.config.vocab_size, ignore_index, chunk)

    def _targets(self, input_ids: Tensor, targets: Tensor, lengths: Lengths | None, ignore_index: int) -> Tensor:
        """Checked, flat (b·t) int64 targets with `ignore_index` at padding."""
        sizes = checks.Sizes("loss")
        sizes.match("input_ids", input_ids, "b t")
        sizes.match("targets", targets, "b t")
        checks.dtype("loss", "targets", targets, INTEGERS, "Targets are token ids.")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=targets.device)
            sizes.match("lengths", lengths, "b")
            targets = targets.masked_fill(padding(targets, lengths), ignore_index)
        if checks.can_read(targets):
            check_ids("targets", targets[targets != ignore_index], self.config.vocab_size)
        return targets.flatten().long()

    def _logits(self, x: Tensor) -> Tensor:
        """(…, d_model) -> (…, v); rows that only pad the matrix are left out."""
        return self.lm_head(x)[..., : self.config.vocab_size]


def _counts(commit: int | Tensor, b: int, k: int) -> list[int]:
    """One number from 0 to k for each of b rows. Raises ValueError or TypeError for others."""
    if isinstance(commit, Tensor):
        checks.dtype("step_many", "commit", commit, INTEGERS, "It counts tokens.")
        if commit.shape not in ((), (b,)):
            raise checks.fail("step_many", f"commit has shape {tuple(commit.shape)}, expected (b,) with b = {b}.")
        counts = commit.expand(b).tolist()
    else:
        counts = [commit] * b
    for count in counts:
        checks.number("step_many", "commit", count, low=0, high=k, integer=True)
    return counts


def _only_moved(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def moved(x: Tensor) -> Tensor:
        y = fn(x)
        return y if y.dtype == x.dtype else x.to(y.device)

    return moved


def _last(x: Tensor, lengths: Lengths | None, cu_seqlens: Tensor | None) -> Tensor:
    """x (b, t, d) -> (n_seq, d): each sequence's last valid vector, 0 for an empty one."""
    if cu_seqlens is not None:
        ends, starts = cu_seqlens[1:].to(x.device, torch.int64), cu_seqlens[:-1].to(x.device, torch.int64)
        x, empty = x[0], ends == starts
    else:
        b, t = x.shape[:2]
        if lengths is None:
            return x[:, -1] if t else x.new_zeros(b, x.shape[2])
        lengths = torch.as_tensor(lengths, device=x.device).long()
        ends = torch.arange(b, device=x.device) * t + lengths
        x, empty = x.flatten(0, 1), lengths == 0
    if x.shape[0] == 0:
        return x.new_zeros(ends.shape[0], x.shape[1])
    return x[(ends - 1).clamp(min=0)].masked_fill(empty[:, None], 0)
