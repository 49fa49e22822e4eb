"""A Mamba-1 and a Mamba-2 of 130M parameters, random weights: reading a prompt, and writing one token after another.

Ours as loaded and packed to fewer bits, beside transformers and llama.cpp (16, 8 and 4 bits). b sequences, t tokens.
Mamba-2 writes beside Mamba-1: of one size, it reads nearly the same weights and a state that is eight times as large.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmarks import peers
from benchmarks.cases import OURS, Case, without_grad
from benchmarks.measure import Work

from stateline import LanguageModel, ModelConfig, prepare_for_decode
from stateline.interop import gguf

CONFIG = ModelConfig(d_model=768, n_layer=24, vocab_size=50280)
MAMBA2 = ModelConfig(768, 24, vocab_size=50288, ssm_cfg={"layer": "Mamba2"}, pad_vocab_size_multiple=16)
CONFIGS = {"Mamba1": CONFIG, "Mamba2": MAMBA2}
LENGTH = 2048
PACKED = ("bf16", "int8", "int4")


def model_130m() -> Iterator[Case]:
    """Every case."""
    yield Case("130M prefill", f"b1 t{LENGTH}", "", prefill, LENGTH)
    yield Case("130M decode", "b1", "", lambda with_peers: decode(1, with_peers), 1)
    yield Case("130M decode", "b8", "", lambda with_peers: decode(8, with_peers), 8)
    yield Case("130M Mamba-2 decode", "b1", "", lambda with_peers: decode2(1, with_peers), 1)
    yield Case("130M Mamba-2 decode", "b8", "", lambda with_peers: decode2(8, with_peers), 8)


@functools.cache
def models(layer: str = "Mamba1") -> dict[str, LanguageModel]:
    """Ours by name: packed, then as they come."""
    torch.manual_seed(0)
    plain = LanguageModel(CONFIGS[layer]).eval()
    made = {f"{OURS}, {weights} packed": prepare_for_decode(plain, weights) for weights in PACKED}
    return made | {f"{OURS}, float32": plain}


def prefill(with_peers: bool) -> dict[str, Work]:
    """Reading LENGTH tokens at once."""
    ids = torch.randint(CONFIG.vocab_size, (1, LENGTH))

    def ours(model: LanguageModel) -> Work:
        return without_grad(lambda: model.extend(ids, None, last_only=True))

    work = {name: ours(model) for name, model in models().items()}
    if with_peers and (peer := transformers_model()) is not None:
        work["transformers, float32"] = without_grad(lambda: peer(ids, use_cache=True, logits_to_keep=1))
    for name, llama in llamas().items() if with_peers else ():

        def read(llama: Any = llama) -> None:
            llama.reset()
            llama.eval(ids[0].tolist())

        work[name] = read
    return work


def decode(b: int, with_peers: bool) -> dict[str, Work]:
    """One token for each of b sequences."""
    token = torch.full((b,), 5)
    work = {name: step_of(model, b) for name, model in models().items()}
    if b > 1 or not with_peers:
        return work
    if (peer := transformers_model()) is not None:
        with torch.no_grad():
            cache = peer(torch.full((1, 16), 5), use_cache=True).cache_params
        work["transformers, float32"] = without_grad(lambda: peer(token[:, None], cache_params=cache, use_cache=True))
    work |= {name: write(llama) for name, llama in llamas().items()}
    return work


def decode2(b: int, with_peers: bool) -> dict[str, Work]:
    """One token for each of b sequences of Mamba-2, and of Mamba-1 in the same formats."""
    work = {name: step_of(model, b) for name, model in models("Mamba2").items()}
    work |= {f"{name}, Mamba-1": step_of(model, b) for name, model in models().items()}
    if b == 1 and with_peers:
        work |= {name: write(llama) for name, llama in llamas("Mamba2").items()}
    return work


def step_of(model: LanguageModel, b: int) -> Work:
    """One token for each of b sequences of a model."""
    token = torch.full((b,), 5)
    with torch.inference_mode():
        state = model.init_state(b)

    def step() -> object:
        with torch.inference_mode():
            return model.step_(token, state)

    return step


def write(llama: Any) -> Callable[[], None]:
    """One token of llama.cpp's; its positions must not run out."""

    def step() -> None:
        if llama.n_tokens + 2 > llama.n_ctx():
            llama.reset()
        llama.eval([5])

    return step


@functools.cache
def transformers_model() -> Any:
    """transformers' Mamba of the same shape, or None where it is not installed."""
    return peers.language_model(CONFIG.d_model, CONFIG.n_layer, CONFIG.vocab_size)


@functools.cache
def llamas(layer: str = "Mamba1") -> dict[str, Any]:
    """llama.cpp on files of each format; none where llama-cpp-python and gguf are not installed."""
    if not (find_spec("llama_cpp") and find_spec("gguf")):
        return {}
    import llama_cpp

    folder = Path(tempfile.mkdtemp(prefix="stateline-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    threads = torch.get_num_threads()
    made = {}
    for kind in ("F16", "Q8_0", "Q4_0"):
        path = folder / f"{kind}.gguf"
        gguf.save(models(layer)[f"{OURS}, float32"], path, kind, tokenizer="none")
        made[f"llama.cpp, {kind}"] = llama_cpp.Llama(
            str(path), n_ctx=2 * LENGTH, n_batch=512, verbose=False, n_threads=threads, n_threads_batch=threads
        )
    return made
