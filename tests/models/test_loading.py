"""Load models: every accepted form, and every error with its code and the setting to change."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.catalogue import PRESETS
from jobs.errors import ModelError
from workers.models import load, resolve_device
from workers.models.birefnet import BiRefNet
from workers.models.model_files import PACKAGED
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
    """A BiRefNet in the hub's layout, without a patch order."""
    directory = tmp_path / "tiny-birefnet"
    directory.mkdir()
    torch.manual_seed(0)
    save_file(BiRefNet("tiny", "columns_first").state_dict(), directory / "model.safetensors")
    write_config(directory, input_size=64)
    return directory


def write_config(directory: Path, **values: object) -> None:
    (directory / "config.json").write_text(json.dumps(values))


def alpha(source: str | Path, **arguments: str) -> Tensor:
    model = load(str(source), **arguments)  # type: ignore[arg-type]  # all of these take text
    x = torch.randn(1, 3, *model.input_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(x)


def refusal(source: str | Path, **arguments: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(str(source), **arguments)  # type: ignore[arg-type]  # whatever the test passes
    return caught.value


def test_u2netp_is_built_in() -> None:
    model = load("u2netp")

    assert (model.name, model.licence, model.input_size) == ("u2netp", "Apache-2.0", (320, 320))
    assert model.revision == "11048b165b23cf5516940fbd90811f34c36e59f1e7b6b67784ead36f04134227"


def test_u2netp_finds_a_bright_disc_on_a_dark_background() -> None:
    model = load("u2netp")
    rows, columns = np.mgrid[:320, :320]
    disc = (rows - 160) ** 2 + (columns - 160) ** 2 < 80**2
    rgb = np.where(disc[..., None], (230, 120, 40), (30, 30, 40)).astype(np.float32) / 255
    x = torch.from_numpy(((rgb - model.mean) / model.std).astype(np.float32)).permute(2, 0, 1)[None]

    with torch.inference_mode():
        mask = model(x)[0, 0].numpy() > 0.5

    assert (mask & disc).sum() / (mask | disc).sum() > 0.95


def test_folding_batch_norm_changes_no_output() -> None:
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


def test_the_large_u2net_is_recognised_by_its_keys(tmp_path: Path) -> None:
    save_file(U2Net("u2net").state_dict(), tmp_path / "u2net.safetensors")

    model = load(str(tmp_path / "u2net.safetensors"))

    assert (model.name, model.input_size) == ("u2net", (320, 320))


def test_a_directory_a_file_and_a_pickle_give_the_same_alpha(folder: Path, tmp_path: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    state = {f"module._orig_mod.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    torch.save(state, pickled / "pytorch_model.bin")
    write_config(pickled, input_size=64, patch_order="columns_first")

    results = [alpha(folder), alpha(folder / "model.safetensors"), alpha(pickled)]

    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=0)
    assert 0 <= results[0].min() < results[0].max() <= 1


def test_a_model_saved_by_auto_classes_is_loaded_by_them_and_by_us(tmp_path: Path) -> None:
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


def test_u2netp_does_not_import_transformers() -> None:
    code = "import sys; from workers.models import load; load('u2netp'); sys.exit('transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("code", "configured", "order"),
    [
        (OLD_CODE, None, "columns_first"),
        (NEW_CODE, None, "channels_first"),
        (OLD_CODE, "channels_first", "channels_first"),
        (None, "columns_first", "columns_first"),
    ],
)
def test_the_patch_order_is_read_from_the_config_or_else_from_the_code(
    folder: Path, code: str | None, configured: str | None, order: str
) -> None:
    write_config(folder, input_size=64, **({"patch_order": configured} if configured else {}))
    if code:
        (folder / "birefnet.py").write_text(f"raise SystemExit('never run')\n{code}")

    model = load(str(folder))

    assert model.revision.endswith(f"-{order}")
    with torch.inference_mode():
        network = BiRefNet("tiny", order).eval()  # type: ignore[arg-type]  # one of the literals
        network.load_state_dict(load_file(folder / "model.safetensors"))
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model(x), network(x).sigmoid(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("code", [None, "x = 1\n", OLD_CODE + NEW_CODE, "def broken(:\n", "# get_patches_batch(x)\n"])
def test_an_unknown_patch_order_is_never_guessed(folder: Path, code: str | None) -> None:
    if code:
        (folder / "birefnet.py").write_text(code)

    error = refusal(folder)

    assert error.code == "patch_order_unknown"
    assert '"patch_order": "columns_first"' in str(error)


def test_an_invalid_patch_order_is_refused(folder: Path) -> None:
    write_config(folder, patch_order="rows_first")

    assert refusal(folder).code == "patch_order_unknown"


def test_the_served_name_of_a_local_model_is_valid_as_a_queue_name(folder: Path) -> None:
    odd = folder.rename(folder.with_name("möbel, v2 (neu)"))
    write_config(odd, input_size=64, patch_order="columns_first")

    model = load(str(odd))

    assert model.served_name == f"m-bel-v2-neu-@{model.revision[:12]}"


def test_a_revision_of_the_built_in_model_is_refused() -> None:
    assert refusal("u2netp", revision="a" * 40).code == "model_missing"


def test_an_unknown_name_lists_the_presets() -> None:
    error = refusal("rmbg-3")

    assert error.code == "model_unknown"
    assert "rmbg-2.0" in str(error)


@pytest.mark.parametrize("statement", ["", "non-commercial", "birefnet:non-commercial", "rmbg-2.0:yes"])
def test_rmbg_requires_a_statement_of_its_licence(statement: str) -> None:
    error = refusal("rmbg-2.0", accept_licence=statement)

    assert error.code == "licence_not_stated"
    assert "CUTFLEET_ACCEPT_LICENCE=rmbg-2.0:commercial-agreement or rmbg-2.0:non-commercial" in str(error)


def test_a_local_model_requires_a_statement_of_the_licence_in_its_card(folder: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: bria-rmbg-2.0\n---\n# a model\n")

    error = refusal(folder)
    model = load(str(folder), accept_licence="tiny-birefnet:commercial-agreement")

    assert error.code == "licence_not_stated"
    assert model.licence == "bria-rmbg-2.0"
    assert model.terms == "bria-rmbg-2.0 (commercial-agreement)"


def test_a_free_licence_requires_no_statement(folder: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")

    assert load(str(folder)).licence == "mit"


def test_keys_that_do_not_match_are_listed(folder: Path) -> None:
    write_config(folder, input_size=64, patch_order="columns_first")
    state = load_file(folder / "model.safetensors")
    state["bb.stranger"] = state.pop("bb.norm3.bias")
    state["bb.norm0.bias"] = torch.zeros(7)
    save_file(state, folder / "model.safetensors")

    error = refusal(folder)

    assert error.code == "model_mismatch"
    for part in ("1 missing: bb.norm3.bias", "1 extra: bb.stranger", "bb.norm0.bias is [7], not [24]"):
        assert part in str(error)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    assert refusal(folder).code == "model_mismatch"


def test_a_directory_without_weights_lists_the_expected_files(tmp_path: Path) -> None:
    error = refusal(tmp_path)

    assert error.code == "model_missing"
    assert "model.safetensors" in str(error)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(_Trap.target),)  # type: ignore[return-value]  # what pickle takes

    target = ""


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    _Trap.target = str(tmp_path / "ran")
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"weight": _Trap()}, protocol=2))
    torch.save({"weight": _Trap()}, tmp_path / "model.bin")

    errors = [refusal(tmp_path / name) for name in ("model.pth", "model.bin")]

    assert [error.code for error in errors] == ["unsafe_weights", "unsafe_weights"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error_and_auto_logs_that_it_uses_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    error = refusal("u2netp", device="cuda")

    with caplog.at_level("WARNING"):
        device = resolve_device("auto")

    assert error.code == "no_gpu"
    assert "CUTFLEET_DEVICE" in str(error)
    assert device.type == "cpu"
    messages = [record.getMessage() for record in caplog.records if record.name == "workers.models.device"]
    assert messages == ["No GPU is visible to torch: the model runs on the CPU."]


@pytest.mark.parametrize(("setting", "value"), [("device", "gpu"), ("dtype", "float8")])
def test_an_unknown_device_or_precision_is_refused(setting: str, value: str) -> None:
    assert value in str(refusal("u2netp", **{setting: value}))


def test_dtype_is_the_precision_of_the_model() -> None:
    model = load("u2netp", dtype="bfloat16")

    with torch.inference_mode():
        out = model(torch.zeros(1, 3, 320, 320, dtype=torch.bfloat16))

    assert out.dtype == torch.bfloat16


def test_every_birefnet_preset_has_a_backbone_and_a_patch_order() -> None:
    family = [preset for preset in PRESETS.values() if preset.architecture == "birefnet"]

    assert len(family) == 7
    assert all(preset.backbone in SIZES and preset.patch_order for preset in family)
    assert PRESETS["rmbg-2.0"].patch_order == "columns_first"
    assert set(PACKAGED) == {"u2netp"}
