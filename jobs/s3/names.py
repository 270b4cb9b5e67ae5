"""Names of the objects of a job, below its destination TO:

TO/cutouts/REL.png, TO/masks/REL.png        outputs; REL is the key after the last `/` of the source prefix
TO/NAME/REL.jpg                             rendition NAME, unless its recipe sets another path
TO/_cutfleet/JOB/job.json                   source, destination, recipe; the rows of a live job
TO/_cutfleet/JOB/manifest/NNNNNN.jsonl.gz   index, key, etag, size; end.json once it is complete
TO/_cutfleet/JOB/report/...                 written when the job closes
TO/_cutfleet/JOB/review/DIGEST.json         preview of one image (`jobs/preview.py`)
"""

from __future__ import annotations

import dataclasses
import hashlib

from jobs.errors import OutputError
from jobs.recipe import OWN_FOLDERS, Recipe
from jobs.s3.location import MAX_KEY_BYTES, Location

RECORDS = "_cutfleet"


@dataclasses.dataclass(frozen=True)
class ImagePaths:
    """Where one image is read, and where its cutout and mask are written."""

    source: Location
    cutout: Location
    mask: Location


def image_paths(source: Location, destination: Location, key: str) -> ImagePaths:
    """`source`: the job's prefix. A name may be too long for S3: `rendition_paths` checks that, because an image must
    be claimed before it can fail."""
    relative = _relative(key, source)
    return ImagePaths(
        source.at(key), destination.below(f"cutouts/{relative}.png"), destination.below(f"masks/{relative}.png")
    )


def rendition_paths(recipe: Recipe, source: Location, destination: Location, key: str) -> dict[str, Location]:
    """Return the location of each rendition of one image by its name, in the recipe's order.

    Raises `OutputError`: `name_too_long` (a rendition or the cutout), `name_unmatched` (the key does not match the
    recipe's `key_pattern`), `name_taken` (one of our own folders, or another rendition of this image).
    """
    _check_length(image_paths(source, destination, key).cutout)
    relative = _relative(key, source)
    paths: dict[str, Location] = {}
    for rendition in recipe.renditions:
        path = recipe.rendition_path(rendition, relative)
        location = destination.below(path)
        if path.startswith(OWN_FOLDERS) or location in paths.values():
            raise OutputError(
                f"Rendition {rendition.name!r} of {key!r} would be {location}, which is taken: change its path.",
                code="name_taken",
            )
        _check_length(location)
        paths[rendition.name] = location
    return paths


def record_path(destination: Location, job_id: str, name: str) -> Location:
    """Location of a job's own file `name`."""
    return destination.below(f"{RECORDS}/{job_id}/{name}")


def preview_path(destination: Location, job_id: str, source: Location) -> Location:
    """Location of the preview of one image for a review of job `job_id`. `source`: of the image."""
    return record_path(destination, job_id, f"review/{source_digest(source)}.json")


def source_digest(source: Location) -> str:
    """SHA-256 of the s3:// name, in hex: object metadata holds ASCII only, a key may hold anything."""
    return hashlib.sha256(str(source).encode()).hexdigest()


def _relative(key: str, source: Location) -> str:
    return key[len(source.folder) :]


def _check_length(location: Location) -> None:
    if location.key_bytes > MAX_KEY_BYTES:
        raise OutputError(
            f"{location} would be longer than S3's {MAX_KEY_BYTES} bytes: choose a shorter destination prefix.",
            code="name_too_long",
        )
