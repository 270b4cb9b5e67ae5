"""Write the results of one image to S3. Readers never see a part of them, and nothing newer is overwritten.

Renditions are written first, then the mask, then the cutout, whose metadata names the ETags of the others: a reader who
sees the cutout can read the rest. Each write is conditional: on no object, or on the one that was there at the claim.

Object metadata (ASCII, below 2 KB): cf-source (SHA-256 of the source's s3:// name), cf-source-etag, cf-fingerprint,
cf-model, cf-revision, cf-licence, cf-job; on the cutout also cf-mask-etag, cf-renditions (ETags in the recipe's order,
empty if there is no subject), cf-quality (JSON) and cf-review (reasons); on a rendition with rules cf-rules (JSON:
rule -> verdict, value).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jobs.errors import OutputError, PreconditionFailed, TransientError
from jobs.job import ImageState, Job
from jobs.recipe import Delivery, Recipe
from jobs.results import ImageNote
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location
from jobs.s3.names import ImagePaths, source_digest
from workers.imaging.pipeline import Outputs
from workers.imaging.renditions import Encoded


class Result(NamedTuple):
    """What an attempt achieved, to be recorded."""

    state: ImageState
    note: ImageNote | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What an output is made from and by. Source ETag and fingerprint decide whether it must be made again. `source`:
    see cf-source; `licence`: of the model."""

    source: str
    source_etag: str
    fingerprint: str
    model: str
    revision: str
    licence: str
    job: str

    def to_metadata(self) -> dict[str, str]:
        return {f"cf-{name.replace('_', '-')}": value for name, value in dataclasses.asdict(self).items()}

    def to_text(self) -> dict[str, str]:
        """Return the text chunks of a PNG. Without the job: the same source and recipe give the same bytes."""
        return {
            "Software": "Cutfleet",
            "Model": self.model,
            "Revision": self.revision,
            "Recipe": self.fingerprint,
            "Source-ETag": self.source_etag,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Where the results of one image go. `renditions`: by name, in the recipe's order. `conditional`: the store
    supports conditional writes."""

    paths: ImagePaths
    renditions: Mapping[str, Location]
    recipe: Recipe
    conditional: bool

    @classmethod
    def of(cls, job: Job, key: str) -> Target:
        """Raises `OutputError`; see `jobs.s3.names.rendition_paths`."""
        return cls(
            paths=job.paths(key),
            renditions=job.rendition_paths(key),
            recipe=job.recipe,
            conditional=job.conditional,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Existing:
    """Outputs that S3 held at the claim; renditions by name."""

    cutout: S3Object | None
    renditions: Mapping[str, S3Object]

    def note(self, key: str) -> ImageNote:
        """Return the note that was made with them; results of rules lack their limits."""
        metadata = self.cutout.metadata if self.cutout else {}
        rules = {
            name: tuple((rule, *result, "") for rule, result in json.loads(rendition.metadata["cf-rules"]).items())
            for name, rendition in self.renditions.items()
            if "cf-rules" in rendition.metadata
        }
        review, figures = metadata.get("cf-review", ""), metadata.get("cf-quality", "{}")
        return ImageNote(key, tuple(review.split()), json.loads(figures), rules)

    def result(self, job_id: str, key: str) -> Result:
        """Return the result if the outputs are complete: skipped, unless this job made them and did not record it."""
        if self.cutout is None or self.cutout.metadata.get("cf-job") != job_id:
            return Result(ImageState.SKIPPED)
        return make_result(self.note(key))


NOTHING = Existing(cutout=None, renditions={})


def make_result(note: ImageNote) -> Result:
    return Result(ImageState.REVIEW if note.review else ImageState.DONE, note)


def find_existing(target: Target, store: Store) -> Existing:
    """Look for the outputs. Looks for a rendition only if there is a cutout, or if two sources can share its name.
    Raises `OutputError` `name_taken` if an object belongs to another source or is not ours."""
    cutout = _head_ours(target.paths.cutout, target, store)
    renditions: dict[str, S3Object] = {}
    for rendition in target.recipe.renditions:
        if cutout is not None or "{path}" not in rendition.path:
            found = _head_ours(target.renditions[rendition.name], target, store)
            renditions |= {rendition.name: found} if found is not None else {}
    return Existing(cutout=cutout, renditions=renditions)


def is_complete(existing: Existing, provenance: Provenance, target: Target, store: Store) -> bool:
    """Whether S3 holds what this recipe makes of this version of the source: cutout, mask and renditions."""
    if existing.cutout is None:
        return False
    metadata, wanted = existing.cutout.metadata, provenance.to_metadata()
    if any(metadata.get(name) != wanted[name] for name in ("cf-source-etag", "cf-fingerprint")):
        return False
    named = metadata.get("cf-renditions", "").split()
    stored = [existing.renditions[name].etag for name in target.renditions if name in existing.renditions]
    if named and named != stored:
        return False
    mask = store.head(target.paths.mask, role="output")
    return mask is not None and mask.etag == metadata.get("cf-mask-etag")


def publish(
    outputs: Outputs,
    target: Target,
    provenance: Provenance,
    *,
    store: Store,
    existing: Existing,
    is_ours: Callable[[], bool],
) -> None:
    """Write renditions, mask and cutout, in this order. Safe to repeat. `is_ours`: whether the ledger still has our
    claim.

    Raises `TransientError` `output_conflict` if another writer was faster, `OutputError` `name_taken`.
    """
    writer = _Writer(target, store, is_ours)
    metadata = provenance.to_metadata()
    rendition_etags = _put_renditions(outputs, writer, metadata, existing)
    mask_etag = _put_mask(outputs, writer, metadata, existing)
    metadata |= {
        "cf-mask-etag": mask_etag or "",
        "cf-quality": _compact(outputs.quality),
        "cf-review": " ".join(outputs.review),
    }
    if target.recipe.renditions:
        metadata["cf-renditions"] = " ".join(rendition_etags)
    cutout = _Upload(target.paths.cutout, outputs.cutout, outputs.cutout_type, metadata, target.recipe.cutout)
    if existing.cutout is not None and not is_ours():  # the same bytes have the same ETag, so If-Match would succeed
        raise writer.conflict()
    writer.put_cutout(cutout, existing.cutout.etag if existing.cutout else None)


def _put_renditions(outputs: Outputs, writer: _Writer, metadata: Mapping[str, str], existing: Existing) -> list[str]:
    """Return the ETags in the recipe's order."""
    etags = []
    for rendition in writer.target.recipe.renditions:
        encoded = outputs.renditions.get(rendition.name)
        if encoded is None:
            continue
        location = writer.target.renditions[rendition.name]
        upload = _Upload(
            location, encoded.body, encoded.content_type, {**metadata, **_rules(encoded)}, rendition.delivery
        )
        stored = existing.renditions.get(rendition.name)
        etags.append(writer.put_named(upload, stored.etag if stored else None))
    return etags


def _put_mask(outputs: Outputs, writer: _Writer, metadata: Mapping[str, str], existing: Existing) -> str | None:
    """Return the ETag of the mask that the cutout will name: the stored one, unless there is a new mask."""
    stored_etag = existing.cutout.metadata.get("cf-mask-etag") if existing.cutout else None
    if not outputs.mask:
        return stored_etag
    target = writer.target
    return writer.put_named(
        _Upload(target.paths.mask, outputs.mask, outputs.mask_type, metadata, target.recipe.mask), stored_etag
    )


@dataclasses.dataclass(frozen=True)
class _Upload:
    location: Location
    body: bytes
    content_type: str
    metadata: Mapping[str, str]
    delivery: Delivery


@dataclasses.dataclass(frozen=True)
class _Writer:
    target: Target
    store: Store
    is_ours: Callable[[], bool]

    def put_named(self, upload: _Upload, replaces: str | None) -> str:
        """Write an object that the cutout names; return its ETag."""
        try:
            return self._put(upload, replaces, conditional=self.target.conditional)
        except PreconditionFailed:
            return self._replace_orphan(upload)

    def put_cutout(self, upload: _Upload, replaces: str | None) -> None:
        try:
            self._put(upload, replaces, conditional=self.target.conditional)
        except PreconditionFailed as exc:
            current = self.store.head(upload.location, role="output")
            if current is None or any(current.metadata.get(name) != value for name, value in upload.metadata.items()):
                raise self.conflict() from exc
            # Else it is our own write, whose response was lost.

    def _replace_orphan(self, upload: _Upload) -> str:
        """Replace an object that no cutout names: its worker died before it wrote the cutout, or our lease is lost."""
        orphan = _head_ours(upload.location, self.target, self.store)
        if not self.is_ours():
            raise self.conflict()
        try:
            return self._put(upload, orphan.etag if orphan else None, conditional=True)
        except PreconditionFailed as exc:
            raise self.conflict() from exc

    def _put(self, upload: _Upload, replaces: str | None, *, conditional: bool) -> str:
        return self.store.put(
            upload.location,
            upload.body,
            content_type=upload.content_type,
            metadata=upload.metadata,
            delivery=upload.delivery,
            replaces=replaces,
            conditional=conditional,
        )

    def conflict(self) -> TransientError:
        return TransientError(
            f"Another process wrote the outputs of {self.target.paths.cutout} meanwhile.", code="output_conflict"
        )


def _head_ours(location: Location, target: Target, store: Store) -> S3Object | None:
    found = store.head(location, role="output")
    if found is not None and found.metadata.get("cf-source") != source_digest(target.paths.source):
        raise OutputError(
            f"{location} exists and was not made from {target.paths.source}: choose another destination or path, or "
            "move the object.",
            code="name_taken",
        )
    return found


def _rules(encoded: Encoded) -> dict[str, str]:
    rules = {check.name: [check.verdict, check.value] for check in encoded.checks}
    return {"cf-rules": _compact(rules)} if rules else {}


def _compact(value: Mapping[str, object]) -> str:
    return json.dumps(value, separators=(",", ":"))
