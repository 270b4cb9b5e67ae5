"""Models with their own code: refused without opt-in and pinned revision, and loaded in spite of the faults that such
code has under current transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs.errors import ModelError
from workers.models import LoadedModel, load
from workers.models.remote_code import code_revision

CONFIG_CODE = """
from transformers import PretrainedConfig
class ModelConfig(PretrainedConfig):
    model_type = "stranger"
    def __init__(self, bb_pretrained=False, **kwargs):
        self.bb_pretrained = bb_pretrained
        super().__init__(**kwargs)
"""
MODEL_CODE = """
import torch
from torch import nn
from transformers import PreTrainedModel
from .settings import ModelConfig
class Stranger(PreTrainedModel):
    config_class = ModelConfig
    def __init__(self, bb_pretrained=True, config=ModelConfig()):
        super().__init__(config)
        if bb_pretrained is True:
            raise RuntimeError("it would fetch a backbone")
        self.conv = nn.Conv2d(3, 1, 1)
        self.post_init()
    def forward(self, x):
        return [None, self.conv(x)]
"""


def make_folder(path: Path, *, model: str = MODEL_CODE, config: str = CONFIG_CODE) -> Path:
    path.mkdir()
    (path / "settings.py").write_text(config)
    (path / "network.py").write_text(model)
    names = {"AutoConfig": "settings.ModelConfig", "AutoModelForImageSegmentation": "network.Stranger"}
    (path / "config.json").write_text(json.dumps({"auto_map": names, "input_size": 32}))
    save_file({"conv.weight": torch.full((1, 3, 1, 1), 0.5), "conv.bias": torch.zeros(1)}, path / "model.safetensors")
    return path


def trusted(path: Path) -> LoadedModel:
    return load(str(path), trust_remote_code=True, revision=code_revision(path))


def computes_alpha(model: LoadedModel) -> bool:
    x = torch.randn(2, 3, *model.input_size)
    with torch.inference_mode():
        return torch.allclose(model(x), (x.sum(1, keepdim=True) / 2).sigmoid(), atol=1e-6)


def replaced(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


def test_code_without_faults_is_loaded_and_its_last_output_is_the_mask(tmp_path: Path) -> None:
    model = trusted(make_folder(tmp_path / "sound"))

    assert computes_alpha(model)
    assert model.input_size == (32, 32)
    assert model.revision.endswith(code_revision(tmp_path / "sound"))


def test_a_config_that_is_no_pretrained_config_is_loaded(tmp_path: Path) -> None:
    code = (
        replaced(MODEL_CODE, "        self.post_init()\n", "        self.config = Config()\n")
        + "class Config:\n    pass\n"
    )

    assert computes_alpha(trusted(make_folder(tmp_path / "fault", model=code)))


def test_a_config_that_skips_the_constructor_of_its_base_is_loaded(tmp_path: Path) -> None:
    code = replaced(CONFIG_CODE, "        super().__init__(**kwargs)\n", "")

    assert computes_alpha(trusted(make_folder(tmp_path / "fault", config=code)))


def test_a_constructor_that_reads_tensor_values_is_run(tmp_path: Path) -> None:
    code = replaced(
        MODEL_CODE,
        "        self.post_init()\n",
        "        self.rates = [x.item() for x in torch.arange(4)]\n        self.post_init()\n",
    )

    assert computes_alpha(trusted(make_folder(tmp_path / "fault", model=code)))


def test_a_model_that_never_calls_post_init_is_loaded(tmp_path: Path) -> None:
    code = replaced(MODEL_CODE, "        self.post_init()\n", "")

    assert computes_alpha(trusted(make_folder(tmp_path / "fault", model=code)))


def test_a_folder_with_a_dot_in_its_name_is_loaded(tmp_path: Path) -> None:
    assert computes_alpha(trusted(make_folder(tmp_path / "STRANGER-2.0")))


def test_running_code_requires_an_opt_in(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", model="raise SystemExit('it ran')")

    with pytest.raises(ModelError, match="CUTFLEET_TRUST_REMOTE_CODE=1") as caught:
        load(str(folder), revision=code_revision(folder))

    assert caught.value.code == "remote_code_refused"


@pytest.mark.parametrize("revision", ["", "main", "v2.0", "0123456789abcdef"])
def test_running_code_requires_a_full_revision(tmp_path: Path, revision: str) -> None:
    folder = make_folder(tmp_path / "model", model="raise SystemExit('it ran')")

    with pytest.raises(ModelError, match="full 40-digit revision") as caught:
        load(str(folder), trust_remote_code=True, revision=revision)

    assert caught.value.code == "remote_code_refused"


def test_code_that_differs_from_its_pinned_revision_does_not_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    pinned = code_revision(folder)
    (folder / "network.py").write_text("raise SystemExit('it ran')")

    with pytest.raises(ModelError, match=f"CUTFLEET_MODEL_REVISION={code_revision(folder)}") as caught:
        load(str(folder), trust_remote_code=True, revision=pinned)

    assert caught.value.code == "remote_code_refused"


def test_a_hub_repository_is_refused_before_it_is_fetched() -> None:
    for arguments in ({}, {"trust_remote_code": True}, {"trust_remote_code": True, "revision": "main"}):
        with pytest.raises(ModelError) as caught:
            load("somebody/some-model", **arguments)

        assert caught.value.code == "remote_code_refused"


def test_weights_that_do_not_match_the_class_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    save_file({"conv.weight": torch.zeros(1, 3, 1, 1)}, folder / "model.safetensors")

    with pytest.raises(ModelError, match=r"1 missing: conv\.bias") as caught:
        trusted(folder)

    assert caught.value.code == "model_mismatch"


def test_code_that_fails_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ZeroDivisionError") as caught:
        trusted(make_folder(tmp_path / "model", model="1 / 0"))

    assert caught.value.code == "model_mismatch"
