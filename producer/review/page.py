"""The review page: one HTML file that holds its images, opens from a disk and asks nobody for anything.

What the images are called and why they are there stands first, worst first; their images come last, a block each, so
that the page can be used while a browser still reads them. Its policy lets no script run but its own.
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.job import Failure, Job
from jobs.preview import Preview
from jobs.recipe import Recipe
from jobs.s3.client import image_names

_WORST_FIRST = ("empty", "full", "uncertain", "cut_off", "pieces", "holes", "rules")
_UNSAFE = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}
"""In a script block nothing of JSON may look like markup."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of the page. `failure`: None where it did not fail."""

    key: str
    failure: Failure | None
    shown: Preview


def write_page(job: Job, rows: Iterable[Row], to: Path, *, of: int) -> int:
    """`of`: how many there were to choose from. Returns how many the page shows. Images pass through a file: thousands
    do not fit memory. A page that is there already is replaced once the new one is whole."""
    unfinished = to.with_name(f"{to.name}.part")
    with tempfile.TemporaryFile() as blocks, unfinished.open("wb") as page:
        told: list[dict[str, Any]] = []
        places: list[tuple[int, int]] = []
        for number, row in enumerate(rows):
            block = _block(number, row).encode()
            places.append((blocks.tell(), len(block)))
            blocks.write(block)
            told.append(_told(job, number, row))
        told.sort(key=_how_bad)
        page.write(_head(job, told, of=of).encode())
        for row_told in told:
            start, size = places[row_told["n"]]
            blocks.seek(start)
            page.write(blocks.read(size))
    unfinished.replace(to)
    return len(told)


def _told(job: Job, number: int, row: Row) -> dict[str, Any]:
    """A row as the page's script reads it; `n` names its block of images."""
    names = image_names(job.source, job.destination, row.key)
    shown, failure = row.shown, row.failure
    has_cutout = "after" in shown.images
    return {
        "n": number,
        "key": row.key,
        "etag": shown.etag,
        "code": failure.code if failure else "",
        "message": failure.message if failure else "",
        "review": shown.review,
        "complaints": shown.complaints,
        "notes": shown.notes,
        "figures": shown.figures,
        "width": shown.width,
        "height": shown.height,
        "edge": shown.edge,
        "model": shown.model,
        "by": shown.job if shown.job != job.id else "",
        "source": str(names.source),
        "cutout": str(names.cutout) if has_cutout else "",
        "mask": str(names.mask) if has_cutout else "",
    }


def _how_bad(told: dict[str, Any]) -> tuple[Any, ...]:
    """Sorts the worst first: failed, then by the worst reason, how many there are, and how uncertain it is."""
    ranks = [_WORST_FIRST.index(reason) for reason in told["review"] if reason in _WORST_FIRST]
    worst = min(ranks, default=len(_WORST_FIRST) - bool(told["complaints"]) + 1)
    uncertain = told["figures"].get("uncertain_share", 0.0)
    return (not told["code"], worst, -len(ranks), -uncertain, told["key"])


def _head(job: Job, told: list[dict[str, Any]], *, of: int) -> str:
    files = importlib.resources.files("producer.review") / "assets"
    style, script = ((files / f"review.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    return string.Template((files / "review.html").read_text("utf-8")).substitute(
        policy=policy,
        title=html.escape(f"Review of {job.name}"),
        style=style,
        script=script,
        job=_json(_told_of_job(job, len(told), of)),
        rows=_json(told),
    )


def _told_of_job(job: Job, count: int, of: int) -> dict[str, str]:
    drawn = f"{count} images" if count == of else f"{count} images, drawn at random of {of}"
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    words = ["cutfleet", "submit", job.source, "--to", job.destination]
    recipe = Recipe.from_json(job.recipe)
    return {
        "id": job.id,
        "name": job.name,
        "line": f"Job {job.id}, model {job.model}: {drawn}, {when} UTC",
        "command": shlex.join(words) + (" --recipe FILE" if recipe != Recipe(model=recipe.model) else ""),
    }


def _block(number: int, row: Row) -> str:
    return f'<script type="application/json" id="i{number}">{_json(row.shown.images)}</script>\n'


def _json(told: object) -> str:
    return json.dumps(told, ensure_ascii=False, separators=(",", ":"), default=list).translate(_UNSAFE)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
