"""Preview: what a person is shown of one image when they review a job. A worker makes it, a page shows it.

In S3: `TO/_cutfleet/JOB/review/DIGEST.json`, one for each image, written again by every review of JOB. DIGEST is the
SHA-256 of the source's s3:// name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """`etag`: of the version of the source that the cutout was made from. `model`, `job`: what made the cutout; `width`
    and `height` are its. `notes`: why something is not to be seen. `edge`: left, top, width and height of the worst
    edge in the image. `images`: WebP as base64, each may be missing: `thumb` (the source, faded where it was
    removed), `after` (the whole cutout, small), `before` (the source like it), `edge_after`, `edge_before` (the worst
    edge at full size).
    """

    etag: str = ""
    width: int = 0
    height: int = 0
    model: str = ""
    job: str = ""
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    review: tuple[str, ...] = ()
    complaints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    edge: tuple[int, int, int, int] | None = None
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Preview:
        """Fields of a later version are left out."""
        told: dict[str, Any] = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in told.items() if name in names})
