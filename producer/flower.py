"""`python -m producer.flower [--port=5555 ...]`: Flower for this fleet, with every option of Flower's own.

What is set here and may be set otherwise: read-only, a bound on memory, columns that name the image. What may not:
it does not start without a login, since Flower shows the keys of a whole catalogue to whoever asks.
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
    "read_only": True,  # the ledger decides what becomes of an image; revoking a message decides nothing
    "max_tasks": 20_000,  # some 60 MB; what is older is in the ledger and in S3
    "purge_offline_workers": 600,  # seconds; its metrics have the worker's name in a label
    "inspect_timeout": 3000.0,  # milliseconds; a worker that decodes large images answers late
    "tasks_columns": "state,args,runtime,worker,received,started,exception,uuid",
}

LEAVE_S = 5.0
"""Grace for questions to the server that are under way when Flower is told to go."""


def main(argv: list[str]) -> int:
    try:
        redis_url = load_settings().redis_url
        _prepare(argv)
    except CutfleetError as exc:
        print(f"python -m producer.flower: {exc} [{exc.code}]", file=sys.stderr)
        return 2
    app = make_app(redis_url)
    if redis_url.startswith("rediss://"):
        app.conf.broker_use_ssl = _tls(redis_url)  # Flower reads no TLS options from a URL
    app.start(["flower", *argv])
    _leave_soon()
    return 0


def _leave_soon() -> None:
    """Python waits for threads that ask the server, and when that is silent they ask on for minutes."""
    timer = threading.Timer(LEAVE_S, os._exit, (0,))
    timer.daemon = True
    timer.start()
    atexit.register(timer.cancel)  # the threads have ended; what Flower still saves (`--persistent`) may take its time


def _prepare(argv: list[str]) -> None:
    """Flower's options as we want them; FLOWER_* variables, then the command line, override them."""
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
        raise SettingsError(f"Flower does not take an option, or a FLOWER_* variable: {exc}") from exc
    logins = options.basic_auth or []
    if not all(re.fullmatch(r"[^:]+:.+", login) for login in logins) or not (logins or options.auth):
        raise SettingsError("Flower needs a login: set FLOWER_BASIC_AUTH=user:password, or OAuth by FLOWER_AUTH.")


def _tls(redis_url: str) -> dict[str, str]:
    asked = {name: value for name, value in parse_qsl(urlsplit(redis_url).query) if name.startswith("ssl_")}
    return {"ssl_cert_reqs": "required"} | asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
