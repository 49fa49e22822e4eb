"""Between text and token ids: bytes themselves, or a `tokenizer.json` next to a checkpoint.

Every tokenizer here says which bytes an id stands for, so that text can be streamed token by token without guessing
where characters end (`text.Utf8Decoder` does the rest).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from stateline.checks import fail
from stateline.files import bundled

BYTES = 256


class Tokenizer(Protocol):
    """What generation needs to know about a vocabulary."""

    vocab_size: int
    #: An empty prompt starts from this id; it is not part of the text. None: empty prompts are refused.
    start: int | None
    #: The id that ends a text, if the vocabulary has one.
    end: int | None
    #: Ids that were put before every text in training.
    prefix: tuple[int, ...]
    #: Whether a text may be encoded in pieces: the ids of a concatenation are the concatenated ids.
    piecewise: bool

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, without special ones."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for; b"" for special ids."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255: every file is a text, nothing is unknown, nothing needs to be stored.

    An empty prompt starts from a newline, since a text begins where a line does. No id ends a text.

    >>> ByteTokenizer().encode("né")
    [110, 195, 169]
    >>> ByteTokenizer().decode([110, 195, 169])
    'né'
    """

    vocab_size = BYTES
    start: int | None = ord("\n")
    end: int | None = None
    prefix: tuple[int, ...] = ()
    piecewise = True

    def encode(self, text: str | bytes) -> list[int]:
        """The UTF-8 bytes of a text; lone surrogates, which have none, become "?"."""
        return list(text.encode("utf-8", "replace") if isinstance(text, str) else text)

    def token_bytes(self, token: int) -> bytes:
        """The byte itself."""
        return bytes((token,))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of several ids."""
        return bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of several ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class JsonTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library (byte-level BPE, or BPE with byte fall-back).

    An empty prompt starts from the beginning-of-text id, or the end-of-text id if there is none.
    """

    piecewise = False  # merges reach across any cut

    def __init__(self, path: str | Path, *, start: str | int | None = None, end: str | int | None = None) -> None:
        """`path`: the tokenizer.json; `start`, `end`: special tokens by content or id."""
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise fail("tokenizer", f"{path} needs the package tokenizers.", "pip install stateline[hf]") from error
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for anything wrong with the file
            raise fail("tokenizer", f"{path} cannot be read: {error}.") from error
        self._library.no_truncation()  # some files carry what suited one use: a text is never cut or filled up
        self._library.no_padding()
        self.vocab_size: int = self._library.get_vocab_size(with_added_tokens=True)
        self._special = dict(self._library.get_added_tokens_decoder())
        self._byte_level = self._reads_bytes(path)
        self.end = self._id(end)
        self.start = self._id(start) if start is not None else self.end
        # What the library itself puts before a text; an end-of-text id there would follow it.
        self.prefix = tuple(i for i in self._library.encode("").ids if i == self.start)

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, without special ones; bytes are read as UTF-8."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts at once, on all cores; a special token that a text spells out is ordinary text there."""
        self._library.encode_special_tokens = True
        try:
            encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)  # ids only
        finally:
            self._library.encode_special_tokens = False
        return [row.ids for row in encoded]

    def token(self, token: int) -> str:
        """How the vocabulary writes an id."""
        return str(self._library.id_to_token(token))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; b"" for special ids and for ids that the vocabulary leaves unused."""
        if token in self._special:
            added = self._special[token]
            return b"" if added.special else added.content.encode()
        piece = self._library.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF[c] for c in piece) if _BYTE_OF.keys() >= set(piece) else piece.encode()
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        return bytes((int(byte[1], 16),)) if byte else piece.replace("▁", " ").encode()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of several ids."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of several ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _reads_bytes(self, path: str | Path) -> bool:
        """True for byte-level BPE, False for byte fall-back; other kinds do not say which bytes an id stands for."""
        # From the file: what the library writes names every id that is free, billions where one is far off.
        decoder = json.dumps(json.loads(Path(path).read_text("utf-8")).get("decoder") or {})
        kinds = set(re.findall(r'"type": "(\w+)"', decoder))
        if "ByteLevel" in kinds:
            return True
        if "ByteFallback" in kinds:
            return False
        known = ", ".join(sorted(kinds)) or "no decoder"
        raise fail("tokenizer", f"{path} has {known}, expected a ByteLevel or ByteFallback decoder.")

    def _id(self, token: str | int | None) -> int | None:
        return self._library.token_to_id(token) if isinstance(token, str) else token


def load_tokenizer(directory: str | Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model with `vocab_size` ids whose files lie in `directory`, or of one that ships, by name.

    A tokenizer.json there is used, its special ids named by tokenizer_config.json or config.json; without one, 256 ids
    are bytes. Raises ValueError if there is neither, or if the file knows more ids than the model.
    """
    path = None if directory is None else (bundled(directory) or Path(directory)) / "tokenizer.json"
    if vocab_size == BYTES and (path is None or not path.is_file()):
        return ByteTokenizer()
    if path is None or not path.is_file():
        where = "no directory was given" if path is None else f"{path} does not exist"
        raise fail(
            "tokenizer",
            f"the model has {vocab_size} ids and {where}.",
            "Put the tokenizer.json it was trained with next to its weights, or pass ids and take generate_tokens.",
        )
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        problem = f"{path} has {tokenizer.vocab_size} ids, the model {vocab_size}."
        raise fail("tokenizer", problem, "They do not belong together.")
    return tokenizer


def read_tokenizer(path: Path, *, end: str | None = None) -> JsonTokenizer:
    """A tokenizer.json with the special ids that files beside it name; `end`: the end of text if they name none."""
    special = _special(path.parent, "eos")
    return JsonTokenizer(path, start=_special(path.parent, "bos"), end=end if special is None else special)


def _special(directory: Path, name: str) -> str | int | None:
    """The bos or eos token that a checkpoint's JSON files name, by content or id."""
    for file, key in (("tokenizer_config.json", f"{name}_token"), ("config.json", f"{name}_token_id")):
        path = directory / file
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise fail("tokenizer", f"{path} is not JSON: {error}.") from error
        value: Any = config.get(key) if isinstance(config, dict) else None
        value = value.get("content") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str | int):
            return value
    return None


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2's encoder)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(BYTES) if b not in shown]
    return {chr(b): b for b in shown} | {chr(BYTES + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte, by byte."""
    return sorted(_BYTE_OF, key=_BYTE_OF.__getitem__)
