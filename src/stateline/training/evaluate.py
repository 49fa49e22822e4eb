"""Scoring a text in bits per byte, as a compressor would."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stateline import state as states
from stateline.checks import fail
from stateline.models import LanguageModel
from stateline.training.text import IGNORED, Layout, Piece, TokenText

if TYPE_CHECKING:
    from stateline.generation import Tokenizer

#: Tokens scored at once: long enough for full speed, short enough that logits of bytes take 4 MB.
CHUNK = 4096


def bits_per_byte(
    model: LanguageModel,
    text: TokenText | bytes | str,
    *,
    tokenizer: Tokenizer | None = None,
    chunk: int = CHUNK,
    apart: bool = False,
    autocast: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """−log2 p(text) over its bytes, whatever the tokens: comparable between vocabularies, and with compressors.

    The text is one document: the state starts empty and is carried from its first token to its last, so that the
    figure does not depend on `chunk`. Its first token, before which nothing comes, is left out, with its bytes.
    Constant memory.

    tokenizer: of a text in str or bytes, for a model of other ids than bytes; its start id, if any, comes before the
    text.   apart: the documents of a TokenText know nothing of each other.   autocast: dtype of matrix products.

    Returns None if `stop()` turned true on the way. Raises ValueError for a text too short to score.
    """
    text = text if isinstance(text, TokenText) else _tokens(model, text, tokenizer)
    if len(text) < 2:
        unit = "byte" if text.layout.widths is None else "token"
        raise ValueError(f"bits_per_byte: the text has {len(text)} {unit}(s), expected at least 2.")
    device = next(model.parameters()).device
    mixed = torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None)
    training = model.training
    model.eval()
    nats, count = 0.0, 0
    try:
        with torch.no_grad(), mixed:
            state: Any = model.init_state(1, device=device)
            for piece in text.pieces(chunk, apart=apart):
                if stop():
                    return None
                logits, state = _extend(model, piece, state, device)
                wanted = piece.targets.to(device)
                loss = torch.nn.functional.cross_entropy(
                    logits[0].float(), wanted, ignore_index=IGNORED, reduction="sum"
                )
                nats += float(loss)
                count += text.count(piece.targets)
    finally:
        model.train(training)
    if not count:
        raise ValueError("bits_per_byte: no token of the text that can be predicted stands for a byte.")
    return nats / count / math.log(2)


def _extend(model: LanguageModel, piece: Piece, state: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Logits (1, t, v) of a piece, each document that begins in it from an empty state, and the state of the last."""
    inputs = piece.inputs[None].to(device)
    if not piece.cuts:
        logits, state = model.extend(inputs, state)
        return logits, states.detach(state)
    fresh = model.init_state(len(piece.cuts), device=device)
    if piece.cuts[0]:  # the piece begins inside a document
        fresh = states.stack([state, fresh])
    bounds = torch.tensor([*sorted({0, *piece.cuts}), inputs.shape[1]], dtype=torch.int32, device=device)
    logits, after = model.extend(inputs, fresh, cu_seqlens=bounds)
    return logits, states.detach(states.index(after, len(bounds) - 2))


def _tokens(model: LanguageModel, text: bytes | str, tokenizer: Tokenizer | None) -> TokenText:
    if tokenizer is None:
        if model.config.vocab_size != 256:
            problem = f"the model has {model.config.vocab_size} ids, and no tokenizer was given for the text."
            raise fail("bits_per_byte", problem, "Pass tokenizer=load_tokenizer(directory, vocab_size).")
        return TokenText.of(text)
    start = [] if tokenizer.vocab_size == 256 or tokenizer.start is None else [tokenizer.start]
    ids = np.array([*start, *tokenizer.encode(text)], dtype=np.int64)
    widths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], dtype=np.int64)
    return TokenText([ids], layout=Layout(widths))
