"""API keys and their rights, from a TOML file with only the SHA-256 of each key:

[shop]                                      # name of the key, in logs
sha256 = "9f86d081..."                      # printf %s "$KEY" | sha256sum
sources = ["s3://shop/photos/"]             # prefixes to read
destinations = ["s3://shop-cutouts/"]       # prefixes to write, and to read results from
per_minute = 600                            # most calls a minute, status calls included
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from jobs.allowlist import has_parent_segment
from jobs.errors import CutfleetError, SettingsError
from jobs.s3.location import Location

Prefix = Annotated[str, StringConstraints(pattern=r"^s3://[^/]+/(.*/)?$")]


class Unauthorized(CutfleetError):
    """No API key, or an unknown one."""

    code = "unauthorized"


class Forbidden(CutfleetError):
    """The key is not permitted for a prefix."""

    code = "forbidden"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    sources: list[Prefix] = Field(min_length=1)
    destinations: list[Prefix] = Field(min_length=1)
    per_minute: int = Field(600, ge=1)


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """Prefixes end with `/`, so that `s3://shop/` allows nothing in `s3://shop-2/`."""

    name: str
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    per_minute: int

    def check_source(self, source: Location) -> None:
        """Raises `Forbidden`."""
        _check_prefix(source, self.sources)

    def check_destination(self, destination: Location) -> None:
        """Raises `Forbidden`. `destination`: as `parse_destination` returns it."""
        _check_prefix(destination, self.destinations)


class ApiKeys:
    def __init__(self, path: str) -> None:
        """Raises `SettingsError` for a file that is missing or malformed."""
        if not path:
            raise SettingsError("Set CUTFLEET_API_KEYS to the file of the API's keys: infra/api/README.md.")
        try:
            fields = tomllib.loads(Path(path).read_text("utf-8"))
            entries = TypeAdapter(dict[str, _Entry]).validate_python(fields)
        except OSError as exc:
            raise SettingsError(f"CUTFLEET_API_KEYS: {path} can't be read: {exc.strerror}.") from exc
        except tomllib.TOMLDecodeError as exc:
            raise SettingsError(f"CUTFLEET_API_KEYS: {path} is not valid TOML: {exc}.") from exc
        except ValidationError as exc:
            problems = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
            raise SettingsError(f"CUTFLEET_API_KEYS: {path}: {problems}.") from exc
        if not entries:
            raise SettingsError(f"CUTFLEET_API_KEYS: {path} has no key: add one.")
        self._keys = [
            (entry.sha256, ApiKey(name, tuple(entry.sources), tuple(entry.destinations), entry.per_minute))
            for name, entry in entries.items()
        ]

    def find(self, secret: str) -> ApiKey | None:
        """Return the key with this text; takes the same time whether or not it exists."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        matching = [key for sha256, key in self._keys if hmac.compare_digest(sha256, digest)]
        return matching[0] if matching else None


def _check_prefix(location: Location, prefixes: tuple[str, ...]) -> None:
    if not str(location).startswith(prefixes) or has_parent_segment(str(location)):
        raise Forbidden("This key is not permitted for this prefix.")  # no detail: it would reveal what exists
