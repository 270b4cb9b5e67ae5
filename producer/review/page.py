"""The review page: one HTML file that contains its images, opens from a disk and needs no network.

The rows come first in the file, worst first; their images come last, in a block for each row, so that the page is
usable while a browser still reads them. Its Content-Security-Policy allows no script but its own.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import shlex
import string
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.job import Job
from jobs.preview import Preview
from jobs.recipe import Recipe
from jobs.results import Failure

_WORST_FIRST = ("empty", "full", "uncertain", "cut_off", "pieces", "holes", "rules")
_ESCAPES = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}
"""JSON in a script block must not contain markup."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of the page. `failure`: None if it did not fail."""

    key: str
    failure: Failure | None
    preview: Preview


def write_page(job: Job, rows: Iterable[Row], to: Path, *, available: int) -> int:
    """Write the page; return its number of images. `available`: how many there were to choose from. Images pass through
    a temporary file: thousands do not fit in memory. An existing page is replaced once the new one is complete."""
    unfinished = to.with_name(f"{to.name}.part")
    with tempfile.TemporaryFile() as blocks, unfinished.open("wb") as page:
        row_fields: list[dict[str, Any]] = []
        extents: list[tuple[int, int]] = []
        for number, row in enumerate(rows):
            images = _json(row.preview.images)
            block = f'<script type="application/json" id="i{number}">{images}</script>\n'.encode()
            extents.append((blocks.tell(), len(block)))
            blocks.write(block)
            row_fields.append(_row_fields(job, number, row))
        row_fields.sort(key=_worst_first)
        page.write(_head(job, row_fields, available=available).encode())
        for fields in row_fields:
            start, size = extents[fields["n"]]
            blocks.seek(start)
            page.write(blocks.read(size))
    unfinished.replace(to)
    return len(row_fields)


def _row_fields(job: Job, number: int, row: Row) -> dict[str, Any]:
    """Return a row as the page's script reads it; `n` identifies its block of images."""
    paths = job.paths(row.key)
    preview, failure = row.preview, row.failure
    has_cutout = "after" in preview.images
    copied = ("etag", "review", "complaints", "notes", "figures", "width", "height", "edge", "model")
    return {name: getattr(preview, name) for name in copied} | {
        "n": number,
        "key": row.key,
        "code": failure.code if failure else "",
        "message": failure.message if failure else "",
        "by": preview.job if preview.job != job.id else "",
        "source": str(paths.source),
        "cutout": str(paths.cutout) if has_cutout else "",
        "mask": str(paths.mask) if has_cutout else "",
    }


def _worst_first(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key: failed images, then by the worst reason, the number of reasons, and the uncertain share."""
    ranks = [_WORST_FIRST.index(reason) for reason in fields["review"] if reason in _WORST_FIRST]
    worst = min(ranks, default=len(_WORST_FIRST) - bool(fields["complaints"]) + 1)
    uncertain = fields["figures"].get("uncertain_share", 0.0)
    return (not fields["code"], worst, -len(ranks), -uncertain, fields["key"])


def _head(job: Job, row_fields: Sequence[Mapping[str, Any]], *, available: int) -> str:
    files = importlib.resources.files("producer.review") / "assets"
    style, script = ((files / f"review.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; img-src data:; style-src {_csp_hash(style)}; script-src {_csp_hash(script)}"
    return string.Template((files / "review.html").read_text("utf-8")).substitute(
        policy=policy,
        title=html.escape(f"Review of {job.name}"),
        style=style,
        script=script,
        job=_json(_job_fields(job, len(row_fields), available)),
        rows=_json(row_fields),
    )


def _job_fields(job: Job, count: int, available: int) -> dict[str, str]:
    shown = f"{count} images" if count == available else f"{count} images, a random sample of {available}"
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    words = ["cutfleet", "submit", str(job.source), "--to", str(job.destination)]
    has_own_recipe = job.recipe != Recipe(model=job.recipe.model)
    return {
        "id": job.id,
        "name": job.name,
        "line": f"Job {job.id}, model {job.model}: {shown}, {when} UTC",
        "command": shlex.join(words) + (" --recipe FILE" if has_own_recipe else ""),
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=list).translate(_ESCAPES)


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
