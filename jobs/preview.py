"""Preview of one image for the review page: a worker writes it, `cutfleet review` reads it.

In S3: `TO/_cutfleet/JOB/review/DIGEST.json`, one for each image, overwritten by every review of JOB. DIGEST is the
SHA-256 of the source's s3:// name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """`etag`: version of the source that the cutout was made from. `width`, `height`, `model`, `job`: of the cutout.
    `complaints`: rules that failed. `notes`: why a part is missing. `edge`: left, top, width and height of the worst
    edge, in pixels. `images`: WebP in base64, each optional: `thumb` (the source, faded where it was removed), `after`
    (the cutout, reduced), `before` (the source, reduced), `edge_after`, `edge_before` (the worst edge at full size).
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
        """Ignore fields of a later version."""
        fields: dict[str, Any] = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in names})
