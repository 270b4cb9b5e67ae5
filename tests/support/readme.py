"""Writes the README's tables from the code: `make readme`. A test fails while they differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from jobs.settings import PREFIX, Settings
from producer.cli.main import main

README = Path(__file__).resolve().parents[2] / "README.md"


def settings_table() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in ("", None) else f"`{field.default}`"
        lines.append(f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


def commands_table() -> str:
    lines = ["| command | what it does |", "|---|---|"]
    context = click.Context(main)
    for words, command in commands(main, ["cutfleet"]):
        arguments = [part for part in command.params if isinstance(part, click.Argument)]
        usage = " ".join([*words, *(part.make_metavar(context) for part in arguments)]).replace("|", "\\|")
        lines.append(f"| `{usage}` | {command.get_short_help_str(300)} |")
    return "\n".join(lines)


def commands(group: click.Group, words: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    """Every command below `group`, with the words that call it; a group that does nothing by itself is left out."""
    for name, command in sorted(group.commands.items()):
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield [*words, name], command
        if isinstance(command, click.Group):
            yield from commands(command, [*words, name])


def with_tables(text: str) -> str:
    """The README's text with both tables as the code has them."""
    for name, table in (("settings", settings_table()), ("commands", commands_table())):
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
        assert mark.search(text), f"the README has no place for its {name}"
        text = mark.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2].lstrip()}", text)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
