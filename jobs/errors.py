"""Every error of this project, ordered by what happens next. The class decides what the program does; the text tells a
person what to do; the code is for people, who filter and alert on it.

CutfleetError
├── SettingsError          the command or the process exits with 2: a person changes a setting
│   ├── ModelError             the model is unavailable: unknown, licence not stated, files missing, keys that differ
│   └── JobError               no such job, a destination that can't be used, a job in the wrong state
├── ServiceUnavailable     a command exits with 4, a worker retries: a service is unreachable or refuses access
│   ├── RedisUnavailable
│   │   └── RedisFull              Redis takes no write that needs memory; what frees memory still works
│   └── StoreUnavailable
│       └── StoreUnsupported       the store lacks a feature, such as conditional writes
├── ImageError             one image; no retry can help: it becomes `failed` with this code
│   ├── ContentError           the bytes: not an image, truncated, too many pixels ...
│   ├── SourceError            the source object: missing, denied, changed since it was listed
│   ├── OutputError            the destination: its name belongs to another source, denied, no bucket
│   └── NotFound               mixed into SourceNotFound and OutputNotFound
├── TransientError         one image; retried with backoff, then `failed` with this code
│   ├── StoreBusy              S3 throttles or answers 5xx after the client's own retries
│   └── OutOfMemory            the device's memory does not hold the batch
└── DeviceLost             the device or its thread is gone: the process exits, its supervisor starts another

A code never changes once released: ledgers and reports keep it.
"""

from __future__ import annotations


class CutfleetError(Exception):
    """Base of all our errors. `code` is stable; the text names the value, the limit and the setting to change."""

    code = "internal"
    retry = False

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class SettingsError(CutfleetError):
    code = "settings"


class ModelError(SettingsError):
    """Codes: model_unknown, model_missing, model_offline, model_mismatch, licence_not_stated, remote_code_refused,
    unsafe_weights, no_gpu, gpu_taken, node_taken, patch_order_unknown, revision_unclear."""

    code = "model_unknown"


class JobError(SettingsError):
    """Codes: job_unknown, job_closed, job_cancelled, job_busy, job_watched, other_source, record_missing,
    nothing_to_render, nothing_to_review."""

    code = "job_unknown"


class JobClosed(JobError):
    code = "job_closed"


class ServiceUnavailable(CutfleetError):
    """Codes of SQS: queue_unreachable, queue_denied, queue_failed; of a local stack: local_stack."""

    code = "service_unavailable"
    retry = True


class RedisUnavailable(ServiceUnavailable):
    """Codes: redis_unreachable, redis_denied, redis_full, redis_cannot_save, redis_failed."""

    code = "redis_failed"


class RedisFull(RedisUnavailable):
    code = "redis_full"


class StoreUnavailable(ServiceUnavailable):
    """Codes: store_unreachable, store_denied, store_unsupported, store_failed."""

    code = "store_failed"


class StoreUnsupported(StoreUnavailable):
    code = "store_unsupported"


class ImageError(CutfleetError):
    code = "image"


class ContentError(ImageError):
    """Codes: not_an_image, unsupported_format, truncated, damaged, too_many_pixels, too_many_bytes, animated,
    too_small, mask_not_finite; of a suspect in isolation: crashed_decoder, crashed_device, crashed_worker,
    memory_exhausted, stalled, killed."""

    code = "not_an_image"


class SourceError(ImageError):
    """Codes: source_missing, source_denied, source_not_allowed, source_changed, source_archived, name_too_long."""

    code = "source_missing"


class OutputError(ImageError):
    """Codes: name_taken, name_too_long, name_unmatched, output_missing, output_denied, output_not_allowed,
    bucket_missing, bucket_exists, manifest_damaged."""

    code = "output_denied"


class NotFound(ImageError):
    """There is no such object."""


class SourceNotFound(SourceError, NotFound):
    code = "source_missing"


class OutputNotFound(OutputError, NotFound):
    code = "output_missing"


class BucketExists(OutputError):
    code = "bucket_exists"


class PreconditionFailed(CutfleetError):
    """A conditional write found another version of the object, or one where none was expected."""

    code = "precondition_failed"


class TransientError(CutfleetError):
    """Codes: store_busy, output_conflict, out_of_memory, internal."""

    code = "internal"
    retry = True


class StoreBusy(TransientError):
    code = "store_busy"


class OutOfMemory(TransientError):
    """The device's memory does not hold the batch; the model is still usable."""

    code = "out_of_memory"


class DeviceLost(CutfleetError):
    """`on_device`: the image was in the batch that the device failed with."""

    code = "device_lost"
    retry = True

    def __init__(self, message: str, *, on_device: bool = False) -> None:
        super().__init__(message)
        self.on_device = on_device


class ImageFailed(Exception):
    """Raised by the task after the ledger holds the failure, only so that Flower shows the image as failed."""
