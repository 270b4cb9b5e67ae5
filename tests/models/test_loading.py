"""Loading: what is accepted, and every refusal with its code and a text that says what to change."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs import catalogue as presets
from jobs.errors import ModelError
from workers.models import load, registry, resolve_device
from workers.models.birefnet import BiRefNet
from workers.models.swin import SIZES, SwinSize
from workers.models.u2net import BATCH_NORM_EPSILON, U2Net, fold_batch_norm

TINY = SwinSize(width=24, depths=(1, 1, 1, 1), heads=(1, 2, 3, 4), window=7)
OLD_CODE = "class Decoder:\n    def forward(self, x, p):\n        return self.get_patches_batch(x, p)\n"
NEW_CODE = (
    "class Decoder:\n"
    "    def forward(self, x, p):\n"
    "        # self.get_patches_batch(x, p)\n"
    "        return image2patches(x, patch_ref=p, transformation='b c (hg h) (wg w) -> b (c hg wg) h w')\n"
)


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BiRefNet as the hub lays it out, saying nothing of its patch form."""
    directory = tmp_path / "tiny-birefnet"
    directory.mkdir()
    torch.manual_seed(0)
    save_file(BiRefNet("tiny", "columns_first").state_dict(), directory / "model.safetensors")
    write_config(directory, input_size=64)
    return directory


def write_config(directory: Path, **values: object) -> None:
    (directory / "config.json").write_text(json.dumps(values))


def alpha(source: str | Path, **arguments: str) -> Tensor:
    model = load(str(source), **arguments)  # type: ignore[arg-type]  # all of them take text
    x = torch.randn(1, 3, *model.input_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(x)


def refusal(source: str | Path, **arguments: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(str(source), **arguments)  # type: ignore[arg-type]  # whatever the test passes
    return caught.value


# --- u2netp, built in ---


def test_u2netp_is_there_without_anything_else() -> None:
    model = load("u2netp")

    assert (model.name, model.licence, model.input_size) == ("u2netp", "Apache-2.0", (320, 320))
    assert model.revision == "11048b165b23cf5516940fbd90811f34c36e59f1e7b6b67784ead36f04134227"


def test_u2netp_finds_the_bright_disc_on_a_dark_ground() -> None:
    model = load("u2netp")
    rows, columns = np.mgrid[:320, :320]
    disc = (rows - 160) ** 2 + (columns - 160) ** 2 < 80**2
    rgb = np.where(disc[..., None], (230, 120, 40), (30, 30, 40)).astype(np.float32) / 255
    x = torch.from_numpy(((rgb - model.mean) / model.std).astype(np.float32)).permute(2, 0, 1)[None]

    with torch.inference_mode():
        mask = model(x)[0, 0].numpy() > 0.5

    assert (mask & disc).sum() / (mask | disc).sum() > 0.95


def test_folding_batch_norm_changes_no_value() -> None:
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).eval()
    for name, value in block[1].state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 2) if name.endswith(("var", "weight")) else value.normal_()
    names = {"0": "block.conv_s1", "1": "block.bn_s1"}
    state = {f"{names[key[0]]}{key[1:]}": value for key, value in block.state_dict().items()}
    x = torch.randn(1, 3, 8, 8)

    folded = fold_batch_norm(state)

    assert folded.keys() == {"block.conv_s1.weight", "block.conv_s1.bias"}
    assert block[1].eps == BATCH_NORM_EPSILON
    with torch.inference_mode():
        actual = torch.nn.functional.conv2d(x, folded["block.conv_s1.weight"], folded["block.conv_s1.bias"])
        torch.testing.assert_close(actual, block(x), atol=1e-5, rtol=1e-4)


def test_the_large_u2net_is_known_by_its_keys(tmp_path: Path) -> None:
    save_file(U2Net("u2net").state_dict(), tmp_path / "u2net.safetensors")

    model = load(str(tmp_path / "u2net.safetensors"))

    assert (model.name, model.input_size) == ("u2net", (320, 320))


# --- a directory, a file ---


def test_a_directory_a_file_and_a_pickle_of_one_model_give_one_answer(folder: Path, tmp_path: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    state = {f"module._orig_mod.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    torch.save(state, pickled / "pytorch_model.bin")
    write_config(pickled, input_size=64, patch_order="columns_first")

    answers = [alpha(folder), alpha(folder / "model.safetensors"), alpha(pickled)]

    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=1e-6, rtol=0)
    assert 0 <= answers[0].min() < answers[0].max() <= 1


def test_what_auto_classes_save_is_loaded_by_them_and_by_us(tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers").AutoModelForImageSegmentation
    from workers.models.birefnet_transformers import BiRefNetConfig, BiRefNetForImageSegmentation, register

    register()
    config = BiRefNetConfig(backbone="tiny", patch_order="channels_first", input_size=(64, 96))
    BiRefNetForImageSegmentation(config).save_pretrained(tmp_path / "saved")

    loaded = auto.from_pretrained(tmp_path / "saved").eval()
    model = load(str(tmp_path / "saved"))

    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), loaded(x)[-1].sigmoid(), atol=1e-6, rtol=0)
    assert model.input_size == (64, 96)


def test_u2netp_pays_nothing_for_transformers() -> None:
    import subprocess

    code = "import sys; from workers.models import load; load('u2netp'); sys.exit('transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the patch form ---


@pytest.mark.parametrize(
    ("code", "stated", "decided"),
    [
        (OLD_CODE, None, "columns_first"),
        (NEW_CODE, None, "channels_first"),
        (OLD_CODE, "channels_first", "channels_first"),
        (None, "columns_first", "columns_first"),
    ],
)
def test_the_patch_form_is_what_config_or_else_the_code_says(
    folder: Path, code: str | None, stated: str | None, decided: str
) -> None:
    write_config(folder, input_size=64, **({"patch_order": stated} if stated else {}))
    if code:
        (folder / "birefnet.py").write_text(f"raise SystemExit('never run')\n{code}")

    model = load(str(folder))

    assert model.revision.endswith(f"-{decided}")
    with torch.inference_mode():
        network = BiRefNet("tiny", decided).eval()  # type: ignore[arg-type]  # one of the literals
        network.load_state_dict(load_file(folder / "model.safetensors"))
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model(x), network(x).sigmoid(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("code", [None, "x = 1\n", OLD_CODE + NEW_CODE, "def broken(:\n", "# get_patches_batch(x)\n"])
def test_a_patch_form_that_nothing_tells_is_never_guessed(folder: Path, code: str | None) -> None:
    if code:
        (folder / "birefnet.py").write_text(code)

    error = refusal(folder)

    assert error.code == "patch_order_unknown"
    assert '"patch_order": "columns_first"' in str(error)


def test_a_patch_form_that_does_not_exist_is_refused(folder: Path) -> None:
    write_config(folder, patch_order="rows_first")

    assert refusal(folder).code == "patch_order_unknown"


def test_a_model_that_is_no_preset_is_served_under_a_name_that_a_queue_may_have(folder: Path) -> None:
    odd = folder.rename(folder.with_name("möbel, v2 (neu)"))
    write_config(odd, input_size=64, patch_order="columns_first")

    model = load(str(odd))

    assert model.served_name == f"m-bel-v2-neu-@{model.revision[:12]}"


# --- refusals ---


def test_a_revision_of_what_is_built_in_is_refused() -> None:
    assert refusal("u2netp", revision="a" * 40).code == "model_missing"


def test_a_name_that_is_nothing_lists_the_presets() -> None:
    error = refusal("rmbg-3")

    assert error.code == "model_unknown"
    assert "rmbg-2.0" in str(error)


@pytest.mark.parametrize("stated", ["", "non-commercial", "birefnet:non-commercial", "rmbg-2.0:yes"])
def test_rmbg_refuses_until_its_licence_is_stated(stated: str) -> None:
    error = refusal("rmbg-2.0", accept_licence=stated)

    assert error.code == "licence_not_stated"
    assert "CUTFLEET_ACCEPT_LICENCE=rmbg-2.0:commercial-agreement or rmbg-2.0:non-commercial" in str(error)


def test_a_copied_folder_is_asked_what_its_model_card_demands(folder: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: bria-rmbg-2.0\n---\n# a model\n")

    error = refusal(folder)
    model = load(str(folder), accept_licence="tiny-birefnet:commercial-agreement")

    assert error.code == "licence_not_stated"
    assert model.licence == "bria-rmbg-2.0"
    assert model.terms == "bria-rmbg-2.0 (commercial-agreement)"


def test_a_free_licence_asks_for_nothing(folder: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")

    assert load(str(folder)).licence == "mit"


def test_keys_that_do_not_fit_are_listed(folder: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    state = load_file(folder / "model.safetensors")
    state["bb.stranger"] = state.pop("bb.norm3.bias")
    state["bb.norm0.bias"] = torch.zeros(7)
    save_file(state, folder / "model.safetensors")

    error = refusal(folder)

    assert error.code == "model_mismatch"
    for part in ("1 missing: bb.norm3.bias", "1 extra: bb.stranger", "bb.norm0.bias is [7], not [24]"):
        assert part in str(error)


def test_a_cut_off_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    assert refusal(folder).code == "model_mismatch"


def test_a_directory_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    error = refusal(tmp_path)

    assert error.code == "model_missing"
    assert "model.safetensors" in str(error)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(_Trap.target),)  # type: ignore[return-value]  # what pickle takes

    target = ""


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    _Trap.target = str(tmp_path / "ran")
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"weight": _Trap()}, protocol=2))
    torch.save({"weight": _Trap()}, tmp_path / "model.bin")

    errors = [refusal(tmp_path / name) for name in ("model.pth", "model.bin")]

    assert [error.code for error in errors] == ["unsafe_weights", "unsafe_weights"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error_and_auto_says_that_it_is_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    error = refusal("u2netp", device="cuda")

    with caplog.at_level("WARNING"):
        device = resolve_device("auto")

    assert error.code == "no_gpu"
    assert "CUTFLEET_DEVICE" in str(error)
    assert device.type == "cpu"
    told = [row.getMessage() for row in caplog.records if row.name == "workers.models.device"]
    assert told == ["No GPU is visible to torch: the model runs on the CPU."]


@pytest.mark.parametrize(("setting", "value"), [("device", "gpu"), ("dtype", "float8")])
def test_a_device_or_precision_that_does_not_exist_is_refused(setting: str, value: str) -> None:
    assert value in str(refusal("u2netp", **{setting: value}))


def test_bfloat16_is_what_it_loads_as_when_asked() -> None:
    model = load("u2netp", dtype="bfloat16")

    with torch.inference_mode():
        out = model(torch.zeros(1, 3, 320, 320, dtype=torch.bfloat16))

    assert out.dtype == torch.bfloat16


def test_every_preset_that_is_a_birefnet_says_its_backbone_and_patch_form() -> None:
    family = [preset for preset in presets.PRESETS.values() if preset.architecture == "birefnet"]

    assert len(family) == 7
    assert all(preset.backbone in SIZES and preset.patch_order for preset in family)
    assert presets.PRESETS["rmbg-2.0"].patch_order == "columns_first"
    assert set(registry.PACKAGED) == {"u2netp"}
