"""Directories that vLLM and SGLang serve: Hugging Face's format, narrowed to what both of them read.

Read in vLLM 0.33.0 (`model_executor/models/mamba.py`, `mamba2.py`, `layers/mamba/`) and SGLang 0.5.23
(`srt/models/mamba.py`, `falcon_mamba.py`, `mamba2.py`, `srt/configs/`):

- names, shapes and sizes come from config.json: `intermediate_size` is read by all, `rms_norm` by SGLang's Mamba-2;
- SGLang's Mamba-2 never ties its head to the embedding, and a matrix that is not in the file stays unset there;
- both clamp step sizes to (0, ∞) whatever `time_step_limit` says;
- their convolutions have 2 to 4 taps, their scans of Mamba-1 at most 256 states.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stateline import checks
from stateline.generation.tokenizer import BYTES, byte_characters, read_tokenizer
from stateline.interop import huggingface
from stateline.models import LanguageModel
from stateline.models.checkpoint import HEAD
from stateline.ops.ssd import check_limit

OP = "save"
NONE = "none"
TAPS, MOST_STATES = (2, 4), 256
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
#: Files beside a tokenizer that belong to it.
BESIDE = ("special_tokens_map.json", "generation_config.json", "chat_template.jinja")
Files = dict[str, Callable[[Path], Any]]
REMEDY = 'Give tokenizer=DIR, where tokenizer.json lies, or tokenizer="none" to pass ids.'


def save(
    model: LanguageModel,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Write a model for `vllm serve DIR` and SGLang's `--model-path DIR`; `stateline.load` reads it too.

    Args:
        dtype: of the stored matrices; None stores them as they are.
        tokenizer: a directory with tokenizer.json, or "none" to write none. None: the bytes themselves for a vocabulary
            of 256; refused for any other.

    Raises ValueError, before any file is touched, for what the servers would leave out or cannot run.
    """
    unsaid = [] if _is_mamba3(model) else huggingface.problems(model)  # of Mamba-3 those are another library's
    if problems := _problems(model) + unsaid:
        remedy = 'Use format="stateline".' if unsaid or _is_mamba3(model) else 'Use format="huggingface".'
        raise checks.fail(OP, f"vLLM and SGLang cannot run this model: {'; '.join(problems)}.", remedy)
    _refuse_stale_tokenizer(tokenizer, Path(directory))
    values, tensors = huggingface.contents(model, dtype)
    values.pop("time_step_limit", None)  # none, which strict JSON has no word for
    if values["model_type"] == "mamba2":
        values |= {"rms_norm": True, "tie_word_embeddings": False}
        tensors.setdefault(HEAD, tensors[huggingface.THEIRS].clone())
    files, ends = _tokenizer_files(tokenizer, model.config.vocab_size)
    values |= {key: id for key, id in ends.items() if values[key] is None}
    huggingface.write(values, tensors, Path(directory), files)


def _is_mamba3(model: LanguageModel) -> bool:
    return model.config.ssm_cfg.get("layer") == "Mamba3"


def _problems(model: LanguageModel) -> list[str]:
    """What both servers would compute otherwise than we do, or not at all."""
    mixer: Any = model.config.make_mixer(device="meta")
    problems = []
    if _is_mamba3(model):
        problems.append("the mixer is Mamba3 (neither has it)")
    low, high = check_limit(OP, getattr(mixer, "dt_limit", None))
    if low > 0 or high < math.inf:
        problems.append(f"dt_limit is {mixer.dt_limit} (step sizes are not limited there)")
    if not TAPS[0] <= getattr(mixer, "d_conv", TAPS[0]) <= TAPS[1]:
        problems.append(f"d_conv is {mixer.d_conv} ({TAPS[0]} to {TAPS[1]} there)")
    if model.config.ssm_cfg.get("layer", "Mamba1") == "Mamba1" and mixer.d_state > MOST_STATES:
        problems.append(f"d_state is {mixer.d_state} (at most {MOST_STATES} there)")
    return problems


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def _tokenizer_files(tokenizer: str | Path | None, vocab_size: int) -> tuple[Files, dict[str, int | None]]:
    """(name -> what writes it, for the files of a tokenizer; the ids that begin and end its texts)."""
    if tokenizer is not None and str(tokenizer) == NONE:
        return {}, {}
    source = None if tokenizer is None else Path(tokenizer).expanduser()
    if source is None or (vocab_size == BYTES and not (source / TOKENIZER).is_file()):
        if vocab_size != BYTES:
            raise checks.fail(OP, f"the model has {vocab_size} ids and no tokenizer was given.", REMEDY)
        return {TOKENIZER: _json(bytes_tokenizer()), TOKENIZER_CONFIG: _json(_described({}))}, {}
    path = source / TOKENIZER
    if not path.is_file():
        raise checks.fail(OP, f"{path} does not exist.", REMEDY)
    known = read_tokenizer(path)
    if known.vocab_size > vocab_size:
        problem = f"{path} has {known.vocab_size} ids, the model {vocab_size}."
        raise checks.fail(OP, problem, "They do not belong together.")
    files: Files = {name: _copy(source / name) for name in (TOKENIZER, *BESIDE) if (source / name).is_file()}
    beside = source / TOKENIZER_CONFIG
    described = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    files |= {TOKENIZER_CONFIG: _json(_described(described))}
    return files, {"bos_token_id": known.start, "eos_token_id": known.end}


def _refuse_stale_tokenizer(tokenizer: str | Path | None, directory: Path) -> None:
    """Raise if ids alone are asked for where a server would find a tokenizer of something written earlier."""
    left = [name for name in (TOKENIZER, TOKENIZER_CONFIG) if (directory / name).is_file()]
    if str(tokenizer) == NONE and left:
        problem = f'tokenizer is "none" and {directory} holds {left[0]}, which a server would take.'
        raise checks.fail(OP, problem, "Remove it first.")


def bytes_tokenizer() -> dict[str, Any]:
    """A tokenizer.json whose ids are the bytes of a text in UTF-8."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(byte_characters())}, "merges": []},
    }  # fmt: skip


def _described(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json by which tokenizer.json is read as it is, not as some model's own class would."""
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | values


def _json(values: dict[str, Any]) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path) -> Callable[[Path], Any]:
    return lambda path: shutil.copyfile(source, path)
