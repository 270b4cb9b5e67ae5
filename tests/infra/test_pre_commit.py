""".pre-commit-config.yaml runs exactly the commands of `make check`, from the project's .venv."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def commands_of_make_check() -> list[str]:
    """The recipe lines of the target `check`, with Make's variables expanded."""
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) [:?]?= *(.+)$", text, re.MULTILINE))
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert recipe is not None
    return [expand(line.strip(), variables) for line in recipe[1].splitlines()]


def expand(text: str, variables: dict[str, str]) -> str:
    while "$(" in text:
        text = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)
    return text


def hooks() -> list[dict[str, Any]]:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "no network"
    return list(repository["hooks"])


def test_the_hooks_run_exactly_the_commands_of_make_check() -> None:
    assert [hook["entry"] for hook in hooks()] == commands_of_make_check()


def test_each_hook_checks_the_whole_project_on_every_commit() -> None:
    for hook in hooks():
        assert hook["language"] == "system", "pre-commit must not install anything"
        assert hook["pass_filenames"] is False
        assert hook["always_run"] is True
