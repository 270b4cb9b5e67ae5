"""Puts the results of one image into S3 so that nobody ever sees half of them, and nothing newer is overwritten.

Renditions go first, then the mask, then the cutout, whose metadata names the ETags of the others: a reader who sees the
cutout has all. Each is written on a condition: nothing there, or still what was there at the claim.

Object metadata (ASCII, below 2 KB): cf-source (SHA-256 of the source's s3:// name), cf-source-etag, cf-fingerprint,
cf-model, cf-revision, cf-licence, cf-job; on the cutout also cf-mask-etag, cf-renditions (ETags in the recipe's order,
empty where there is no subject), cf-quality (JSON) and cf-review (reasons); on a rendition with rules cf-rules (JSON:
rule -> verdict, value).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping

from jobs.errors import OutputError, TransientError
from jobs.job import ImageState, Remark
from jobs.recipe import Delivery, Recipe
from jobs.s3.client import Location, Names, PreconditionFailed, S3Object, Store, source_digest
from workers.imaging.pipeline import Outputs
from workers.imaging.renditions import Encoded

Outcome = tuple[ImageState, Remark | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an output comes from; source ETag and fingerprint decide whether it must be made again."""

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
        """What a PNG says of itself. Not the job: the same source and recipe give the same bytes."""
        return {
            "Software": "Cutfleet",
            "Model": self.model,
            "Revision": self.revision,
            "Recipe": self.fingerprint,
            "Source-ETag": self.source_etag,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Where the results of one image go. `renditions`: by name, in the recipe's order."""

    names: Names
    renditions: Mapping[str, Location]
    recipe: Recipe
    conditional: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Existing:
    """What was there at the claim; renditions by name."""

    cutout: S3Object | None
    renditions: Mapping[str, S3Object]

    def remark(self, key: str) -> Remark:
        """What there was to say when it was made; of renditions' rules without the limits."""
        told = self.cutout.metadata if self.cutout else {}
        rules = {
            name: tuple((rule, *found, "") for rule, found in json.loads(rendition.metadata["cf-rules"]).items())
            for name, rendition in self.renditions.items()
            if "cf-rules" in rendition.metadata
        }
        return Remark(key, tuple(told.get("cf-review", "").split()), json.loads(told.get("cf-quality", "{}")), rules)

    def outcome(self, job: str, key: str) -> Outcome:
        """Of what is complete: skipped, unless this job made it and it is not recorded any more."""
        if self.cutout is None or self.cutout.metadata.get("cf-job") != job:
            return ImageState.SKIPPED, None
        return outcome_of(self.remark(key))


NOTHING = Existing(cutout=None, renditions={})


def outcome_of(remark: Remark) -> Outcome:
    return (ImageState.REVIEW if remark.review else ImageState.DONE), remark


def find_existing(target: Target, store: Store) -> Existing:
    """Raises `OutputError` `name_taken` when something there is another source's, or not ours at all. Renditions are
    asked for only where they may be there: beside a cutout, or where two sources could have one name.
    """
    cutout = _head_ours(target.names.cutout, target, store)
    renditions: dict[str, S3Object] = {}
    for rendition in target.recipe.renditions:
        if cutout is not None or "{path}" not in rendition.path:
            found = _head_ours(target.renditions[rendition.name], target, store)
            renditions |= {rendition.name: found} if found is not None else {}
    return Existing(cutout=cutout, renditions=renditions)


def is_complete(existing: Existing, provenance: Provenance, target: Target, store: Store) -> bool:
    """Whether S3 already holds what this recipe makes of this version of the source: cutout, mask and renditions."""
    if existing.cutout is None:
        return False
    told, wanted = existing.cutout.metadata, provenance.to_metadata()
    if any(told.get(name) != wanted[name] for name in ("cf-source-etag", "cf-fingerprint")):
        return False
    made = told.get("cf-renditions", "").split()
    there = [existing.renditions[name].etag for name in target.renditions if name in existing.renditions]
    if made and made != there:
        return False
    mask = store.head(target.names.mask, role="output")
    return mask is not None and mask.etag == told.get("cf-mask-etag")


def publish(
    outputs: Outputs,
    target: Target,
    provenance: Provenance,
    *,
    store: Store,
    existing: Existing,
    is_ours: Callable[[], bool],
) -> None:
    """Safe to repeat. `is_ours`: asks the ledger whether the claim still holds.

    Raises `TransientError` `output_conflict` when somebody else has written meanwhile, `OutputError` `name_taken`.
    """
    metadata = provenance.to_metadata()
    writer = _Writer(target, store, is_ours)
    etags = []
    for rendition in target.recipe.renditions:
        made = outputs.renditions.get(rendition.name)
        if made is not None:
            place = target.renditions[rendition.name]
            piece = _Piece(place, made.body, made.content_type, metadata | _rules(made), rendition.delivery)
            there = existing.renditions.get(rendition.name)
            etags.append(writer.put_beside(piece, there.etag if there else None))
    mask_etag = existing.cutout.metadata.get("cf-mask-etag") if existing.cutout else None
    if outputs.mask:
        mask = _Piece(target.names.mask, outputs.mask, outputs.mask_type, metadata, target.recipe.mask)
        mask_etag = writer.put_beside(mask, mask_etag)
    metadata = metadata | {
        "cf-mask-etag": mask_etag or "",
        "cf-quality": _compact(outputs.quality),
        "cf-review": " ".join(outputs.review),
    }
    if target.recipe.renditions:
        metadata["cf-renditions"] = " ".join(etags)
    cutout = _Piece(target.names.cutout, outputs.cutout, outputs.cutout_type, metadata, target.recipe.cutout)
    if existing.cutout is not None and not is_ours():  # the same bytes have the same ETag, which fences nobody off
        raise writer.conflict()
    writer.put_last(cutout, existing.cutout.etag if existing.cutout else None)


@dataclasses.dataclass(frozen=True)
class _Piece:
    place: Location
    body: bytes
    content_type: str
    metadata: Mapping[str, str]
    delivery: Delivery


@dataclasses.dataclass(frozen=True)
class _Writer:
    target: Target
    store: Store
    is_ours: Callable[[], bool]

    def put_beside(self, piece: _Piece, replaces: str | None) -> str:
        """What the cutout will name. Returns its ETag."""
        try:
            return self._put(piece, replaces, self.target.conditional)
        except PreconditionFailed:
            return self._replace_orphan(piece)

    def put_last(self, piece: _Piece, replaces: str | None) -> None:
        try:
            self._put(piece, replaces, self.target.conditional)
        except PreconditionFailed as exc:
            current = self.store.head(piece.place, role="output")
            if current is None or any(current.metadata.get(name) != value for name, value in piece.metadata.items()):
                raise self.conflict() from exc
            # Our own write, whose answer was lost.

    def _replace_orphan(self, piece: _Piece) -> str:
        """Something stands there that no cutout names: of a worker that died before its cutout, unless our claim has
        ended."""
        orphan = _head_ours(piece.place, self.target, self.store)
        if not self.is_ours():
            raise self.conflict()
        try:
            return self._put(piece, orphan.etag if orphan else None, True)
        except PreconditionFailed as exc:
            raise self.conflict() from exc

    def _put(self, piece: _Piece, replaces: str | None, conditional: bool) -> str:
        return self.store.put(
            piece.place,
            piece.body,
            content_type=piece.content_type,
            metadata=piece.metadata,
            delivery=piece.delivery,
            replaces=replaces,
            conditional=conditional,
        )

    def conflict(self) -> TransientError:
        return TransientError(
            f"{self.target.names.cutout} was written by somebody else meanwhile.", code="output_conflict"
        )


def _head_ours(place: Location, target: Target, store: Store) -> S3Object | None:
    found = store.head(place, role="output")
    if found is not None and found.metadata.get("cf-source") != source_digest(target.names.source):
        raise OutputError(
            f"{place} is there already and was not made from {target.names.source}: choose another destination or "
            "path, or move it away.",
            code="name_taken",
        )
    return found


def _rules(made: Encoded) -> dict[str, str]:
    rules = {check.name: [check.verdict, check.value] for check in made.checks}
    return {"cf-rules": _compact(rules)} if rules else {}


def _compact(told: Mapping[str, object]) -> str:
    return json.dumps(told, separators=(",", ":"))
