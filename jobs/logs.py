"""Logs on stderr: a sentence and its facts, for people (`text`) or programs (`json`). Facts come by `extra`; a secret
has no business in either."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

_OWN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "data"}


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{name}={value}" for name, value in _facts(record).items())
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{stamp} {record.levelname.lower():7} {record.getMessage()}" + (f"  {facts}" if facts else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
        } | _facts(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logs(form: Literal["text", "json"], *, level: int = logging.INFO) -> None:
    """Replaces what handlers the root logger has; the libraries' own chatter below a warning is left out."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("boto3", "botocore", "urllib3", "celery", "kombu", "amqp", "PIL"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _OWN}
