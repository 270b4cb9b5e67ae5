"""Everything that can go wrong, ordered by what happens next. The task decides by `retry`; people decide by the text.

CutfleetError
├── SettingsError        the command or the process ends (exit 2): a person changes a setting
│   ├── ModelError           the model can't be had: unknown, licence not stated, files missing, keys that do not fit
│   └── JobError             no such job, a destination that can't be used, a job in the wrong state
├── ServiceUnavailable   the command ends (exit 4), a worker tries again: Redis or S3 can't be reached or refuses us
├── ImageError           one image; no retry can help: it becomes `failed` with this code
│   ├── ContentError         what the bytes are: not an image, truncated, too many pixels ...
│   ├── SourceError          the S3 object: missing, denied, changed since it was listed
│   └── OutputError          the destination: its name belongs to another source, denied, no bucket
├── TransientError       one image; tried again later with backoff, then `failed` with this code
└── DeviceLost           the device or its thread is gone: the process ends, its supervisor starts another

A code never changes once released: it is kept in ledgers and reports, and people write rules on it.
"""

from __future__ import annotations


class CutfleetError(Exception):
    """Base of all our errors. `code` is stable; the text says the value, the limit and the setting to change."""

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
    code = "job_unknown"


class ServiceUnavailable(CutfleetError):
    """Codes: redis_unreachable, redis_denied, redis_full, redis_cannot_save, redis_failed, store_unreachable,
    store_denied, store_busy, store_unsupported, store_failed."""

    code = "service_unavailable"
    retry = True


class ImageError(CutfleetError):
    code = "image"


class ContentError(ImageError):
    """Codes: not_an_image, unsupported_format, truncated, damaged, too_many_pixels, too_many_bytes, animated,
    too_small, mask_not_finite; of a suspect, which is worked on alone (`workers/process/isolation.py`): crashed_decoder,
    crashed_device, crashed_worker, memory_exhausted, stalled, killed."""

    code = "not_an_image"


class SourceError(ImageError):
    """Codes: source_missing, source_denied, source_not_allowed, source_changed, source_archived, name_too_long."""

    code = "source_missing"


class OutputError(ImageError):
    """Codes: name_taken, name_too_long, name_unmatched, output_denied, output_not_allowed, bucket_missing."""

    code = "output_denied"


class TransientError(CutfleetError):
    """Codes: store_busy, store_timeout, output_conflict, out_of_memory, internal."""

    code = "store_busy"
    retry = True


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
    """Raised by the task after the failure is in the ledger, only so that Flower shows the image as failed."""
