"""Compare models on a folder of images: u2netp, and fake models that are right or wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from jobs.errors import SettingsError
from workers.models import LoadedModel
from workers.tools import compare as comparing
from workers.tools.compare import MEASURES, Result, compare, draw_differences, format_table, measure

SIZE = (32, 32)


def make_model(name: str, forward: Callable[[Tensor], Tensor]) -> LoadedModel:
    return LoadedModel(
        name=name,
        revision="0",
        input_size=SIZE,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        licence="none",
        device=torch.device("cpu"),
        dtype=torch.float32,
        forward=forward,
    )


MODELS = {
    "red": make_model("red", lambda x: (x[:, :1] > 0.5).float()),
    "inverse": make_model("inverse", lambda x: (x[:, :1] <= 0.5).float()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red squares on black with true masks: one in the folder, two in `shoes`."""
    for number, place in enumerate((".", "shoes", "shoes")):
        subject = np.zeros((64, 96), bool)
        subject[16 : 40 + number, 20:60] = True
        (tmp_path / place).mkdir(exist_ok=True)
        rgb = np.where(subject[..., None], (255, 0, 0), (0, 0, 0)).astype(np.uint8)
        Image.fromarray(rgb).save(tmp_path / place / f"{number}.png")
        Image.fromarray((subject * 255).astype(np.uint8)).save(tmp_path / place / f"{number}.mask.png")
    return tmp_path


def run(folder: Path, *models: str) -> tuple[list[Result], list[str]]:
    lines: list[str] = []
    return compare(models, folder, load_model=MODELS.__getitem__, report=lines.append), lines


def test_with_true_masks_the_table_measures_models_overall_and_by_subfolder(folder: Path) -> None:
    results, _ = run(folder, "red", "inverse")

    right, wrong = ([result for result in results if result.model == name] for name in MODELS)
    assert len(right) == len(wrong) == 3
    assert all(result.measures["IoU"] > 0.9 and result.measures["MAE"] < 0.05 for result in right)
    assert all(result.measures["IoU"] < 0.1 and result.measures["MAE"] > 0.9 for result in wrong)
    lines = [line.split() for line in format_table(results, folder).splitlines()[2:]]
    assert [(line[0], line[1], line[2], line[3]) for line in lines] == [
        ("all", "inverse", "3", "3"),
        ("all", "red", "3", "3"),
        ("shoes", "inverse", "2", "2"),
        ("shoes", "red", "2", "2"),
    ]


def test_a_perfect_mask_has_perfect_measures_and_a_faint_one_has_not() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[10:30, 12:28] = 255

    perfect, faint = measure(truth, truth), measure(truth // 4, truth)

    assert perfect["MAE"] == 0
    assert all(perfect[name] == pytest.approx(1, abs=1e-3) for name in MEASURES[1:])
    assert faint["MAE"] > 0.1
    assert faint["IoU"] == 0


def test_the_collage_begins_with_the_largest_difference(folder: Path) -> None:
    Image.new("RGB", (64, 64), (128, 128, 128)).save(folder / "grey.png")
    models = {
        "grey": make_model("grey", lambda x: (x[:, 1:2] > 0.4).float()),
        "grey and red": make_model("grey and red", lambda x: torch.where(x[:, 1:2] > 0.4, 1.0, x[:, :1])),
    }

    results = compare(tuple(models), folder, load_model=models.__getitem__, report=lambda text: None)
    sheet = draw_differences(results)

    first_row = sheet[comparing.MARGIN : comparing.MARGIN + 64, comparing.MARGIN : comparing.MARGIN + 96]
    assert np.array_equal(first_row, np.asarray(Image.open(folder / "shoes" / "2.png")))
    assert sheet.shape[1] == comparing.MARGIN + 3 * (comparing.THUMB + comparing.MARGIN)


def test_a_file_that_can_not_be_decoded_is_reported_once(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")

    results, lines = run(folder, "red", "inverse")

    assert len(results) == 6
    (line,) = lines
    assert "broken.jpg is skipped" in line


def test_a_true_mask_of_another_size_is_refused(folder: Path) -> None:
    Image.new("L", (5, 5)).save(folder / "0.mask.png")

    with pytest.raises(SettingsError, match=r"0\.mask\.png must be an image of 96 x 64 pixels"):
        run(folder, "red")


def test_the_command_prints_the_table_or_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code = comparing.main(["--model", "u2netp", str(folder)])
    table = capsys.readouterr().out
    unknown = comparing.main(["--model", "nothing", str(folder)])
    sentence = capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()

    assert exit_code == 0
    assert "u2netp" in table and "IoU" in table
    assert unknown == comparing.main(["--model", "u2netp", str(empty)]) == 2
    assert "[model_unknown]" in sentence
    assert "Traceback" not in sentence
