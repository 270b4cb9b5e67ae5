"""Compares the outputs of a job's images with their states, one part of the manifest at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor

from jobs.errors import OutputError
from jobs.job import ImageState, Job
from jobs.message import ImageTask
from jobs.s3.client import S3Object
from jobs.s3.location import Location
from jobs.s3.names import ImagePaths, source_digest
from producer.audit.rebuild import AuditedJob, reopen, restore
from producer.records.destination_index import DestinationIndex

CLOCK_SKEW_S = 300.0
"""Allowed difference between the clocks of S3 and Redis."""


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """`key`: of the image or object, if it is about one. `repaired`: what the repair did; empty: nothing."""

    code: str
    what: str
    key: str = ""
    repaired: str = ""


@dataclasses.dataclass(frozen=True)
class _Image:
    """`state_before`, `state`: before the destination was listed, and after. `cutout`, `mask`: as they were listed."""

    task: ImageTask
    paths: ImagePaths
    state_before: ImageState
    state: ImageState
    cutout: S3Object | None
    mask: S3Object | None


class OutputAudit:
    """`pool` runs the requests for single objects."""

    def __init__(
        self, audited: AuditedJob, index: DestinationIndex, pool: Executor, *, repair: bool, deep: bool
    ) -> None:
        self._audited = audited
        self._job = audited.job
        self._store = audited.store
        self._index = index
        self._pool = pool
        self._repair = repair
        self._deep = deep

    def check(
        self, tasks: Sequence[ImageTask], states_before: Iterable[ImageState], states: Iterable[ImageState]
    ) -> Iterator[Disagreement]:
        """Check the images of one part."""
        images = self._find_outputs(tasks, states_before, states)
        yield from self._check_done([i for i in images if i.state_before.has_outputs and i.state.has_outputs])
        if self._audited.in_ledger or self._audited.is_lost:  # else the job is closed and its report is complete
            yield from self._check_open([i for i in images if i.state is ImageState.OPEN], tasks)
        yield from self._check_cancelled([i for i in images if i.state_before is ImageState.CANCELLED])

    def _find_outputs(
        self, tasks: Sequence[ImageTask], states_before: Iterable[ImageState], states: Iterable[ImageState]
    ) -> list[_Image]:
        objects = self._index.find(output_keys(self._job, tasks))
        images = []
        for task, before, state in zip(tasks, states_before, states, strict=True):
            paths = self._job.paths(task.key)
            cutout, mask = objects.get(paths.cutout.key), objects.get(paths.mask.key)
            images.append(_Image(task, paths, before, state, cutout, mask))
        return images

    def _check_done(self, images: Sequence[_Image]) -> Iterator[Disagreement]:
        """Find missing and wrong outputs."""
        listed = [(image, _find_listed_fault(image)) for image in images]
        faults = [(image, *fault) for image, fault in listed if fault]
        doubtful = [image for image, fault in listed if not fault and self._is_doubtful(image)]
        results = zip(doubtful, self._pool.map(self._find_replaced, doubtful), strict=True)
        faults += [(image, "output_wrong", text) for image, text in results if text]
        is_repaired = self._repair and self._make_again([image for image, _, _ in faults])
        for image, code, text in faults:
            yield Disagreement(code, text, image.task.key, "made again" if is_repaired else "")

    def _is_doubtful(self, image: _Image) -> bool:
        """A worker writes the mask first: a mask written after its cutout was replaced."""
        return self._deep or bool(image.mask and image.cutout and image.mask.modified > image.cutout.modified)

    def _find_replaced(self, image: _Image) -> str:
        """Return how the outputs differ from what a worker wrote for this image; empty: they do not."""
        cutout = self._store.head(image.paths.cutout, role="output")
        mask = self._store.head(image.paths.mask, role="output")
        if cutout is None or mask is None:
            return "cutout or mask was deleted just now"
        if cutout.metadata.get("cf-source") != source_digest(image.paths.source):
            return "the cutout was not made from this image"
        return "" if cutout.metadata.get("cf-mask-etag") == mask.etag else "the mask does not belong to the cutout"

    def _make_again(self, images: Sequence[_Image]) -> bool:
        """Reopen images. Return False when none can be."""
        if not images or self._job.cancelled:
            return False
        for image in images:
            for location in (image.paths.mask, image.paths.cutout):
                self._take_over(location, image.paths.source)
        return reopen(self._audited, [image.task.index for image in images])

    def _take_over(self, location: Location, source: Location) -> None:
        """Replace an object that names no source by an empty one that names ours: else a worker would not overwrite
        it."""
        existing = self._store.head(location, role="output")
        if existing is None or "cf-source" in existing.metadata:
            return
        self._store.put(
            location,
            b"",
            content_type="application/octet-stream",
            metadata={"cf-source": source_digest(source)},
            replaces=existing.etag,
            conditional=self._job.conditional,
        )

    def _check_open(self, images: Sequence[_Image], part: Sequence[ImageTask]) -> Iterator[Disagreement]:
        """Find outputs of this job that the ledger does not record. `part`: all images of the part."""
        candidates = self._find_candidates(images, part)
        results = zip(candidates, self._pool.map(self._find_made_state, candidates), strict=True)
        made = [(image, state) for image, state in results if state is not None]
        if self._repair:
            restore(self._audited, {image.task.index: state for image, state in made})
        for image, _ in made:
            yield Disagreement("not_recorded", "its outputs exist", image.task.key, "recorded" if self._repair else "")

    def _find_candidates(self, images: Sequence[_Image], part: Sequence[ImageTask]) -> list[_Image]:
        """Return open images outside the window whose outputs may be of this job."""
        since = self._job.created - CLOCK_SKEW_S
        recent = [image for image in images if image.mask and image.cutout and image.cutout.modified >= since]
        in_window = self._audited.find_in_window([image.task.id for image in recent])
        candidates = [image for image in recent if image.task.id not in in_window]
        if not candidates:
            return []
        # again, after the window: an image that became final meanwhile has left it too
        states = zip(part, self._audited.states(part), strict=True)
        still_open = {task.index for task, state in states if state is ImageState.OPEN}
        return [image for image in candidates if image.task.index in still_open]

    def _find_made_state(self, image: _Image) -> ImageState | None:
        """Return the state of an image with outputs of this job, made from the source version that it was to take; None
        for other outputs."""
        cutout = self._store.head(image.paths.cutout, role="output")
        if cutout is None or image.mask is None:
            return None
        expected = {
            "cf-job": self._job.id,
            "cf-mask-etag": image.mask.etag,
            "cf-source": source_digest(image.paths.source),
        }
        if image.task.etag:
            expected["cf-source-etag"] = image.task.etag
        if any(cutout.metadata.get(name) != value for name, value in expected.items()):
            return None
        return ImageState.REVIEW if cutout.metadata.get("cf-review") else ImageState.DONE

    def _check_cancelled(self, images: Sequence[_Image]) -> Iterator[Disagreement]:
        """Find what this job left of cancelled images; a former job may have made outputs of them too."""
        since = self._job.created - CLOCK_SKEW_S
        candidates = [
            (image, location)
            for image in images
            for location, listed in ((image.paths.mask, image.mask), (image.paths.cutout, image.cutout))
            if listed is not None and listed.modified >= since
        ]
        are_ours = self._pool.map(lambda candidate: self._is_of_this_job(candidate[1]), candidates)
        for (image, location), is_ours in zip(candidates, are_ours, strict=True):
            if is_ours:
                yield Disagreement("cancelled_left", f"{location}, of a cancelled image", image.task.key)

    def _is_of_this_job(self, location: Location) -> bool:
        existing = self._store.head(location, role="output")
        return existing is not None and existing.metadata.get("cf-job") == self._job.id


def output_keys(job: Job, tasks: Iterable[ImageTask]) -> Iterator[str]:
    """Yield the keys of all objects that `job` may write for these images."""
    for task in tasks:
        paths = job.paths(task.key)
        yield paths.cutout.key
        yield paths.mask.key
        try:
            renditions = job.rendition_paths(task.key)
        except OutputError:
            continue
        yield from (location.key for location in renditions.values())


def _find_listed_fault(image: _Image) -> tuple[str, str] | None:
    """Return code and text of a fault that the listing shows."""
    if image.cutout is None or image.mask is None:
        missing = "cutout" if image.mask else "mask" if image.cutout else "cutout, no mask"
        return "output_missing", f"no {missing}"
    if not image.cutout.size or not image.mask.size:
        return "output_wrong", "cutout or mask is empty"
    return None
