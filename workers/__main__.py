"""`python -m workers`: run a worker until SIGTERM. It takes no options: settings are the variables CUTFLEET_* (README).

`python -m workers sheet FOLDER` draws a contact sheet of a job's outputs. `python -m workers compare` measures models
on your own images. `cutfleet` itself imports no image library, so commands that need pixels are here."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading

if __name__ == "__main__" and not sys.argv[1:]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before the imports, which take seconds

from jobs.errors import CutfleetError, SettingsError
from jobs.logs import set_up_logs
from jobs.settings import Settings, load_settings
from workers.process.exit_codes import ExitCode

COMMANDS = {"compare": "workers.tools.compare", "sheet": "workers.tools.contact_sheet"}


def main(argv: list[str]) -> int:
    if not argv:
        return _serve()
    if argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] in COMMANDS:
        return int(importlib.import_module(COMMANDS[argv[0]]).main(argv[1:]))
    print(
        f"python -m workers: unknown command {argv[0]!r}. Known: {', '.join(COMMANDS)}; no command: run a worker.",
        file=sys.stderr,
    )
    return ExitCode.SETTINGS


def _serve() -> int:
    try:
        settings = load_settings()
        set_up_logs(settings.log_format)
        return _prepare_and_serve(settings)
    except CutfleetError as exc:
        print(f"python -m workers: {exc} [{exc.code}]", file=sys.stderr)
        return ExitCode.SETTINGS if isinstance(exc, SettingsError) else ExitCode.UNREACHABLE


def _prepare_and_serve(settings: Settings) -> int:
    """Do what must come before torch is imported, in this order; then serve.

    1. SIGTERM ends the process at once: it has claimed no image. Celery replaces this handler.
    2. Fork the listener of crashes, while there is one thread and little memory.
    3. Choose the GPU.
    """
    draining = threading.Event()
    _exit_on_sigterm(draining)
    from workers.process.crash_reporter import CrashReporter

    crash_reporter = CrashReporter(settings)
    if settings.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(settings.gpu)
    from workers.serve import serve

    return serve(settings, draining=draining, crash_reporter=crash_reporter)


def _exit_on_sigterm(draining: threading.Event) -> None:
    """`draining` outlasts a `SystemExit` that a library swallows."""

    def exit_now(*_: object) -> None:
        draining.set()
        sys.exit(0)

    signal.signal(signal.SIGTERM, exit_now)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
