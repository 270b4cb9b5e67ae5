"""The `cutfleet` command. Results go to stdout, progress and errors to stderr; `ExitCode` lists the exit codes."""

from __future__ import annotations

import sys
from typing import Any

import click

from jobs.errors import CutfleetError, ServiceUnavailable, TransientError
from producer.cli import audit, catalogue, control, services, status, submit
from producer.cli.session import ExitCode


class _Commands(click.Group):
    """Prints our errors as one line and exits. Any other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CutfleetError as exc:
            click.echo(f"cutfleet: {exc} [{exc.code}]", err=True)
            is_unreachable = isinstance(exc, (ServiceUnavailable, TransientError))
            sys.exit(ExitCode.UNREACHABLE if is_unreachable else ExitCode.USAGE)
        except KeyboardInterrupt:
            click.echo("cutfleet: interrupted", err=True)
            sys.exit(ExitCode.INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="cutfleet")
def main() -> None:
    """Background removal for every image under an S3 prefix: a cutout, a mask and a recorded result for each."""


for _module in (submit, status, control, audit, services, catalogue):
    for _command in _module.COMMANDS:
        main.add_command(_command)
