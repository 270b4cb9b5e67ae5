"""Reads and writes S3 objects. The only module, beside `jobs/sqs.py`, that uses boto3."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.allowlist import ANYWHERE, Allowlist, is_allowed
from jobs.errors import (
    BucketExists,
    ContentError,
    CutfleetError,
    ImageError,
    NotFound,
    OutputError,
    OutputNotFound,
    PreconditionFailed,
    ServiceUnavailable,
    SourceError,
    StoreUnsupported,
    TransientError,
)
from jobs.message import Hint
from jobs.recipe import Delivery
from jobs.s3.errors import Role, map_s3_error
from jobs.s3.location import Location
from jobs.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectTypeDef

T = TypeVar("T")

PAGE_KEYS = 1000
"""S3's maximum for one page of a listing."""
EXPECT_CONTINUE_BYTES = 2 << 20
"""A larger body waits for `100 Continue`, as in AWS's SDK for Go: a refusal then costs no upload."""
_ARCHIVED = {"GLACIER", "DEEP_ARCHIVE"}
_NO_ETAG = "0" * 32
"""The ETag of no object."""


@dataclasses.dataclass(frozen=True)
class S3Object:
    """`etag` without quotes. `metadata`: lower-case names; empty from a listing. `modified`: Unix time, 0 if unknown.
    `hint`: see `ImageTask`."""

    key: str
    etag: str
    size: int
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modified: float = 0.0
    hint: Hint = ""


@dataclasses.dataclass(frozen=True)
class Account:
    """An S3 endpoint and the credentials for it. `endpoint`: empty for AWS. `credentials`: access key, secret key and
    region; None: those of `profile`, or as boto3 finds them. `settings`: the variables named in error messages."""

    endpoint: str
    credentials: tuple[str, str, str] | None = None
    profile: str = ""
    settings: tuple[str, str] = ("CUTFLEET_S3_ENDPOINT", "AWS_ACCESS_KEY_ID")

    @property
    def name(self) -> str:
        return self.endpoint or "AWS S3"

    def connect(self, connections: int) -> S3Client:
        """Raises `SettingsError` for an unknown profile or a malformed endpoint."""
        import boto3
        from botocore.config import Config

        config = Config(
            max_pool_connections=connections,
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": 3},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # Bodies are not signed: SHA-256 costs 6.6 ms of a 12-megapixel image. TLS protects them; without TLS
            # nothing that we read is protected either. Names, conditions and metadata are signed.
            s3={"addressing_style": "path" if self.endpoint else "auto", "payload_signing_enabled": False},
        )
        key, secret, region = self.credentials or (None, None, None)
        try:
            session = boto3.session.Session(key, secret, None, region, profile_name=self.profile or None)
            client = session.client("s3", endpoint_url=self.endpoint or None, config=config)
            client.meta.events.register_last("before-call.s3.PutObject", _send_without_expect)
        except Exception as exc:
            raise self.map_error(exc, Location("", ""), role="output") from exc
        return client

    def map_error(self, exc: Exception, location: Location, *, role: Role) -> CutfleetError:
        return map_s3_error(exc, location, role=role, store=self.name, settings=self.settings)


class Store:
    """Sources and outputs in S3; safe for threads. One boto3 client for both roles, or one each. The role of a request
    selects the client and the error class."""

    def __init__(
        self,
        endpoint: str,
        *,
        connections: int,
        credentials: tuple[str, str, str] | None = None,
        source: Account | None = None,
        allowlist: Allowlist = ANYWHERE,
    ) -> None:
        """`endpoint`, `credentials`: see `Account`. `connections`: at least the number of threads that use this store.
        `source`: the account of the sources, if another. `allowlist`: no request leaves for a location outside it."""
        self.on_answer: Callable[[CutfleetError | None], None] = lambda _: None
        results = Account(endpoint, credentials)
        self.name = results.name
        self._allowlist = allowlist
        self._accounts: dict[Role, Account] = {"output": results, "source": source or results}
        self._s3 = results.connect(connections)
        self._clients: dict[Role, S3Client] = {
            "output": self._s3,
            "source": source.connect(connections) if source else self._s3,
        }

    @classmethod
    def of(cls, settings: Settings, *, connections: int) -> Store:
        """Build the store of `settings`."""
        source = None
        if settings.has_own_source:
            endpoint = settings.source_endpoint or settings.s3_endpoint
            source = Account(
                "" if endpoint == "aws" else endpoint,
                profile=settings.source_profile,
                settings=("CUTFLEET_SOURCE_ENDPOINT", "CUTFLEET_SOURCE_PROFILE"),
            )
        return cls(settings.s3_endpoint, connections=connections, source=source, allowlist=settings.allowlist)

    @property
    def has_one_account(self) -> bool:
        """Whether sources and outputs are in the same store and account."""
        return self._accounts["source"] is self._accounts["output"]

    def check_allowed(self, location: Location, role: Role) -> None:
        """Raises `SourceError` or `OutputError` for a location outside the allowlist. Every request checks this first;
        call it earlier where work precedes the first request."""
        if role == "source" and not is_allowed(str(location), self._allowlist.sources):
            raise SourceError(_not_allowed(location, "CUTFLEET_SOURCES"), code="source_not_allowed")
        if role == "output" and not is_allowed(str(location), self._allowlist.destinations):
            raise OutputError(_not_allowed(location, "CUTFLEET_DESTINATIONS"), code="output_not_allowed")

    def list_source(self, prefix: Location, *, after: str = "") -> Iterator[S3Object]:
        """Yield the objects under `prefix` without folder markers; only keys after `after`. AWS lists in key order; not
        every store does (SeaweedFS lists folder by folder)."""
        for objects, _ in self.list_pages(prefix, role="source", after=after):
            yield from objects

    def list_pages(
        self, prefix: Location, *, role: Role, delimiter: str = "", after: str = ""
    ) -> Iterator[tuple[list[S3Object], list[str]]]:
        """Yield each page: objects without folder markers, and with a delimiter the common prefixes."""
        more = {name: value for name, value in (("Delimiter", delimiter), ("StartAfter", after)) if value}
        arguments: dict[str, Any] = {"Bucket": prefix.bucket, "Prefix": prefix.key, **more}
        arguments |= {"OptionalObjectAttributes": ["RestoreStatus"], "PaginationConfig": {"PageSize": PAGE_KEYS}}
        pages = iter(self._clients[role].get_paginator("list_objects_v2").paginate(**arguments))
        while (page := self._guard(lambda: next(pages, None), prefix, role)) is not None:
            objects = [_listed(found) for found in page.get("Contents", []) if not found["Key"].endswith("/")]
            yield objects, [found["Prefix"] for found in page.get("CommonPrefixes", [])]

    def head(self, location: Location, *, role: Role) -> S3Object | None:
        """Return the object without its body; None when it does not exist."""
        try:
            found = self._guard(
                lambda: self._clients[role].head_object(Bucket=location.bucket, Key=location.key), location, role
            )
        except NotFound:
            return None
        except ImageError:
            self._raise_if_credentials_fail(location, role)
            raise
        return S3Object(location.key, found["ETag"].strip('"'), found["ContentLength"], found["Metadata"])

    def get(self, location: Location, *, role: Role, etag: str = "", max_bytes: int) -> tuple[bytes, str]:
        """Return body and ETag. Raises `SourceError` `source_changed` when the object no longer has `etag`, and
        `ContentError` `too_many_bytes` before a longer body is read."""
        arguments: dict[str, Any] = {"Bucket": location.bucket, "Key": location.key}
        if etag:
            arguments["IfMatch"] = f'"{etag}"'
        return self._guard(lambda: self._read(role, arguments, location, max_bytes), location, role)

    def download(self, location: Location, to: Path) -> None:
        """Write an object to a file; it may be larger than memory. Not limited by the allowlist: a manifest may be
        anywhere."""
        self._guard(
            lambda: self._clients["source"].download_file(location.bucket, location.key, str(to)),
            location,
            "source",
            anywhere=True,
        )

    def put(
        self,
        location: Location,
        body: bytes,
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        delivery: Delivery | None = None,
        replaces: str | None = None,
        conditional: bool = False,
    ) -> str:
        """Write an object; return its ETag. With `conditional`, raises `PreconditionFailed` unless the object now has
        the ETag `replaces`, or does not exist and `replaces` is None."""
        arguments: dict[str, Any] = {"Bucket": location.bucket, "Key": location.key, "Body": body}
        arguments |= _delivery_arguments(delivery or Delivery())
        if conditional:
            arguments |= {"IfMatch": f'"{replaces}"'} if replaces else {"IfNoneMatch": "*"}
        try:
            answer: Any = self._guard(
                lambda: self._s3.put_object(ContentType=content_type, Metadata=dict(metadata or {}), **arguments),
                location,
                "output",
            )
        except OutputNotFound as exc:
            if "IfMatch" in arguments:  # AWS answers 404 here, other stores 412
                raise PreconditionFailed(f"{location} does not exist any more.") from exc
            raise
        return str(answer["ETag"]).strip('"')

    def is_reachable(self, prefix: Location, *, role: Role) -> bool:
        """Whether the store answers a listing of `prefix`; a refusal is an answer."""
        try:
            self._guard(
                lambda: self._clients[role].list_objects_v2(Bucket=prefix.bucket, Prefix=prefix.key, MaxKeys=1),
                prefix,
                role,
            )
        except (ServiceUnavailable, TransientError):
            return False
        except CutfleetError:
            return True
        return True

    def supports_conditional_writes(self, location: Location, body: bytes) -> bool:
        """Write `location`, then again under conditions that are false: False when the store accepts one of them."""
        self.put(location, body, content_type="application/json")
        return all(self._refuses(location, body, replaces) for replaces in (None, _NO_ETAG))

    def _refuses(self, location: Location, body: bytes, replaces: str | None) -> bool:
        try:
            self.put(location, body, content_type="application/json", replaces=replaces, conditional=True)
        except PreconditionFailed:
            return True
        except StoreUnsupported:
            return False
        return False

    def presign(self, location: Location, *, lasts_s: int) -> str:
        """Return a URL that lets its bearer read the object for `lasts_s` seconds. Never log it."""
        arguments = {"Bucket": location.bucket, "Key": location.key}
        return self._guard(
            lambda: self._s3.generate_presigned_url("get_object", Params=arguments, ExpiresIn=lasts_s),
            location,
            "output",
        )

    def ping(self) -> None:
        """Raises `ServiceUnavailable` when S3 does not answer; a refusal is an answer."""
        probe = Location("cutfleet-ready", "ready")
        with contextlib.suppress(ImageError):
            self._guard(
                lambda: self._s3.head_object(Bucket=probe.bucket, Key=probe.key), probe, "output", anywhere=True
            )

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket unless we own it already. For the local stack and for tests."""
        with contextlib.suppress(BucketExists):
            self._guard(lambda: self._s3.create_bucket(Bucket=bucket), Location(bucket, ""), "output", anywhere=True)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _raise_if_credentials_fail(self, location: Location, role: Role) -> None:
        """Raises `StoreUnavailable` for bad credentials. A HEAD's answer has no body, so bad credentials look like a
        refused object; a GET's answer names the cause."""
        arguments: dict[str, Any] = {"Bucket": location.bucket, "Key": location.key, "Range": "bytes=0-0"}
        with contextlib.suppress(ImageError):
            self._guard(lambda: self._read(role, arguments, location, 1), location, role)

    def _read(self, role: Role, arguments: dict[str, Any], location: Location, max_bytes: int) -> tuple[bytes, str]:
        answer = self._clients[role].get_object(**arguments)
        with answer["Body"] as body:
            if answer["ContentLength"] > max_bytes:
                raise ContentError(
                    f"{location} has {answer['ContentLength'] / 1e6:.1f} MB, the limit is {max_bytes / 1e6:g} MB "
                    "(CUTFLEET_MAX_BYTES_MB).",
                    code="too_many_bytes",
                )
            return body.read(), answer["ETag"].strip('"')

    def _guard(self, call: Callable[[], T], location: Location, role: Role, *, anywhere: bool = False) -> T:
        if not anywhere:
            self.check_allowed(location, role)
        error: CutfleetError | None = None
        try:
            return call()
        except CutfleetError:
            raise
        except Exception as exc:
            error = self._accounts[role].map_error(exc, location, role=role)
            raise error from exc
        finally:
            self.on_answer(error)


def _not_allowed(location: Location, variable: str) -> str:
    return f"{location} is under no entry of {variable}: choose another prefix, or add it there for every process."


def _listed(found: ObjectTypeDef) -> S3Object:
    """A restored archived object can be read until its copy expires."""
    archived = found.get("StorageClass") in _ARCHIVED and not found.get("RestoreStatus", {}).get("RestoreExpiryDate")
    return S3Object(
        found["Key"],
        found["ETag"].strip('"'),
        found["Size"],
        modified=found["LastModified"].timestamp(),
        hint="archived" if archived else "",
    )


def _delivery_arguments(delivery: Delivery) -> dict[str, str]:
    arguments = {"CacheControl": delivery.cache_control, "StorageClass": delivery.storage_class}
    if delivery.kms_key:
        arguments |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": delivery.kms_key}
    return {name: value for name, value in arguments.items() if value}


def _send_without_expect(params: dict[str, Any], **_: Any) -> None:
    """Pass a body of up to `EXPECT_CONTINUE_BYTES` to botocore as bytes. As a file, botocore sends it in pieces of
    16 kB after `Expect: 100-continue`, one more round trip for each PUT; its handler for that skips bytes."""
    body = params["body"]
    if isinstance(body, io.BytesIO) and body.getbuffer().nbytes <= EXPECT_CONTINUE_BYTES:
        params["body"] = body.getvalue()
