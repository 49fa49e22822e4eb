"""Scoring a text in bits per byte, as a compressor would."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from stateline import state as states
from stateline.models import LanguageModel
from stateline.training.data import ByteText

#: Bytes scored at once: long enough for full speed, short enough that logits take 4 MB.
CHUNK = 4096


def bits_per_byte(
    model: LanguageModel,
    text: ByteText | bytes | str,
    *,
    chunk: int = CHUNK,
    autocast: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean −log2 p(byte | all bytes before it) over the text, its first byte left out (nothing comes before it).

    The text is one document: the state starts empty and is carried from its first byte to its last, so that the figure
    does not depend on `chunk`, and compares with a compressor's. Constant memory. `autocast` is the dtype of matrix
    products.
    Returns None if `stop()` turned true on the way.
    """
    text = text if isinstance(text, ByteText) else ByteText.of(text)
    if len(text) < 2:
        raise ValueError(f"bits_per_byte: the text has {len(text)} byte(s), expected at least 2.")
    device = next(model.parameters()).device
    mixed = torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None)
    training = model.training
    model.eval()
    nats = 0.0
    try:
        with torch.no_grad(), mixed:
            state = model.init_state(1, device=device)
            for start in range(0, len(text) - 1, chunk):
                if stop():
                    return None
                piece = torch.from_numpy(text.read(start, min(start + chunk + 1, len(text))).astype("int64")).to(device)
                logits, state = model.extend(piece[None, :-1], state)
                state = states.detach(state)
                loss = torch.nn.functional.cross_entropy(logits[0].float(), piece[1:], reduction="sum")
                nats += float(loss)
    finally:
        model.train(training)
    return nats / (len(text) - 1) / math.log(2)
