"""`python -m producer.flower [--port=5555 ...]`: Flower for this fleet, with all of Flower's own options.

The defaults set here can be overridden: read-only, a memory limit, columns that show the image. One rule can't: Flower
does not start without a login, because it shows the keys of the whole catalogue.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jobs.broker import make_app
from jobs.errors import CutfleetError, SettingsError
from jobs.settings import load_settings

DEFAULTS: dict[str, Any] = {
    "read_only": True,  # the ledger decides what happens to an image; revoking a message has no effect
    "max_tasks": 20_000,  # some 60 MB; older images are in the ledger and in S3
    "purge_offline_workers": 600,  # seconds; Flower's metrics have the worker's name in a label
    "inspect_timeout": 3000.0,  # milliseconds; a worker that decodes large images answers late
    "tasks_columns": "state,args,runtime,worker,received,started,exception,uuid",
}

EXIT_S = 5.0
"""Time for requests to the broker that are in progress when Flower stops."""


def main(argv: list[str]) -> int:
    """Return the exit code. `argv`: options of Flower."""
    try:
        redis_url = load_settings().redis_url
        _set_options(argv)
    except CutfleetError as exc:
        print(f"python -m producer.flower: {exc} [{exc.code}]", file=sys.stderr)
        return 2
    app = make_app(redis_url)
    if redis_url.startswith("rediss://"):
        app.conf.broker_use_ssl = _tls_options(redis_url)  # Flower reads no TLS options from a URL
    app.start(["flower", *argv])
    _exit_after(EXIT_S)
    return 0


def _exit_after(seconds: float) -> None:
    """End the process after `seconds`: Python joins Flower's threads, which query an unreachable broker for minutes."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()
    atexit.register(timer.cancel)  # the threads have ended; saving Flower's state (`--persistent`) may take longer


def _set_options(argv: list[str]) -> None:
    """Set Flower's options: our defaults, then FLOWER_* variables, then the command line. Raises `SettingsError`."""
    try:
        from flower.command import apply_env_options, apply_options
        from flower.options import options
        from tornado.options import Error as BadOption
    except ImportError as exc:
        raise SettingsError("Flower is not installed: pip install 'cutfleet[flower]'.") from exc
    for name, value in DEFAULTS.items():
        setattr(options, name, value)
    try:
        apply_env_options()
        apply_options("flower", argv)
    except (BadOption, ValueError, OSError) as exc:
        raise SettingsError(f"Flower refuses an option or a FLOWER_* variable: {exc}") from exc
    logins = options.basic_auth or []
    if not all(re.fullmatch(r"[^:]+:.+", login) for login in logins) or not (logins or options.auth):
        raise SettingsError("Flower needs a login: set FLOWER_BASIC_AUTH=user:password, or OAuth by FLOWER_AUTH.")


def _tls_options(redis_url: str) -> dict[str, str]:
    given = {name: value for name, value in parse_qsl(urlsplit(redis_url).query) if name.startswith("ssl_")}
    return {"ssl_cert_reqs": "required"} | given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
