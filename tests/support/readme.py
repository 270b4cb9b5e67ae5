"""Writes the README's tables of settings and commands from the code: `make readme`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from jobs.settings import PREFIX, Settings
from producer.cli.main import main
from tests.support.environment import ROOT

README = ROOT / "README.md"


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
    """Yield every command below `group` with the words that call it; leave out groups that need a subcommand."""
    for name, command in sorted(group.commands.items()):
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield [*words, name], command
        if isinstance(command, click.Group):
            yield from commands(command, [*words, name])


def with_tables(text: str) -> str:
    """Return the README's text with both tables replaced by those of the code."""
    for name, table in (("settings", settings_table()), ("commands", commands_table())):
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert begin and end, f"the README has no marks for the table of {name}"
        text = f"{before}{begin}{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
