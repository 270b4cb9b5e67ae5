"""The images that a request asks for: everything under a prefix, named keys, or a manifest. Each key comes once; one
row is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jobs.errors import SettingsError
from jobs.message import is_valid
from jobs.s3.client import S3Object, Store
from jobs.s3.listing import list_in_parallel
from jobs.s3.location import MAX_KEY_BYTES, Location
from producer.submission.manifest_input import check_key, read_manifest
from producer.submission.request import Request


def read_rows(request: Request, store: Store, *, after: str = "") -> Iterator[S3Object]:
    """Stream the images of a request. Named keys and manifests come in key order, only those after `after`; a listing
    comes whole and in no order."""
    if request.manifest is not None:
        return read_manifest(request.manifest, request.source, store, report=request.bad_line, after=after)
    if request.keys is not None:
        return _named_keys(request.source, request.keys, store, after=after)
    return filter(request.only.takes, list_in_parallel(store, request.source, role="source"))


def _named_keys(source: Location, keys: Iterable[str], store: Store, *, after: str) -> Iterator[S3Object]:
    """A worker takes the version that it finds. Raises `SettingsError` for the first key that is invalid or not under
    `source`, and `SourceError` for one outside the allowlist."""
    for key in sorted({key.strip("\r\n") for key in keys} - {""}):
        if not is_valid("key", key):
            raise SettingsError(
                f"Key {key[:80]!r}... is not UTF-8 text, or has more than S3's {MAX_KEY_BYTES} bytes.",
                code="name_too_long",
            )
        check_key(key, source, store)
        if key > after and not key.endswith("/"):
            yield S3Object(key, "", -1)
