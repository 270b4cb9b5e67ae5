"""Each folder of infra/ has one README, which starts with a command and names only existing files and settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from jobs.settings import PREFIX, Settings
from producer.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
FOLDERS = sorted(path.name for path in INFRA.iterdir() if path.is_dir())
GUIDES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "infra/security.md", "infra/monitoring/runbook.md")
MOST_WORDS = 1000


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_has_a_readme_that_starts_with_its_command(folder: str) -> None:
    text = (INFRA / folder / "README.md").read_text()

    assert re.match(r"# [^\n]+\n\n```console\n\$ \S", text)
    assert len(text.split()) < MOST_WORDS
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (INFRA / folder / target).exists(), target


@pytest.mark.parametrize("guide", GUIDES)
def test_every_path_in_a_guide_exists(guide: str) -> None:
    text = (ROOT / guide).read_text()
    paths = {ROOT / path for path in re.findall(r"`((?:infra|jobs|producer|tests|workers)/[\w./-]*)`", text)}
    links = {(ROOT / guide).parent / target for target in re.findall(r"\]\((?!http)([^)#]+)\)", text)}

    assert {str(path) for path in paths | links if not path.exists()} == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_variable_in_the_files_is_a_setting(folder: str) -> None:
    files = [path for path in (INFRA / folder).rglob("*") if path.is_file() and path.suffix not in {".png", ".jpg"}]
    named = {name for path in files for name in re.findall(rf"\b{PREFIX}([A-Z][A-Z_0-9]*[A-Z0-9])\b", path.read_text())}

    assert {name for name in named if name.lower() not in Settings.model_fields} == set()


def cutfleet_commands() -> list[list[str]]:
    """Return each `cutfleet` command in the READMEs, split into words."""
    texts = [(INFRA / folder / "README.md").read_text() for folder in FOLDERS]
    lines = [
        line
        for text in texts
        for block in re.findall(r"```console\n(.*?)```", text, re.S)
        for line in block.splitlines()
    ]
    names = "|".join(main.commands)
    calls = [re.search(rf"\bcutfleet ((?:{names})\b.*)", re.sub(r"\s#.*", "", line)) for line in lines]
    return [shlex.split(found[1], comments=True) for found in calls if found]


def test_every_command_and_its_options_exist() -> None:
    calls = cutfleet_commands()

    assert len(calls) > 5
    for words in calls:
        command: click.Command = main.commands[words[0]]
        if isinstance(command, click.Group) and words[1:] and words[1] in command.commands:
            command = command.commands[words[1]]
        known = {option for part in command.params for option in part.opts}
        assert {word for word in words if word.startswith("--")} <= known, words
