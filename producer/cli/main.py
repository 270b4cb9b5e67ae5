"""The `cutfleet` command: parse, call, print, exit code. Results on stdout, progress and errors on stderr. The commands
themselves stand in `producer/cli`.

Exit codes: 0 all done, 1 some images failed, 2 usage or settings, 3 deadline passed, 4 a service can't be reached.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from jobs.errors import CutfleetError, ServiceUnavailable, TransientError
from producer.cli import audit as auditing
from producer.cli import control as steering
from producer.cli import fleet, services, status
from producer.cli import submit as submitting
from producer.cli.session import UNREACHABLE, USAGE


class _Commands(click.Group):
    """Turns our errors into one sentence and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CutfleetError as exc:
            click.echo(f"cutfleet: {exc} [{exc.code}]", err=True)
            sys.exit(UNREACHABLE if isinstance(exc, (ServiceUnavailable, TransientError)) else USAGE)
        except KeyboardInterrupt:
            click.echo("cutfleet: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="cutfleet")
def main() -> None:
    """Point it at a bucket; get a cutout and a mask back for every image, with the truth about each one."""


for _group in (submitting, status, steering, auditing, services, fleet):
    for _command in _group.COMMANDS:
        main.add_command(_command)
