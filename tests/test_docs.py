"""What the pages say is true: Python snippets run, commands parse, tables repeat the tests' own constants."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import test_layers
import test_ops
import torch

import stateline
from stateline.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of every fenced block in a language."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(2)].count("\n"), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def commands() -> list[tuple[str, str]]:
    """(page, command) for every `stateline …` in a console block; comments and pipes are cut off."""
    found = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for _, block in blocks(page, "console"):
            for line in block.splitlines():
                found += [(page.name, part) for part in re.findall(r"(?:\$|\|) (stateline [^|]*)", line)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace a page, in a folder that holds only the data that lies beside the pages."""
    monkeypatch.chdir(tmp_path)
    for data in (ROOT / "docs").glob("*.csv"):
        (tmp_path / data.name).write_bytes(data.read_bytes())
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)  # the lines of a traceback are the page's


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value)
def test_commands_parse(page: str, command: str) -> None:
    """The parser raises for an unknown subcommand, option or value; pages have no other check of them."""
    words = shlex.split(command, comments=True)
    options = build_parser().parse_args(words[1:])
    assert options.command == words[1], page


def test_there_is_something_to_test() -> None:
    """A changed fence style must not turn the tests above into nothing."""
    assert sum(len(blocks(page, "python")) for page in PAGES) > 20
    assert len(commands()) > 10


def test_published_bounds_are_the_tests_bounds() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    table = page.split("<!-- bounds -->")[1].split("<!-- /bounds -->")[0]
    published = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.strip().splitlines()[2:]]

    def bound(bounds: dict[torch.dtype, float], dtype: torch.dtype) -> str:
        return f"{bounds[dtype]:.0e}" if dtype in bounds else ""

    assert published == [
        [str(dtype).removeprefix("torch."), bound(test_ops.BOUND, dtype), bound(test_layers.BOUND, dtype)]
        for dtype in sorted(test_ops.BOUND, key=lambda d: list(test_ops.BOUND).index(d))
    ]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in navigation, f"{page.name} is in no menu"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("coming_from_*.md")), ids=lambda page: page.name)
def test_names_of_ours_in_tables_exist(page: Path) -> None:
    """`nn.Mamba2(…)`, `ops.ssd`, `stateline.load(…)`, `generation.generate_tokens(…)` in the cells that say "here"."""
    found = 0
    for row in page.read_text(encoding="utf-8").splitlines():
        if row.startswith("| `"):
            here = row.split("|")[2]
            for module, names in re.findall(
                r"`(?:\w+ = )?(?:stateline\.)?(nn|ops|models|generation|training)\.([\w.]+)", here
            ):
                functools.reduce(getattr, names.split("."), importlib.import_module(f"stateline.{module}"))
                found += 1
            for name in re.findall(r"`(?:stateline\.)?(\w+)\(", here):
                if name[0].isupper() or f"stateline.{name}(" in here:
                    getattr(stateline, name)
                    found += 1
    assert found > 3
