"""`cutfleet review`: selection, previews made by a worker, the page, and a new job for the rejected images."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from jobs.errors import JobError
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.preview import Preview
from jobs.recipe import Recipe
from jobs.results import Failure
from jobs.s3.client import Store
from jobs.s3.names import preview_path
from producer.demo.local_stack import LocalStack
from producer.records.image_status import find_image_status
from producer.review.select import Selection, write_review
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.support.environment import Run
from tests.support.images import decode_image, put_images, sample_image
from tests.support.places import Places, delete_object, fetch_output
from tests.support.waiting import wait_until

EVERYTHING_FLAGGED = "[review]\nmax_subject = 0.0\n"
WIDTHS = "images => images.map(image => image.naturalWidth)"
NAMES = ["<img onerror>.jpg", 'it\'s "7" & more.jpg', "日本語.jpg"]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "flags.toml").write_text(EVERYTHING_FLAGGED)
    return str(tmp_path / "flags.toml")


class Reviews:
    """Submits and reviews jobs in this process. `submitted`: the jobs that make previews."""

    def __init__(self, store: Store, ledger: Ledger, places: Places, folder: Path) -> None:
        self.store, self.ledger, self.places, self.folder = store, ledger, places, folder
        self.submitted: list[Job] = []

    def submit(self, *, model: str = "u2netp", keys: tuple[str, ...] | None = None) -> Job:
        request = Request(
            source=self.places.source_location,
            destination=self.places.destination,
            recipe=Recipe(model=model),
            lane="live" if keys else "backfill",
            name="reviewed",
            keys=keys,
        )
        return submit(request, store=self.store, ledger=self.ledger, lease_s=60, listed=lambda _: None)

    def run(self) -> Job:
        """Submit everything under the source and wait until the job is closed."""
        job = self.submit()
        wait_until(lambda: self.ledger.jobs.get(job.id).closed is not None, what=f"{job.id} is closed")
        return self.ledger.jobs.get(job.id)

    def review(
        self, job: Job, *, flagged: bool = False, failed: bool = False, sample: int = 0
    ) -> list[dict[str, object]]:
        """Return the rows of the page, worst first."""
        page = write_review(
            job,
            Selection(flagged, failed, sample),
            self.folder,
            store=self.store,
            ledger=self.ledger,
            lease_s=60,
            on_submitted=self.submitted.append,
        )
        return list(json.loads(page.read_text().split('id="rows">')[1].split("</script>")[0]))

    def preview(self, job: Job, name: str) -> Preview:
        return Preview.from_json(
            fetch_output(self.store, preview_path(self.places.destination, job.id, self.places.key(name)))
        )


@pytest.fixture
def reviews(store: Store, ledger: Ledger, places: Places, tmp_path: Path) -> Reviews:
    return Reviews(store, ledger, places, tmp_path)


def unpack(preview: Preview, name: str) -> Image.Image:
    return decode_image(base64.b64decode(preview.images[name]))


def test_images_rejected_on_the_page_become_a_new_job_for_another_model(
    fleet: LocalStack,
    cutfleet: Run,
    store: Store,
    ledger: Ledger,
    places: Places,
    recipe: str,
    browser: Browser,
    tmp_path: Path,
) -> None:
    etags = {name: store.put(places.key(name), sample_image(), content_type="image/jpeg") for name in NAMES}
    store.put(places.key("page.jpg"), b"<html>", content_type="text/html")
    job = cutfleet("submit", places.source, "--to", places.to, "--recipe", recipe, "--wait").stdout.strip()

    ran = cutfleet("review", job, "--out", str(tmp_path / "looks"))

    assert ran.returncode == 0, ran.stderr
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(Path(ran.stdout.strip()).as_uri())
    keys = page.eval_on_selector_all(".tile", "tiles => tiles.map(tile => tile.title)")
    assert keys[0] == "page.jpg" and set(keys[1:]) == set(NAMES)
    assert "not_an_image" in str(page.text_content("#why"))
    for key in keys[1:]:
        page.keyboard.press("ArrowRight")
        assert page.text_content("#key") == key and "full" in str(page.text_content("#why"))
        wait_until(lambda: all(page.eval_on_selector_all(".lens img", WIDTHS)), what="its images are drawn")
    page.keyboard.press("r")
    page.fill("#search", "onerror")
    page.click("#reject")
    with page.expect_download() as saved:
        page.click("#save-rejected")
    command = str(page.text_content("#command"))
    saved.value.save_as(tmp_path / saved.value.suggested_filename)
    context.close()
    rejected = {keys[-1], "<img onerror>.jpg"}
    words = shlex.split(command.replace("OTHER", "u2net").replace(" --recipe FILE", ""))
    again = cutfleet(*words[1:-3], str(tmp_path / words[-3]), *words[-2:])
    assert again.returncode == 0, again.stderr
    made = ledger.jobs.get(again.stdout.strip())
    cutfleet("cancel", made.id)
    assert (made.total, made.model) == (len(rejected), "u2net")
    assert (made.source, made.destination) == (places.source_location, places.destination)
    lines = [json.loads(line) for line in (tmp_path / words[-3]).read_text().splitlines()]
    assert {line["key"]: line["etag"] for line in lines} == {name: etags[name] for name in rejected}


def test_a_preview_shows_the_stored_cutout(fleet: LocalStack, reviews: Reviews, store: Store, places: Places) -> None:
    store.put(places.key("big.jpg"), sample_image(size=(1600, 1200)), content_type="image/jpeg")
    job = reviews.run()

    reviews.review(job, sample=1)

    shown = reviews.preview(job, "big.jpg")
    cutout = np.asarray(decode_image(fetch_output(store, places.cutout("big.jpg"))))
    source = np.asarray(decode_image(fetch_output(store, places.key("big.jpg"))))
    assert (shown.width, shown.height, shown.model, shown.job) == (1600, 1200, "u2netp", job.id)
    assert unpack(shown, "before").size == unpack(shown, "after").size == (640, 480)
    assert unpack(shown, "thumb").size == (160, 120)
    assert shown.edge is not None
    left, top, width, height = shown.edge
    part = np.s_[top : top + height, left : left + width]
    edge = np.asarray(unpack(shown, "edge_after").convert("RGBA"))
    assert edge.shape == (360, 360, 4)
    assert np.array_equal(edge[..., 3], cutout[part][..., 3]), "alpha is exact"
    soft = (cutout[part][..., 3] > 12) & (cutout[part][..., 3] < 243)
    assert soft.any(), "it is an edge"
    before = np.asarray(unpack(shown, "edge_before").convert("RGB")).astype(int)
    assert np.abs(before - source[part]).mean() < 8, "noise compresses badly"
    whole = np.asarray(unpack(shown, "after").convert("RGBA"))[..., 3].astype(int)
    small = np.asarray(Image.fromarray(cutout[..., 3]).resize((640, 480), Image.Resampling.BOX)).astype(int)
    assert np.abs(whole - small).mean() < 2


def test_the_page_has_only_the_selected_images(
    fleet: LocalStack, reviews: Reviews, store: Store, places: Places
) -> None:
    put_images(store, places, 12)
    store.put(places.key("page.jpg"), b"<html>", content_type="text/html")
    job = reviews.run()

    first, second = ([row["key"] for row in reviews.review(job, failed=True, sample=5)] for _ in range(2))

    assert first[0] == "page.jpg"
    assert len(set(first)) == 6
    assert first == second, "the sample is the same each time"
    with pytest.raises(JobError, match="no image of this selection"):
        reviews.review(job, flagged=True)


def test_previews_of_changed_or_missing_objects_say_so_and_show_the_rest(
    fleet: LocalStack, reviews: Reviews, store: Store, places: Places
) -> None:
    put_images(store, places, 3)
    job = reviews.run()
    store.put(places.key("p00000.jpg"), sample_image(seed=9), content_type="image/jpeg")
    delete_object(store, places.cutout("p00001.jpg"))

    reviews.review(job, sample=3)

    replaced, gone, fine = (reviews.preview(job, f"p0000{number}.jpg") for number in range(3))
    assert set(replaced.images) == {"thumb", "after", "edge_after"} and "[source_changed]" in replaced.notes[0]
    assert set(gone.images) == {"thumb", "before"}
    assert len(fine.images) == 5 and not fine.notes


def test_a_review_changes_no_output_and_no_image_status(
    fleet: LocalStack, reviews: Reviews, store: Store, ledger: Ledger, places: Places
) -> None:
    (name,) = put_images(store, places, 1)
    job = reviews.run()
    before = store.head(places.cutout(name), role="output")

    reviews.review(job, sample=1)

    (made,) = reviews.submitted
    status = find_image_status(places.key(name), ledger=ledger, store=store)
    assert (made.review_of, made.model) == (job.id, "render")
    assert (status.job, status.state) == (job.id, "done")
    assert store.head(places.cutout(name), role="output") == before
    assert reviews.run().skipped == 1


def test_no_preview_is_made_of_an_image_that_crashed_workers(
    reviews: Reviews, store: Store, ledger: Ledger, places: Places
) -> None:
    (name,) = put_images(store, places, 1)
    job = reviews.submit(model="u2net", keys=(name,))  # a model that no worker serves
    claim = ledger.window.claim(f"{job.id}:0", token="t", output=str(places.cutout(name)), lease_s=60)
    ledger.window.finish(
        claim, ImageState.FAILED, Failure(name, "crashed_decoder", "The decoder crashed.", 1, 0.0, "cpu")
    )

    (row,) = reviews.review(ledger.jobs.get(job.id), failed=True)

    assert not reviews.submitted
    assert (row["key"], row["code"]) == (name, "crashed_decoder")
    assert "crashed workers" in str(row["notes"])
