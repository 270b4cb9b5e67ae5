"""Recipes as text: what is accepted, what is refused, and what changes the fingerprint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jobs.errors import OutputError, SettingsError
from jobs.recipe import Recipe, Rendition, Rules, load_recipe, recipe_names, recipe_text


def parsed(text: str, folder: Path) -> Recipe:
    file = folder / "shop.toml"
    file.write_text(text, "utf-8")
    return load_recipe(str(file))


def fingerprint_parts(recipe: Recipe, *, revision: str = "r1") -> list[str]:
    return recipe.fingerprint(model_revision=revision, input_size=(320, 320)).split("-")


@pytest.mark.parametrize("name", recipe_names())
def test_every_built_in_recipe_loads_and_survives_json(name: str) -> None:
    recipe = load_recipe(name)

    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe_text(name).startswith("#")


def test_marketplace_recipes_name_their_sources() -> None:
    for name in ("amazon-main", "google-shopping", "ebay", "shopify", "walmart"):
        (rendition,) = load_recipe(name).renditions
        assert rendition.rules is not None and rendition.rules.source


def test_an_old_recipe_with_fewer_fields_is_still_read() -> None:
    assert Recipe.from_json('{"model":"u2netp","edges":"off","alpha":"keep","animation":"first"}').alpha == "keep"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="amazon-main"):
        load_recipe("amzon-main")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        load_recipe("nowhere.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edges = ", "not valid TOML"),
        ('edge = "off"', "edge"),
        ('edges = "soft"', "edges"),
        ('[[renditions]]\nname = "A B"', r"renditions\.0\.name"),
        ('[[renditions]]\nname = "a"\nbackground = "white"', "background"),
        ('[[renditions]]\nname = "a"\nbackground = "transparent"', "no transparency"),
        ('[[renditions]]\nname = "a"\nlossless = true', "lossless is for webp"),
        ('[[renditions]]\nname = "a"\nfill = 1.5', "fill"),
        ('[[renditions]]\nname = "a"\nmin_px = 900\nmax_px = 800', "above max_px"),
        ('[[renditions]]\nname = "a"\npath = "a/{path}.png"', "must end with .jpg or .jpeg"),
        ('[[renditions]]\nname = "a"\npath = "a/one.jpg"', "same for every image"),
        ('[[renditions]]\nname = "a"\npath = "cutouts/{path}.jpg"', "must be relative"),
        ('[[renditions]]\nname = "a"\npath = "../{path}.jpg"', "must be relative"),
        ('[[renditions]]\nname = "a"\npath = "{sku}.jpg"', "sku"),
        ('key_pattern = "("\n[[renditions]]\nname = "a"', "no regular expression"),
        ('[[renditions]]\nname = "a"\n[[renditions]]\nname = "a"', "same names"),
        (
            '[[renditions]]\nname = "a"\npath = "{stem}.jpg"\n[[renditions]]\nname = "b"\npath = "{stem}.{ext}"',
            "'a' and 'b' would have the same names",
        ),
    ],
)
def test_an_invalid_recipe_is_refused_with_the_field(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        parsed(text, tmp_path)


def test_all_invalid_fields_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"edges.*alpha"):
        parsed('edges = "soft"\nalpha = "no"', tmp_path)


def test_names_come_from_the_key_and_its_groups() -> None:
    recipe = Recipe(
        key_pattern=r"(?P<sku>\d+)_(?P<variant>[A-Z0-9]+)\.",
        renditions=(
            Rendition(name="amazon-main", path="{sku}.{variant}.jpg"),
            Rendition(name="web", format="webp", path="{rendition}/{stem}.{ext}"),
            Rendition(name="plain"),
        ),
    )

    names = [recipe.rendition_path(rendition, "shoes/4711_MAIN.tif") for rendition in recipe.renditions]

    assert names == ["4711.MAIN.jpg", "web/shoes/4711_MAIN.webp", "plain/shoes/4711_MAIN.tif.jpg"]


def test_a_key_that_does_not_match_the_pattern_is_an_error() -> None:
    recipe = Recipe(key_pattern=r"(?P<sku>\d+)_", renditions=(Rendition(name="a", path="{sku}.jpg"),))

    with pytest.raises(OutputError) as caught:
        recipe.rendition_path(recipe.renditions[0], "shoes/photo.jpg")

    assert caught.value.code == "name_unmatched"


def test_the_fingerprint_has_a_model_part_and_a_rendition_part() -> None:
    plain = Recipe()
    shop = dataclasses.replace(plain, renditions=(Rendition(name="a"),))

    assert (
        fingerprint_parts(plain)[0] == fingerprint_parts(shop)[0]
        and fingerprint_parts(plain)[1] != fingerprint_parts(shop)[1]
    )
    assert fingerprint_parts(plain)[0] != fingerprint_parts(plain, revision="r2")[0]
    assert fingerprint_parts(plain)[0] != fingerprint_parts(dataclasses.replace(plain, alpha="keep"))[0]
    assert fingerprint_parts(plain)[1] != fingerprint_parts(dataclasses.replace(plain, edges="off"))[1]


def test_a_change_without_effect_on_pixels_keeps_the_fingerprint() -> None:
    plain = Recipe(renditions=(Rendition(name="a"),))
    decorated = load_recipe_with_headers()

    assert fingerprint_parts(plain) == fingerprint_parts(decorated)


def load_recipe_with_headers() -> Recipe:
    recipe = Recipe.from_json(
        '{"cutout":{"cache_control":"max-age=60","kms_key":"alias/k"},"review":{"max_pieces":1},'
        '"renditions":[{"name":"a","path":"x/{path}.jpg","delivery":{"storage_class":"STANDARD_IA"}}]}'
    )
    (rendition,) = recipe.renditions
    return dataclasses.replace(recipe, renditions=(dataclasses.replace(rendition, rules=Rules(min_px=9)),))
