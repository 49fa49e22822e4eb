"""Vocabularies as llama.cpp keeps them: byte-level BPE, bytes alone, or none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateline.checks import fail
from stateline.generation.tokenizer import BYTES, JsonTokenizer, byte_characters, read_tokenizer

OP = "save"
NONE = "none"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
#: llama.cpp wants merges, and an array cannot be empty: no text has these characters once its bytes are spelt out.
NEVER = "␀ ␀"
#: llama.cpp's names of vocabularies that cut texts into words by GPT-2's pattern. GPT-NeoX's is "mpt" or "olmo".
AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2")
REMEDY = 'Give tokenizer="none" to write none and pass ids.'


@dataclass(frozen=True)
class Vocabulary:
    """pieces: each id as byte-level BPE spells it.   kinds: of each id.   merges: "left right", best first.

    begins: whether every text begins with `start`.
    """

    pieces: list[str]
    kinds: list[int]
    merges: list[str]
    start: int | None
    end: int | None
    begins: bool = False


def read(tokenizer: str | Path | None, vocab_size: int) -> Vocabulary | None:
    """The vocabulary in a directory, the bytes if there are 256 ids and no directory, or None for "none"."""
    if tokenizer is not None and str(tokenizer) == NONE:
        return None
    path = None if tokenizer is None else Path(tokenizer).expanduser() / "tokenizer.json"
    if path is None or (vocab_size == BYTES and not path.is_file()):
        if vocab_size != BYTES:
            problem = f"the model has {vocab_size} ids and no tokenizer was given."
            raise fail(OP, problem, f"Give tokenizer=DIR, where tokenizer.json lies. {REMEDY}")
        # llama.cpp takes some id for the end of a text if none is named: NUL is in no text.
        return Vocabulary(byte_characters(), [NORMAL] * BYTES, [NEVER], 0, 0)
    if not path.is_file():
        raise fail(OP, f"{path} does not exist.", REMEDY)
    known = read_tokenizer(path)
    if known.vocab_size > vocab_size:
        raise fail(OP, f"{path} has {known.vocab_size} ids, the model {vocab_size}.", "They do not belong together.")
    return _from_json(path, known)


def write(out: Any, vocabulary: Vocabulary | None, vocab_size: int) -> None:
    """Put a vocabulary into a gguf writer; ids that it lacks, up to `vocab_size`, are marked as unused."""
    if vocabulary is None:
        out.add_tokenizer_model("no_vocab")
        return
    missing = range(len(vocabulary.pieces), vocab_size)
    out.add_tokenizer_model("gpt2")  # which is what it calls byte-level BPE
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(vocabulary.pieces + [f"[PAD{i}]" for i in missing])
    out.add_token_types(vocabulary.kinds + [UNUSED] * len(missing))
    out.add_token_merges(vocabulary.merges or [NEVER])
    out.add_add_bos_token(vocabulary.begins)
    if vocabulary.start is not None:
        out.add_bos_token_id(vocabulary.start)
    if vocabulary.end is not None:
        out.add_eos_token_id(vocabulary.end)


def files(fields: dict[str, Any]) -> dict[str, Any]:
    """The vocabulary in a file's metadata as tokenizer.json and tokenizer_config.json; none for bytes alone or none.

    Raises ValueError for one that is no byte-level BPE cut as GPT-2's is.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    pieces: list[str] = fields.get("tokenizer.ggml.tokens") or []
    if kind in (None, "no_vocab") or pieces == byte_characters():
        return {}
    if kind != "gpt2" or pre not in AS_GPT2:
        raise ValueError(f"its vocabulary is {kind} cut as {pre}; read are byte-level BPE vocabularies cut as gpt-2.")
    kinds = fields["tokenizer.ggml.token_type"]
    used = [i for i in range(len(pieces)) if kinds[i] != UNUSED]
    merges = [merge for merge in fields["tokenizer.ggml.merges"] if merge != NEVER]
    added = [
        {"id": i, "content": pieces[i], "special": kinds[i] == CONTROL, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i in used
        if kinds[i] in (CONTROL, USER_DEFINED)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {pieces[i]: i for i in used}, "merges": merges}
    names = {"bos_token": "tokenizer.ggml.bos_token_id", "eos_token": "tokenizer.ggml.eos_token_id"}
    special = {name: pieces[fields[key]] for name, key in names.items() if key in fields}
    tokenizer = {"added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    if fields.get("tokenizer.ggml.add_bos_token"):
        tokenizer["post_processor"] = _beginning(special["bos_token"], fields[names["bos_token"]])
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": special}


def _beginning(piece: str, token: int) -> dict[str, Any]:
    """What puts a special id before every text, as tokenizer.json says it."""
    start, texts = {"SpecialToken": {"id": piece, "type_id": 0}}, [{"Sequence": {"id": i, "type_id": 0}} for i in "AB"]
    known = {piece: {"id": piece, "ids": [token], "tokens": [piece]}}
    single, pair = [start, texts[0]], [start, *texts]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def _from_json(path: Path, known: JsonTokenizer) -> Vocabulary:
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or not _cuts_as_gpt2(content.get("pre_tokenizer")):
        found = f"{model.get('type')} with pre-tokenizer {json.dumps(content.get('pre_tokenizer'))[:120]}"
        raise fail(OP, f"{path} is {found}; exported are byte-level BPE vocabularies cut as GPT-2's are.", REMEDY)
    pieces, kinds = [known.token(i) for i in range(known.vocab_size)], [NORMAL] * known.vocab_size
    for added in content.get("added_tokens") or ():
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(pieces, kinds, merges, known.start, known.end, begins=bool(known.prefix))


def _cuts_as_gpt2(pre: dict[str, Any] | None) -> bool:
    """Whether texts are cut into words by the pattern that llama.cpp calls "gpt-2", and by nothing else."""
    plain = pre is not None and pre.get("type") == "ByteLevel"
    return bool(plain and pre.get("use_regex", True) and not pre.get("add_prefix_space"))  # type: ignore[union-attr]  # JSON
