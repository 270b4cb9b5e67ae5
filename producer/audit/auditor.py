"""Whether S3, the manifest and the ledger agree about a job: the proof that nothing is lost, doubled or silent.

The destination is listed once; an image that is done must have its mask and cutout there. Only where the listing gives
a reason, a mask written after its cutout, or when `deep`, is a cutout asked (one HEAD) whether it was made from its
source and which mask belongs to it: a file that was replaced has another ETag than the one written there. Pixels are
not decoded.

  code             what disagrees                                                  what repair does
  job_lost         Redis does not know the job, and it was not closed              rebuilds it from S3
  rows_missing     the ledger has fewer images than the manifest                   adds them
  not_recorded     results of this job that the ledger does not know of            records them
  output_missing   no cutout or no mask of an image that is done                  has it made again
  output_wrong     a cutout or mask that is empty, or not the one made for it      has it made again
  books_wrong      counts that do not follow from the states, claims left over     counts anew, takes them away
  manifest_lost    a part of the manifest is not in S3                             nothing
  listing_unknown  the job was being listed, or fed by a watch: what else it had   nothing
  extra_object     an object that no image of a job explains                     nothing: it may be somebody's
  cancelled_left   what a worker that died left of an image of a cancelled job    nothing: delete it, or submit again

Whatever a worker holds is left to it. Safe to repeat, and to run beside everything else.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from jobs.errors import JobError, OutputError
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.message import ImageTask
from jobs.recipe import Recipe
from jobs.s3.client import (
    Location,
    Names,
    S3Object,
    Store,
    image_names,
    record_location,
    rendition_names,
    source_digest,
)
from producer.audit.rebuild import Books
from producer.records.destination_index import Destination, listed

_HAVE_RESULTS = (ImageState.DONE, ImageState.REVIEW, ImageState.SKIPPED)
_ASKING = 16
_CLOCKS_S = 300.0
"""How far the clocks of S3 and Redis may be apart."""


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """`key`: of the image or object, where it is about one. `repaired`: what was done about it; empty: nothing."""

    code: str
    what: str
    key: str = ""
    repaired: str = ""


@dataclasses.dataclass(frozen=True)
class _Image:
    """`was`, `state`: before the destination was listed, and now. `cutout`, `mask`: as they were listed."""

    task: ImageTask
    names: Names
    was: ImageState
    state: ImageState
    cutout: S3Object | None
    mask: S3Object | None


def audit(
    what: str, *, repair: bool, deep: bool, ledger: Ledger, store: Store, seen: Callable[[int], None]
) -> Iterator[Disagreement]:
    """`what`: a job's id, or its folder s3://BUCKET/TO/_cutfleet/JOB/. `seen` is told how many images were looked at.
    Raises `JobError` when there is no such job."""
    books = Books(_folder(what, ledger), ledger=ledger, store=store)
    yield from _audit_books(books, repair=repair)
    if books.job.review_of:
        books.finish(repair=repair)
        return  # it makes previews, no results
    began = time.time()
    before = books.states_before()
    with listed(Location.parse(books.job.destination), store) as destination, ThreadPoolExecutor(_ASKING) as askers:
        auditor = _Auditor(books, destination, askers, store, repair=repair, deep=deep)
        for tasks in books.tasks():
            first, end = tasks[0].index, tasks[-1].index + 1
            was = [ImageState(state) for state in before[first:end].ljust(len(tasks), b"\0")]
            yield from auditor.look(tasks, was, books.states(tasks))
            seen(end)
        books.finish(repair=repair)
        yield from _extras(books, destination, before=began, store=store)


def _folder(what: str, ledger: Ledger) -> Location:
    if what.startswith("s3://"):
        return Location.parse(what)
    job = ledger.find_job(what)
    if job is None:
        raise JobError(
            f"There is no job {what!r} on {ledger.name}. If Redis was lost, say where the job stands in S3: "
            f"cutfleet audit s3://BUCKET/TO/_cutfleet/{what}/ --repair"
        )
    return record_location(job.destination, job.id, "")


def _audit_books(books: Books, *, repair: bool) -> Iterator[Disagreement]:
    for number in books.lost_parts():
        yield Disagreement("manifest_lost", f"Part {number} of the manifest is not in S3.")
    if books.is_lost:
        if repair:
            books.rebuild()
        yield Disagreement(
            "job_lost", "Redis does not know the job, or not all of it.", repaired="rebuilt" if repair else ""
        )
        if books.record.total is None and not books.job.to_be_listed:
            yield Disagreement("listing_unknown", books.how_to_go_on())
    elif missing := books.missing_rows():
        if repair:
            books.add_rows()
        yield Disagreement("rows_missing", missing, repaired="added" if repair else "")
    if books.in_ledger:
        found = books.check(repair=repair)
        for name, (kept, is_now) in found.counts.items():
            said = f"{name}: {kept}, should be {is_now}"
            yield Disagreement("books_wrong", said, repaired="corrected" if repair else "")
        for image in found.left:
            said = f"{image} is final, and has a message or a claim"
            yield Disagreement("books_wrong", said, repaired="taken away" if repair else "")


class _Auditor:
    def __init__(
        self,
        books: Books,
        destination: Destination,
        askers: ThreadPoolExecutor,
        store: Store,
        *,
        repair: bool,
        deep: bool,
    ) -> None:
        self._books = books
        self._job = books.job
        self._recipe = Recipe.from_json(books.job.recipe)
        self._destination = destination
        self._askers = askers
        self._store = store
        self._repair = repair
        self._deep = deep

    def look(
        self, tasks: list[ImageTask], before: Iterable[ImageState], states: Iterable[ImageState]
    ) -> Iterator[Disagreement]:
        """At the images of one part."""
        names = [image_names(self._job.source, self._job.destination, task.key) for task in tasks]
        found = self._destination.find(_all_names(self._job, self._recipe, names))
        rows = zip(tasks, names, before, states, strict=True)
        images = [
            _Image(task, name, was, state, found.get(name.cutout.key), found.get(name.mask.key))
            for task, name, was, state in rows
        ]
        final = [image for image in images if image.was in _HAVE_RESULTS and image.state in _HAVE_RESULTS]
        yield from self._look_at_results(final)
        if self._books.in_ledger or self._books.is_lost:  # of one closed and forgotten the report says all there is
            yield from self._look_at_open([image for image in images if image.state is ImageState.OPEN], tasks)
        yield from self._look_at_cancelled([image for image in images if image.was is ImageState.CANCELLED])

    def _look_at_results(self, images: list[_Image]) -> Iterator[Disagreement]:
        wrong: dict[int, tuple[_Image, str, str]] = {}
        asked = []
        for image in images:
            if image.cutout is None or image.mask is None:
                what = "cutout" if image.mask else "mask" if image.cutout else "cutout, no mask"
                wrong[image.task.index] = image, "output_missing", f"no {what}"
            elif not image.cutout.size or not image.mask.size:
                wrong[image.task.index] = image, "output_wrong", "cutout or mask is empty"
            elif self._deep or image.mask.modified > image.cutout.modified:
                asked.append(image)
        for image, fault in zip(asked, self._askers.map(self._fault, asked), strict=True):
            if fault:
                wrong[image.task.index] = image, "output_wrong", fault
        reopened = self._reopen([image for image, _, _ in wrong.values()]) if self._repair else ""
        for image, code, text in wrong.values():
            yield Disagreement(code, text, image.task.key, reopened)

    def _look_at_open(self, images: list[_Image], part: list[ImageTask]) -> Iterator[Disagreement]:
        """Those that nobody works on, and that have results of this job."""
        since = self._job.created - _CLOCKS_S
        there = [image for image in images if image.cutout and image.mask]
        likely = [image for image in there if image.cutout and image.cutout.modified >= since]
        fed = self._books.in_window([image.task.id for image in likely])
        asked = [image for image in likely if image.task.id not in fed]
        if asked:  # what ended since its state was read has left the window too
            states = zip(part, self._books.states(part), strict=True)
            is_open = {task for task, state in states if state is ImageState.OPEN}
            asked = [image for image in asked if image.task in is_open]
        found = zip(asked, self._askers.map(self._state_of_results, asked), strict=True)
        recorded = {image.task.index: (image, state) for image, state in found if state is not None}
        if self._repair:
            self._books.restore({index: state for index, (_, state) in recorded.items()})
        for image, _ in recorded.values():
            done = "recorded" if self._repair else ""
            yield Disagreement("not_recorded", "its results are there", image.task.key, done)

    def _look_at_cancelled(self, images: list[_Image]) -> Iterator[Disagreement]:
        """A mask, or a cutout too, of this job alone: an image may have results of a job before."""
        places = [
            (image, place)
            for image in images
            for place, found in ((image.names.mask, image.mask), (image.names.cutout, image.cutout))
            if found is not None and found.modified >= self._job.created - _CLOCKS_S
        ]
        ours = self._askers.map(lambda left: self._is_of_this_job(left[1]), places)
        for (image, place), is_ours in zip(places, ours, strict=True):
            if is_ours:
                yield Disagreement("cancelled_left", f"{place}, of an image that was cancelled", image.task.key)

    def _is_of_this_job(self, place: Location) -> bool:
        found = self._store.head(place, role="output")
        return found is not None and found.metadata.get("cf-job") == self._job.id

    def _fault(self, image: _Image) -> str:
        cutout = self._store.head(image.names.cutout, role="output")
        mask = self._store.head(image.names.mask, role="output")
        if cutout is None or mask is None:
            return "cutout or mask has just gone"
        if cutout.metadata.get("cf-source") != source_digest(image.names.source):
            return "the cutout was not made from this image"
        return "" if cutout.metadata.get("cf-mask-etag") == mask.etag else "the mask is not the one of its cutout"

    def _state_of_results(self, image: _Image) -> ImageState | None:
        """None unless they are of this job, and of the version that it was to take."""
        cutout = self._store.head(image.names.cutout, role="output")
        if cutout is None or image.mask is None:
            return None
        told = cutout.metadata
        if (told.get("cf-job"), told.get("cf-mask-etag")) != (self._job.id, image.mask.etag):
            return None
        if told.get("cf-source") != source_digest(image.names.source):
            return None
        if image.task.etag and told.get("cf-source-etag") != image.task.etag:
            return None
        return ImageState.REVIEW if told.get("cf-review") else ImageState.DONE

    def _reopen(self, images: list[_Image]) -> str:
        """What a worker would not overwrite, since it does not say whose it is, is first made an empty file of ours."""
        if not images or self._job.cancelled:
            return ""
        for image in images:
            for place in (image.names.mask, image.names.cutout):
                self._take_over(place, image.names)
        return self._books.reopen([image.task.index for image in images])

    def _take_over(self, place: Location, names: Names) -> None:
        found = self._store.head(place, role="output")
        if found is not None and "cf-source" not in found.metadata:
            self._store.put(
                place,
                b"",
                content_type="application/octet-stream",
                metadata={"cf-source": source_digest(names.source)},
                replaces=found.etag,
                conditional=self._job.conditional,
            )


def _all_names(job: Job, recipe: Recipe, names: Iterable[Names]) -> Iterator[str]:
    """Wherever results of these images may stand."""
    for name in names:
        yield name.cutout.key
        yield name.mask.key
        try:
            renditions = rendition_names(recipe, job.source, job.destination, name.source.key)
        except OutputError:
            continue
        yield from (place.key for place in renditions.values())


def _extras(books: Books, destination: Destination, *, before: float, store: Store) -> Iterator[Disagreement]:
    """Other jobs' manifests are read only while something is unexplained."""
    own = record_location(books.job.destination, books.job.id, "")
    for folder in sorted(destination.folders, key=str, reverse=True):
        if folder == own:
            continue
        if next(destination.unexplained(before=before), None) is None:
            return
        _explain(folder, books, destination, store)
    for key in destination.unexplained(before=before):
        yield Disagreement("extra_object", "no job made it", str(Location(own.bucket, key)))


def _explain(folder: Location, books: Books, destination: Destination, store: Store) -> None:
    other = books.of_other(folder)
    recipe = Recipe.from_json(other.job.recipe)
    for tasks in other.tasks():
        names = [image_names(other.job.source, other.job.destination, task.key) for task in tasks]
        destination.find(_all_names(other.job, recipe, names))
