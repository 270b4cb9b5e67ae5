"""Logs on stderr: a sentence and fields, for people (`text`) or programs (`json`). Fields come by `extra`. Never log a
secret."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

from jobs.errors import CutfleetError

_STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "data"}


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{stamp} {record.levelname.lower():7} {record.getMessage()}" + (f"  {fields}" if fields else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
        } | _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logs(form: Literal["text", "json"], *, level: int = logging.INFO) -> None:
    """Replace the root logger's handlers. Libraries log warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("boto3", "botocore", "urllib3", "celery", "kombu", "amqp", "PIL"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


class RepeatedErrors:
    """Logs an error of a loop that retries: once for each cause, not once for each attempt. Not safe for threads."""

    def __init__(self, logger: logging.Logger, *, action: str, **fields: object) -> None:
        """`action`, `fields`: of each log line."""
        self._logger = logger
        self._fields = {"action": action} | fields
        self._cause = ""

    def log(self, error: Exception, text: str = "%s", *, level: int = logging.ERROR) -> None:
        """`text`: the line, with %s for the error. An error that is not ours is logged with its traceback."""
        cause = error.code if isinstance(error, CutfleetError) else type(error).__name__
        if cause == self._cause:
            return
        self._cause = cause
        fields = self._fields | {"code": cause}
        if isinstance(error, CutfleetError):
            self._logger.log(level, text, error, extra=fields)
        else:
            self._logger.error("unexpected error", exc_info=error, extra=fields)

    def clear(self) -> bool:
        """Forget the cause after a success; return whether there was one."""
        had_cause, self._cause = bool(self._cause), ""
        return had_cause
