"""Store: S3 objects in and out, and the names they have. The only place that knows boto3 and botocore's errors.

Objects of a job under its destination TO:
  TO/cutouts/REL.png, TO/masks/REL.png   outputs; REL is the key after the last `/` of the source prefix
  TO/NAME/REL.jpg                        rendition NAME, unless its recipe says another path
  TO/_cutfleet/JOB/job.json              source, destination, recipe; a live job's rows
  TO/_cutfleet/JOB/manifest/NNNNNN.jsonl.gz   index, key, etag, size; end.json once it is complete
  TO/_cutfleet/JOB/report/...            written when the job closes
  TO/_cutfleet/JOB/review/DIGEST.json    what `cutfleet review` shows of one image; see jobs/preview.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jobs.allowlist import ANYWHERE, Bounds, is_within
from jobs.errors import (
    CutfleetError,
    ImageError,
    OutputError,
    ServiceUnavailable,
    SettingsError,
    SourceError,
    TransientError,
)
from jobs.message import MAX_KEY_BYTES, Hint
from jobs.recipe import OWN_FOLDERS, Delivery, Recipe
from jobs.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectTypeDef

Role = Literal["source", "output"]
T = TypeVar("T")

RECORDS = "_cutfleet"
PAGE_KEYS = 1000
"""S3's most."""
ASK_FIRST_BYTES = 2 << 20
"""A larger body is not sent in vain where the answer is no. As AWS's own SDK for Go has it."""
_ARCHIVED = {"GLACIER", "DEEP_ARCHIVE"}
_NO_ETAG = "0" * 32
"""Of no object of ours."""
_BUSY = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "OperationAborted",
    "ConditionalRequestConflict",
    "500",
    "502",
    "503",
    "504",
    "409",
}
_UNSUPPORTED = {"NotImplemented", "501"}
_MISSING = {"NoSuchKey", "404", "NotFound", "NoSuchVersion"}
_DENIED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"}
_BAD_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
    "AuthorizationHeaderMalformed",
}
_CHANGED = {"PreconditionFailed", "412"}


class PreconditionFailed(CutfleetError):
    """The object is not as the condition said: it was changed, or is there already."""

    code = "precondition_failed"


@dataclasses.dataclass(frozen=True)
class Location:
    """`s3://BUCKET/KEY`; as a prefix, `key` may be empty and matches as S3 does."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @classmethod
    def parse(cls, uri: str) -> Location:
        """Raises `SettingsError` when it is no s3:// URI."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or not bucket:
            raise SettingsError(f"{uri!r} is not an S3 location: write s3://BUCKET/PREFIX.")
        return cls(bucket, key)


@dataclasses.dataclass(frozen=True)
class S3Object:
    """`etag` without quotes; `metadata` as S3 gives it: lower-case names, empty from a listing. `modified`: seconds
    since 1970, 0 where it was not asked for. `hint`: see `ImageTask`."""

    key: str
    etag: str
    size: int
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modified: float = 0.0
    hint: Hint = ""


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of one image: where it is read and where its results go."""

    source: Location
    cutout: Location
    mask: Location


def destination_prefix(destination: str) -> Location:
    """A destination always ends with `/`, so that its objects stand under it and not beside it."""
    location = Location.parse(destination)
    return Location(location.bucket, location.key.rstrip("/") + "/" if location.key.strip("/") else "")


def image_names(source: str, destination: str, key: str) -> Names:
    """Whether S3 can hold them, `rendition_names` checks: an image must be claimed before it can fail."""
    prefix = Location.parse(source)
    to = destination_prefix(destination)
    relative = _relative(key, prefix)
    return Names(
        Location(prefix.bucket, key),
        Location(to.bucket, f"{to.key}cutouts/{relative}.png"),
        Location(to.bucket, f"{to.key}masks/{relative}.png"),
    )


def rendition_names(recipe: Recipe, source: str, destination: str, key: str) -> dict[str, Location]:
    """Where each rendition of one image goes, in the recipe's order. Raises `OutputError`: `name_too_long`
    (of these, or of the cutout), `name_unmatched` (the key does not fit the recipe's pattern), `name_taken` (by our own
    folders, or by another rendition of this image).
    """
    _check_length(image_names(source, destination, key).cutout)
    to = destination_prefix(destination)
    relative = _relative(key, Location.parse(source))
    names: dict[str, Location] = {}
    for rendition in recipe.renditions:
        path = recipe.rendition_path(rendition, relative)
        place = Location(to.bucket, to.key + path)
        if path.startswith(OWN_FOLDERS) or place in names.values():
            raise OutputError(
                f"Rendition {rendition.name!r} of {key!r} would be {place}, which is taken: change its path.",
                code="name_taken",
            )
        _check_length(place)
        names[rendition.name] = place
    return names


def _relative(key: str, prefix: Location) -> str:
    return key[prefix.key.rfind("/") + 1 :]


def _check_length(place: Location) -> None:
    if len(place.key.encode()) > MAX_KEY_BYTES:
        raise OutputError(
            f"{place} would be longer than S3's {MAX_KEY_BYTES} bytes: choose a shorter destination prefix.",
            code="name_too_long",
        )


def record_location(destination: str, job: str, name: str) -> Location:
    """Where a job's own file `name` stands."""
    to = destination_prefix(destination)
    return Location(to.bucket, f"{to.key}{RECORDS}/{job}/{name}")


def preview_location(destination: str, job: str, source: Location) -> Location:
    """Where the preview of one image stands, for a review of `job`."""
    return record_location(destination, job, f"review/{source_digest(source)}.json")


def source_digest(source: Location) -> str:
    """Metadata holds ASCII only, a key may hold anything: an output names its source by this SHA-256."""
    return hashlib.sha256(str(source).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Account:
    """A store, and as whom it is used. `endpoint`: empty for AWS. `credentials`: access key, secret key and region;
    None: those of `profile`, or as boto3 finds them. `settings`: which variables say so."""

    endpoint: str
    credentials: tuple[str, str, str] | None = None
    profile: str = ""
    settings: tuple[str, str] = ("CUTFLEET_S3_ENDPOINT", "AWS_ACCESS_KEY_ID")

    @property
    def name(self) -> str:
        return self.endpoint or "AWS S3"

    def connect(self, connections: int) -> S3Client:
        """Raises `SettingsError` for a profile or endpoint that is none."""
        import boto3
        from botocore.config import Config

        config = Config(
            max_pool_connections=connections,
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": 3},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # A body is not signed: its SHA-256 costs 6.6 ms of a 12-megapixel image. TLS protects it where there is
            # TLS; without it nothing that we read is protected either. Names, conditions and metadata are signed.
            s3={"addressing_style": "path" if self.endpoint else "auto", "payload_signing_enabled": False},
        )
        key, secret, region = self.credentials or (None, None, None)
        try:
            session = boto3.session.Session(key, secret, None, region, profile_name=self.profile or None)
            client = session.client("s3", endpoint_url=self.endpoint or None, config=config)
            client.meta.events.register_last("before-call.s3.PutObject", _send_at_once)
        except Exception as exc:
            raise map_s3_error(exc, self, Location("", ""), role="output") from exc
        return client


class Store:
    """Sources and results, for threads to share: one boto3 client for both, or each its own. A role says which of them,
    and whose fault an error is."""

    bounds = ANYWHERE

    def __init__(
        self,
        endpoint: str,
        *,
        connections: int,
        credentials: tuple[str, str, str] | None = None,
        source: Account | None = None,
        bounds: Bounds = ANYWHERE,
    ) -> None:
        """`endpoint`, `credentials`: see `Account`. `connections`: at least the number of threads that use this store.
        `source`: where the sources are, when they are elsewhere. `bounds`: outside them nothing is asked for."""
        self.heard: Callable[[CutfleetError | None], None] = lambda _: None
        results = Account(endpoint, credentials)
        self.name = results.name
        self.bounds = bounds
        self._accounts: dict[Role, Account] = {"output": results, "source": source or results}
        self._s3 = results.connect(connections)
        self._clients: dict[Role, S3Client] = {
            "output": self._s3,
            "source": source.connect(connections) if source else self._s3,
        }

    @classmethod
    def of(cls, settings: Settings, *, connections: int) -> Store:
        """As the settings say."""
        source = None
        if settings.has_own_source:
            endpoint = settings.source_endpoint or settings.s3_endpoint
            said = ("CUTFLEET_SOURCE_ENDPOINT", "CUTFLEET_SOURCE_PROFILE")
            source = Account("" if endpoint == "aws" else endpoint, profile=settings.source_profile, settings=said)
        return cls(settings.s3_endpoint, connections=connections, source=source, bounds=settings.bounds)

    @property
    def is_one(self) -> bool:
        """Whether sources and results are in one store, of one account."""
        return self._accounts["source"] is self._accounts["output"]

    def check(self, place: Location, role: Role) -> None:
        """Raises `SourceError` or `OutputError` for a place outside the bounds. Every request asks this first; who has
        work to do before the first one asks it himself."""
        if role == "source" and not is_within(str(place), self.bounds.sources):
            raise SourceError(_outside(place, "CUTFLEET_SOURCES"), code="source_not_allowed")
        if role == "output" and not is_within(str(place), self.bounds.destinations):
            raise OutputError(_outside(place, "CUTFLEET_DESTINATIONS"), code="output_not_allowed")

    def list_source(self, prefix: Location, *, after: str = "") -> Iterator[S3Object]:
        """Objects under `prefix`, folder markers left out; only keys behind `after`. AWS lists in key order; not every
        store does (SeaweedFS goes folder by folder)."""
        for objects, _ in self.list_pages(prefix, role="source", after=after):
            yield from objects

    def list_pages(
        self, prefix: Location, *, role: Role, delimiter: str = "", after: str = ""
    ) -> Iterator[tuple[list[S3Object], list[str]]]:
        """Page by page: objects, folder markers left out, and with a delimiter the prefixes that hold others."""
        more = {name: value for name, value in (("Delimiter", delimiter), ("StartAfter", after)) if value}
        arguments: dict[str, Any] = {"Bucket": prefix.bucket, "Prefix": prefix.key, **more}
        arguments |= {"OptionalObjectAttributes": ["RestoreStatus"], "PaginationConfig": {"PageSize": PAGE_KEYS}}
        pages = iter(self._clients[role].get_paginator("list_objects_v2").paginate(**arguments))
        while (page := self._guard(lambda: next(pages, None), prefix, role)) is not None:
            objects = [_listed(found) for found in page.get("Contents", []) if not found["Key"].endswith("/")]
            yield objects, [found["Prefix"] for found in page.get("CommonPrefixes", [])]

    def head(self, location: Location, *, role: Role) -> S3Object | None:
        """None when there is no such object."""
        try:
            found = self._guard(
                lambda: self._clients[role].head_object(Bucket=location.bucket, Key=location.key), location, role
            )
        except ImageError as exc:
            if exc.code in ("source_missing", "output_missing"):
                return None
            self._tell_refusal(location, role)
            raise
        return S3Object(location.key, found["ETag"].strip('"'), found["ContentLength"], found["Metadata"])

    def get(self, location: Location, *, role: Role, etag: str = "", max_bytes: int) -> tuple[bytes, str]:
        """Body and ETag. With `etag`, raises `source_changed` when the object is another by now; `too_many_bytes`
        before a longer body is read."""
        arguments: dict[str, Any] = {"Bucket": location.bucket, "Key": location.key}
        if etag:
            arguments["IfMatch"] = f'"{etag}"'
        return self._guard(lambda: self._read(role, arguments, location, max_bytes), location, role)

    def download(self, location: Location, to: Path) -> None:
        """A whole object into a file; it may be larger than memory. A manifest, not an image: it may be anywhere."""
        self._guard(
            lambda: self._clients["source"].download_file(location.bucket, location.key, str(to)),
            location,
            "source",
            bounded=False,
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
        """Returns the ETag. With `conditional`, raises `PreconditionFailed` unless what is there now has the ETag
        `replaces`, or nothing is there and `replaces` is None."""
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
        except OutputError as exc:
            if "IfMatch" in arguments and exc.code == "output_missing":  # AWS's answer; others say 412
                raise PreconditionFailed(f"{location} is there no more.") from exc
            raise
        return str(answer["ETag"]).strip('"')

    def answers(self, prefix: Location, *, role: Role) -> bool:
        """Whether the store is there: it answers a listing of `prefix`, whatever it says."""
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

    def honours_conditions(self, location: Location, body: bytes) -> bool:
        """Writes `location`, then on conditions that do not hold: False when the store took one of them."""
        self.put(location, body, content_type="application/json")
        return all(self._refuses(location, body, replaces) for replaces in (None, _NO_ETAG))

    def _refuses(self, location: Location, body: bytes, replaces: str | None) -> bool:
        try:
            self.put(location, body, content_type="application/json", replaces=replaces, conditional=True)
        except PreconditionFailed:
            return True
        except ServiceUnavailable as exc:
            if exc.code == "store_unsupported":
                return False
            raise
        return False

    def presign(self, location: Location, *, lasts_s: int) -> str:
        """A URL with which anybody may read the object for so long: never to be logged."""
        arguments = {"Bucket": location.bucket, "Key": location.key}
        return self._guard(
            lambda: self._s3.generate_presigned_url("get_object", Params=arguments, ExpiresIn=lasts_s),
            location,
            "output",
        )

    def ping(self) -> None:
        """Raises `ServiceUnavailable` when S3 does not answer; a refusal is an answer."""
        place = Location("cutfleet-ready", "ready")
        with contextlib.suppress(ImageError):
            self._guard(
                lambda: self._s3.head_object(Bucket=place.bucket, Key=place.key), place, "output", bounded=False
            )

    def create_bucket(self, bucket: str) -> None:
        """For the local stack and for tests; one of ours that is there already is fine."""
        try:
            self._guard(lambda: self._s3.create_bucket(Bucket=bucket), Location(bucket, ""), "output", bounded=False)
        except OutputError as exc:
            if exc.code != "bucket_exists":
                raise

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell_refusal(self, location: Location, role: Role) -> None:
        """A HEAD's answer has no body, so that bad credentials look like a refused object: a GET's answer says which.
        Raises `ServiceUnavailable` when it is not the object."""
        arguments: dict[str, Any] = {"Bucket": location.bucket, "Key": location.key, "Range": "bytes=0-0"}
        with contextlib.suppress(ImageError):
            self._guard(lambda: self._read(role, arguments, location, 1), location, role)

    def _read(self, role: Role, arguments: dict[str, Any], location: Location, max_bytes: int) -> tuple[bytes, str]:
        answer = self._clients[role].get_object(**arguments)
        with answer["Body"] as body:
            if answer["ContentLength"] > max_bytes:
                raise ImageError(
                    f"{location} has {answer['ContentLength'] / 1e6:.1f} MB, the limit is {max_bytes / 1e6:g} MB "
                    "(CUTFLEET_MAX_BYTES_MB).",
                    code="too_many_bytes",
                )
            return body.read(), answer["ETag"].strip('"')

    def _guard(self, call: Callable[[], T], location: Location, role: Role, *, bounded: bool = True) -> T:
        if bounded:
            self.check(location, role)
        error: CutfleetError | None = None
        try:
            return call()
        except CutfleetError:
            raise
        except Exception as exc:
            error = map_s3_error(exc, self._accounts[role], location, role=role)
            raise error from exc
        finally:
            self.heard(error)


def _outside(place: Location, variable: str) -> str:
    return f"{place} is under no entry of {variable}: choose another place, or add it there for every process."


def _listed(found: ObjectTypeDef) -> S3Object:
    """An archived object that was restored can be read until its copy expires."""
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


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """A body as the bytes it is, up to `ASK_FIRST_BYTES`: botocore wraps it in a file, sends that in pieces of 16 kB,
    and only after it asked the store whether to (`Expect: 100-continue`), a round trip for each put. Its handler that
    asks runs after this one and leaves bytes alone."""
    body = params["body"]
    if isinstance(body, io.BytesIO) and body.getbuffer().nbytes <= ASK_FIRST_BYTES:
        params["body"] = body.getvalue()


def map_s3_error(exc: Exception, account: Account, location: Location, *, role: Role) -> CutfleetError:
    """What botocore raised, as ours. Anything that is not botocore's or urllib3's is a bug and comes back unmapped."""
    from botocore import exceptions as botocore

    store, (endpoint, keys) = account.name, account.settings
    if isinstance(exc, botocore.ClientError):
        return _map_answer(exc.response, account, location, role)
    if isinstance(exc, (botocore.NoCredentialsError, botocore.PartialCredentialsError, botocore.TokenRetrievalError)):
        return ServiceUnavailable(
            f"No S3 credentials: {exc}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role.",
            code="store_denied",
        )
    if isinstance(exc, botocore.ParamValidationError):
        return SettingsError(f"S3 does not take this name: {' '.join(str(exc).split())}")
    if isinstance(exc, (botocore.NoRegionError, botocore.ProfileNotFound, botocore.InvalidRegionError, ValueError)):
        return SettingsError(f"S3 settings: {exc}. Check AWS_REGION, AWS_PROFILE, {keys} and {endpoint}.")
    if isinstance(exc, (botocore.ConnectionError, botocore.HTTPClientError, botocore.IncompleteReadError, OSError)):
        return ServiceUnavailable(
            f"S3 at {store} can't be reached: {exc}. Check {endpoint} and the network.",
            code="store_unreachable",
        )
    if isinstance(exc, botocore.BotoCoreError):
        return ServiceUnavailable(f"S3 at {store} failed for {location}: {exc}", code="store_failed")
    raise exc


def _map_answer(answer: Any, account: Account, location: Location, role: Role) -> CutfleetError:
    store = account.name
    error = answer.get("Error", {})
    code = str(error.get("Code", ""))
    text = f"{code} {error.get('Message', '')}".strip()
    owner: type[ImageError] = SourceError if role == "source" else OutputError
    if code in _CHANGED:
        if role == "source":
            return SourceError(f"{location} was replaced since it was listed: submit it again.", code="source_changed")
        return PreconditionFailed(f"{location} is not what it was: {text}")
    if code == "NoSuchBucket":
        return owner(
            f"There is no bucket {location.bucket!r} at {store}: create it, or correct its name.", code="bucket_missing"
        )
    if code == "BucketAlreadyOwnedByYou":
        return OutputError(f"Bucket {location.bucket!r} is there already.", code="bucket_exists")
    if code in _MISSING:
        return owner(f"{location} is not there.", code=f"{role}_missing")
    if code == "InvalidStorageClass" or code.startswith("KMS."):
        return owner(
            f"S3 does not write {location} as the recipe's delivery says ({text}): correct its storage_class or "
            "kms_key.",
            code=f"{role}_denied",
        )
    if code in _DENIED:
        rights = (
            "s3:GetObject and s3:ListBucket" if role == "source" else "s3:GetObject, s3:PutObject and s3:ListBucket"
        )
        return owner(f"S3 refuses {location} ({text}): our credentials need {rights} there.", code=f"{role}_denied")
    if code == "KeyTooLongError":
        return owner(
            f"{location} is longer than S3's {MAX_KEY_BYTES} bytes: choose a shorter prefix.", code="name_too_long"
        )
    if code in ("InvalidObjectState", "ObjectArchived"):
        return SourceError(f"{location} is archived: restore it first, then submit it again.", code="source_archived")
    if code in _BAD_KEYS:
        return ServiceUnavailable(
            f"S3 at {store} refuses our credentials: {text.rstrip('.')}. Check {account.settings[1]} and the clock.",
            code="store_denied",
        )
    if code in _BUSY or str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", "")) in _BUSY:
        return TransientError(f"S3 at {store} is busy ({text}) for {location}.", code="store_busy")
    if code in _UNSUPPORTED:
        return ServiceUnavailable(f"S3 at {store} does not offer what we need: {text}", code="store_unsupported")
    return ServiceUnavailable(f"S3 at {store} answered {text} for {location}.", code="store_failed")
