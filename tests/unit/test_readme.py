"""The README matches the code."""

from __future__ import annotations

import re

from tests.support.environment import ROOT
from tests.support.readme import README, with_tables


def test_the_tables_match_the_code() -> None:
    text = README.read_text()

    assert with_tables(text) == text, "run `make readme`"


def test_each_linked_file_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


def test_each_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()

    for target in re.findall(r"^\$ make (\w+)", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
