"""Who may ask the HTTP API for what: a TOML file of keys, each by its SHA-256 alone.

[shop]                                      # the key's name, in logs
sha256 = "9f86d081..."                      # printf %s "$KEY" | sha256sum
sources = ["s3://shop/photos/"]             # may be read
destinations = ["s3://shop-cutouts/"]       # may be written, and results read
per_minute = 600                            # requests, those for a status too
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from jobs.allowlist import climbs
from jobs.errors import CutfleetError, SettingsError

Prefix = Annotated[str, StringConstraints(pattern=r"^s3://[^/]+/(.*/)?$")]


class Forbidden(CutfleetError):
    """The key has no right to it."""

    code = "forbidden"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    sources: list[Prefix] = Field(min_length=1)
    destinations: list[Prefix] = Field(min_length=1)
    per_minute: int = Field(600, ge=1)


@dataclasses.dataclass(frozen=True)
class Caller:
    """Prefixes end with `/`, so that `s3://shop/` allows nothing in `s3://shop-2/`."""

    name: str
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    per_minute: int

    def check(self, *, source: str = "", destination: str = "") -> None:
        """Raises `Forbidden`, which says nothing about what is there."""
        allowed = (not source or source.startswith(self.sources)) and (
            not destination or f"{destination.rstrip('/')}/".startswith(self.destinations)
        )
        if not allowed or climbs(f"{source}/{destination}"):
            raise Forbidden("This key has no right to that.")


class Callers:
    def __init__(self, path: str) -> None:
        """Raises `SettingsError` for a file that is not there or not as above."""
        if not path:
            raise SettingsError("Set CUTFLEET_API_KEYS to the file of the API's keys: infra/api/README.md.")
        try:
            found = tomllib.loads(Path(path).read_text("utf-8"))
            entries = TypeAdapter(dict[str, _Entry]).validate_python(found)
        except OSError as exc:
            raise SettingsError(f"CUTFLEET_API_KEYS: {path} can't be read: {exc.strerror}.") from exc
        except tomllib.TOMLDecodeError as exc:
            raise SettingsError(f"CUTFLEET_API_KEYS: {path} is no TOML: {exc}.") from exc
        except ValidationError as exc:
            wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
            raise SettingsError(f"CUTFLEET_API_KEYS: {path}: {wrong}.") from exc
        if not entries:
            raise SettingsError(f"CUTFLEET_API_KEYS: {path} has no key: nobody could use the API.")
        self._callers = [
            (entry.sha256, Caller(name, tuple(entry.sources), tuple(entry.destinations), entry.per_minute))
            for name, entry in entries.items()
        ]

    def find(self, key: str) -> Caller | None:
        """Whose key it is; takes as long whether or not it is anybody's."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = [caller for known, caller in self._callers if hmac.compare_digest(known, digest)]
        return found[0] if found else None
