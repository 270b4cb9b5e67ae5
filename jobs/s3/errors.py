"""Maps what botocore raises to our errors. The same S3 answer means another error for a source than for an output. What
follows from an error is decided by `workers/tasks/task.py` and `workers/tasks/retry.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jobs.errors import (
    BucketExists,
    CutfleetError,
    OutputError,
    OutputNotFound,
    PreconditionFailed,
    SettingsError,
    SourceError,
    SourceNotFound,
    StoreBusy,
    StoreUnavailable,
    StoreUnsupported,
)
from jobs.s3.location import MAX_KEY_BYTES, Location

Role = Literal["source", "output"]

_RIGHTS = {"source": "s3:GetObject and s3:ListBucket", "output": "s3:GetObject, s3:PutObject and s3:ListBucket"}
_Classes = Mapping[Role, type[CutfleetError]]
_BY_ROLE: _Classes = {"source": SourceError, "output": OutputError}
_MISSING: _Classes = {"source": SourceNotFound, "output": OutputNotFound}

_Row = tuple[str, type[CutfleetError] | _Classes, str, str]
_CHANGED: _Row = ("", SourceError, "source_changed", "{location} was replaced since it was listed: submit it again.")
_FAILED: _Row = ("", StoreUnavailable, "store_failed", "S3 at {store} answered {text} for {location}.")
_TABLE: tuple[_Row, ...] = (
    ("PreconditionFailed 412", PreconditionFailed, "precondition_failed", "{location} has another version: {text}"),
    (
        "NoSuchBucket",
        _BY_ROLE,
        "bucket_missing",
        "There is no bucket {location.bucket!r} at {store}: create it, or correct its name.",
    ),
    ("BucketAlreadyOwnedByYou", BucketExists, "bucket_exists", "Bucket {location.bucket!r} exists already."),
    ("NoSuchKey 404 NotFound NoSuchVersion", _MISSING, "{role}_missing", "{location} does not exist."),
    (
        "InvalidStorageClass KMS",
        _BY_ROLE,
        "{role}_denied",
        "S3 does not write {location} with the recipe's delivery ({text}): correct its storage_class or kms_key.",
    ),
    (
        "AccessDenied 403 Forbidden AllAccessDisabled AccountProblem",
        _BY_ROLE,
        "{role}_denied",
        "S3 refuses {location} ({text}): our credentials need {rights} there.",
    ),
    (
        "KeyTooLongError",
        _BY_ROLE,
        "name_too_long",
        f"{{location}} is longer than S3's {MAX_KEY_BYTES} bytes: choose a shorter prefix.",
    ),
    (
        "InvalidObjectState ObjectArchived",
        SourceError,
        "source_archived",
        "{location} is archived: restore it first, then submit it again.",
    ),
    (
        "InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken TokenRefreshRequired RequestTimeTooSkewed "
        "AuthorizationHeaderMalformed",
        StoreUnavailable,
        "store_denied",
        "S3 at {store} refuses our credentials: {text}. Check {credentials} and the clock.",
    ),
    (
        "SlowDown ServiceUnavailable InternalError RequestTimeout Throttling ThrottlingException RequestLimitExceeded "
        "OperationAborted ConditionalRequestConflict 409 500 502 503 504",
        StoreBusy,
        "store_busy",
        "S3 at {store} is busy ({text}) for {location}.",
    ),
    ("NotImplemented 501", StoreUnsupported, "store_unsupported", "S3 at {store} lacks a feature that we need: {text}"),
)
"""S3's error codes (a HEAD's is its status), our class or one for each role, our code, the message."""
_BY_CODE = {code: row for row in _TABLE for code in row[0].split()}
_RETRIED_STATUSES = ("409", "500", "502", "503", "504")
"""Worth a retry even with an error code that we do not know."""


def map_s3_error(
    exc: Exception, location: Location, *, role: Role, store: str, settings: tuple[str, str]
) -> CutfleetError:
    """Return our error for `exc`. Raises `exc` itself when it is neither botocore's nor an I/O error: a bug. `store`:
    its name; `settings`: the variables of its endpoint and credentials."""
    from botocore import exceptions as botocore

    endpoint, credentials = settings
    if isinstance(exc, botocore.ClientError):
        return _map_answer(exc.response, store, credentials, location, role)
    if isinstance(exc, (botocore.NoCredentialsError, botocore.PartialCredentialsError, botocore.TokenRetrievalError)):
        return StoreUnavailable(
            f"No S3 credentials: {exc}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role.",
            code="store_denied",
        )
    if isinstance(exc, botocore.ParamValidationError):
        return SettingsError(f"S3 does not take this name: {' '.join(str(exc).split())}")
    if isinstance(exc, (botocore.NoRegionError, botocore.ProfileNotFound, botocore.InvalidRegionError, ValueError)):
        return SettingsError(f"S3 settings: {exc}. Check AWS_REGION, AWS_PROFILE, {credentials} and {endpoint}.")
    if isinstance(exc, (botocore.ConnectionError, botocore.HTTPClientError, botocore.IncompleteReadError, OSError)):
        return StoreUnavailable(
            f"S3 at {store} can't be reached: {exc}. Check {endpoint} and the network.", code="store_unreachable"
        )
    if isinstance(exc, botocore.BotoCoreError):
        return StoreUnavailable(f"S3 at {store} failed for {location}: {exc}", code="store_failed")
    raise exc


def _map_answer(
    response: Mapping[str, Any], store: str, credentials: str, location: Location, role: Role
) -> CutfleetError:
    error = response.get("Error", {})
    code = str(error.get("Code", ""))
    status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    row = _BY_CODE.get("KMS" if code.startswith("KMS.") else code)
    if row is None:
        row = _BY_CODE[status] if status in _RETRIED_STATUSES else _FAILED
    if row[1] is PreconditionFailed and role == "source":
        row = _CHANGED
    _, kind, our_code, message = row
    text = f"{code} {error.get('Message', '')}".strip().rstrip(".")
    fields = {"location": location, "store": store, "text": text, "credentials": credentials, "rights": _RIGHTS[role]}
    make = kind if isinstance(kind, type) else kind[role]
    return make(message.format(**fields), code=our_code.format(role=role))
