"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.readme import README, with_tables

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_the_code() -> None:
    text = README.read_text()

    assert with_tables(text) == text, "run `make readme`"


def test_what_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


def test_its_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()

    for target in re.findall(r"^\$ make (\w+)", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
