"""The review page in Chromium, from a file and without a network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page

from jobs.job import Job
from jobs.preview import Preview
from jobs.recipe import Recipe
from jobs.results import Failure
from jobs.s3.location import Location
from producer.review.page import Row, write_page
from tests.support.waiting import wait_until

NASTY = ["<img src=x onerror=document.title='hit'>.jpg", "</script><b>\"'&.jpg", "日本語 ключ\u2028.jpg"]
FIGURES = {"subject_share": 0.3, "uncertain_share": 0.1, "pieces": 1.0, "holes": 0.0, "edge_width_px": 3.0} | {
    f"border_{side}": 0.0 for side in ("top", "right", "bottom", "left")
}
Open = Callable[..., Page]


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "id": "20261124-120000-abcdef",
        "name": "autumn <b>",
        "source": Location("shop", "photos/"),
        "destination": Location("cut outs", "to/"),
        "recipe_json": Recipe().to_json(),
        "model": "u2netp",
        "lane": "backfill",
        "conditional": True,
        "created": 0.0,
    }
    return Job(**fields | changes)


def webp(colour: tuple[int, ...], *, size: tuple[int, int] = (64, 48)) -> str:
    out = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(out, "WEBP", lossless=True)
    return base64.b64encode(out.getvalue()).decode()


RED, CLEAR, GREEN = webp((255, 0, 0)), webp((0, 0, 255, 0)), webp((0, 255, 0))
IMAGES = {"thumb": RED, "before": RED, "after": CLEAR, "edge_before": GREEN, "edge_after": CLEAR}


def row(key: str, *review: str, failure: str = "", **changes: Any) -> Row:
    failed = Failure(key, failure, "It is no image.", 1, 0.0, "cpu") if failure else None
    made = {"etag": "e1", "width": 640, "height": 480, "edge": (100, 50, 64, 48), "figures": FIGURES, "images": IMAGES}
    fields: dict[str, Any] = ({} if failed else made) | {"review": review} | changes
    return Row(key, failed, Preview(**fields))


def rows_of(count: int) -> list[Row]:
    return [row(f"photos/{number:05d}.jpg", "uncertain") for number in range(count)]


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a page of these rows. Fails at the end if the page logged anything or requested anything but itself."""
    contexts: list[BrowserContext] = []
    logged: list[str] = []
    requested: list[str] = []

    def opened(rows: list[Row], *, width: int = 1280, height: int = 800, **changes: Any) -> Page:
        path = tmp_path / "review.html"
        write_page(job(**changes), rows, path, available=len(rows))
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("dialog", lambda dialog: logged.append(dialog.message))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("!document.getElementById('stage').dataset.waits")  # its images are read
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not logged
    outside = {url for url in requested if not url.startswith(("data:", "blob:"))}
    assert outside == {(tmp_path / "review.html").as_uri()}


def keys_shown(page: Page) -> list[str]:
    return list(page.eval_on_selector_all("#tiles .tile", "tiles => tiles.map(tile => tile.title)"))


def pixel(page: Page, selector: str, x: float, y: float) -> tuple[int, ...]:
    """Return the colour on the screen at a share of the element's width and height."""
    box = page.locator(selector).bounding_box()
    assert box is not None
    clip = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"], "width": 1, "height": 1}
    with Image.open(io.BytesIO(page.screenshot(clip=clip))) as shot:  # type: ignore[arg-type]
        return tuple(int(value) for value in np.asarray(shot.convert("RGB"))[0, 0])


def test_keys_are_never_parsed_as_markup(open_page: Open) -> None:
    page = open_page([row(key, "empty", notes=(key,), complaints=(key,)) for key in NASTY], name=NASTY[0])

    for key in NASTY:
        page.fill("#search", key[:9])

        assert page.text_content("#key") == key
        assert page.text_content("#places dd >> nth=0") == f"s3://shop/{key}"
    assert page.text_content("#name") == NASTY[0]
    assert page.locator("b").all_text_contents() == ["0", "0", "empty"], "no key became markup"
    assert page.title() == f"Review of {NASTY[0]}"


def test_the_worst_image_is_first(open_page: Open) -> None:
    surer = FIGURES | {"uncertain_share": 0.01}
    rows = [
        row("fine"),
        row("sure", "uncertain", figures=surer),
        row("pieces", "pieces"),
        row("two", "uncertain", "pieces"),
        row("unsure", "uncertain"),
        row("rules", complaints=("ebay: pixels 300 (warn)",)),
        row("empty", "empty"),
        row("broken", failure="not_an_image"),
    ]

    page = open_page(rows)

    assert keys_shown(page) == ["broken", "empty", "two", "unsure", "sure", "pieces", "rules", "fine"]


def test_the_slider_shows_before_on_the_left_and_after_on_the_right(open_page: Open) -> None:
    page = open_page([row("a.jpg", "uncertain")])
    page.click('[data-ground="black"]')

    halves = pixel(page, "#whole", 0.3, 0.2), pixel(page, "#whole", 0.8, 0.2)
    box = page.locator("#whole").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 30)
    page.mouse.up()

    assert halves == ((255, 0, 0), (0, 0, 0))
    assert pixel(page, "#whole", 0.8, 0.2) == (255, 0, 0)
    assert pixel(page, "#edge", 0.8, 0.2) == (0, 255, 0), "the slider also moves over the worst edge"
    page.keyboard.press("Space")
    assert pixel(page, "#whole", 0.1, 0.2) == (0, 0, 0)
    page.keyboard.press("Space")
    assert pixel(page, "#whole", 0.9, 0.2) == (255, 0, 0)


def test_a_cutout_is_shown_on_four_backgrounds(open_page: Open) -> None:
    page = open_page([row("a.jpg", "uncertain")])
    seen = []

    for _ in range(4):
        seen.append(pixel(page, "#whole", 0.8, 0.2))
        page.keyboard.press("b")
    page.fill("#colour", "#123456")

    assert seen[0] in [(212, 212, 212), (242, 242, 242)]
    assert seen[1:] == [(255, 255, 255), (0, 0, 0), (31, 122, 77)]
    assert pixel(page, "#whole", 0.8, 0.2) == (0x12, 0x34, 0x56)


def test_the_worst_edge_is_shown_at_100_percent_and_larger(open_page: Open) -> None:
    edge = {"edge_before": webp((9, 9, 9), size=(300, 200)), "edge_after": webp((9, 9, 9, 255), size=(300, 200))}
    page = open_page([row("a.jpg", "uncertain", edge=(0, 0, 300, 200), images=IMAGES | edge)])

    def width() -> float:
        return float(page.eval_on_selector("#edge .before", "image => image.getBoundingClientRect().width"))

    assert width() == 300, "a pixel of the image is a pixel of the page"
    for level in (2, 4, 1):
        page.keyboard.press("z")
        assert width() == 300 * level
        assert page.text_content("#zoom") == f"{100 * level} %"


def test_a_failed_image_shows_its_error_and_notes(open_page: Open) -> None:
    notes = ("source: The file is a web page. [not_an_image]",)
    page = open_page([row("a.jpg", failure="not_an_image", notes=notes), row("b.jpg")])

    assert page.text_content("#why") == "not_an_imageIt is no image."
    assert page.text_content("#unseen") == notes[0]
    assert not page.is_visible("#whole") and not page.is_visible("#edge")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#whole") and page.is_visible("#edge")


def test_decisions_are_saved_as_a_manifest_for_submit(open_page: Open) -> None:
    page = open_page(rows_of(4))

    for key in ("r", "a", "r", "r", "u"):
        page.keyboard.press(key)
    with page.expect_download() as rejected:
        page.click("#save-rejected")
    command = page.text_content("#command")
    page.keyboard.press("Escape")
    with page.expect_download() as approved:
        page.click("#save-approved")

    name = "20261124-120000-abcdef-rejected.jsonl"
    assert rejected.value.suggested_filename == name
    lines = [json.loads(line) for line in Path(rejected.value.path()).read_text().splitlines()]
    assert [(line["key"], line["etag"]) for line in lines] == [("photos/00000.jpg", "e1"), ("photos/00002.jpg", "e1")]
    assert [json.loads(line)["key"] for line in Path(approved.value.path()).read_text().splitlines()] == [
        "photos/00001.jpg"
    ]
    assert command == f"cutfleet submit s3://shop/photos/ --to 's3://cut outs/to/' --from {name} --model OTHER"
    assert page.text_content("#progress") == "3 of 4 decided"


def test_decisions_remain_when_the_page_is_reloaded(open_page: Open) -> None:
    page = open_page(rows_of(3))
    page.click("#reject")
    page.click("#approve")

    page.reload()

    assert page.text_content("#progress") == "2 of 3 decided"
    page.select_option("#decided", "rejected")
    assert keys_shown(page) == ["photos/00000.jpg"]
    page.select_option("#decided", "open")
    assert keys_shown(page) == ["photos/00002.jpg"]


def test_images_are_filtered_by_reason_and_key(open_page: Open) -> None:
    page = open_page([row("shoes/1.jpg", "empty"), row("shoes/2.jpg", "cut_off"), row("hats/1.jpg", "cut_off")])

    page.click('[data-reason="cut_off"]')
    cut_off = keys_shown(page)
    page.fill("#search", "SHOES")
    shoes = keys_shown(page)
    page.fill("#search", "trousers")

    assert cut_off == ["hats/1.jpg", "shoes/2.jpg"]
    assert shoes == ["shoes/2.jpg"]
    assert page.is_visible("#nothing") and not page.is_visible("#stage")


def test_only_visible_tiles_of_thousands_are_drawn(open_page: Open) -> None:
    page = open_page(rows_of(2000))
    page.wait_for_selector(".tile img")

    drawn = page.locator(".tile img").count()
    page.eval_on_selector("#tiles", "list => list.scrollTo(0, list.scrollHeight)")
    page.wait_for_selector(".tile[title='photos/01999.jpg'] img")

    assert drawn < 100
    assert page.locator(".tile").count() == 2000
    wait_until(lambda: page.locator(".tile img").count() < 100, what="tiles outside the screen are removed")


@pytest.mark.parametrize("width", [360, 390, 768, 1024, 1280, 1920])
def test_no_element_is_wider_than_the_screen_or_covers_another(open_page: Open, width: int) -> None:
    page = open_page([row("a" * 200 + ".jpg", "empty", "pieces", "rules"), *rows_of(8)], width=width)
    page.wait_for_selector(".tile img")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for one in ("#reject", "#approve", "#next", "#show-help", "#search", "#zoom"):
        page.locator(one).click(trial=True)


def test_each_row_shows_its_own_images(open_page: Open) -> None:
    blue = IMAGES | {"before": webp((0, 0, 255))}
    page = open_page([row("fine.jpg"), row("worst.jpg", "empty", images=blue)])

    assert pixel(page, "#whole", 0.2, 0.2) == (0, 0, 255)
    page.keyboard.press("ArrowRight")
    assert pixel(page, "#whole", 0.2, 0.2) == (255, 0, 0)
