"""BiRefNet computes what the reference implementation computed, if that data is available, and what independent
implementations of its parts compute.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.models.swin_transformer import SwinTransformer

from jobs.catalogue import PRESETS, PatchOrder
from workers.models.birefnet import BiRefNet, DeformableConv, cut_patches
from workers.models.device import place
from workers.models.swin import SIZES, Swin, SwinSize

DATA = Path(os.environ.get("CUTFLEET_TEST_DATA", Path(__file__).parents[3] / "shared")) / "parity"
TINY = SwinSize(width=24, depths=(1, 2, 2, 1), heads=(1, 2, 3, 4), window=7)
OTHER: dict[PatchOrder, PatchOrder] = {"columns_first": "channels_first", "channels_first": "columns_first"}

needs_reference = pytest.mark.skipif(not DATA.is_dir(), reason=f"no reference outputs in {DATA}")


class WeightRule(Protocol):
    def tensor_by_rule(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None: ...

    def input_by_rule(self, height: int, width: int) -> NDArray[np.float32]: ...


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", TINY)


def make_tiny(order: PatchOrder = "channels_first", *, seed: int = 0) -> BiRefNet:
    """All weights are random, including batch norms and offsets, so that every path has an effect."""
    network = BiRefNet("tiny", order)
    noise = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            spread = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
            value.normal_(0, spread, generator=noise)
            value += 1 if name.endswith(("running_var", "norm.weight", "bn.weight")) else 0
            if name.endswith("running_var"):
                value.abs_()
    return place(network, torch.device("cpu"), torch.float32)  # type: ignore[return-value]  # the same module


def random_input(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def rule() -> WeightRule:
    spec = importlib.util.spec_from_file_location("weights_by_rule", DATA / "weights_by_rule.py")
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module  # type: ignore[no-any-return]  # a module that implements the protocol


def fill_by_rule(network: BiRefNet, keys: dict[str, list[int]], rule: WeightRule) -> None:
    own = network.state_dict()
    values = {name: rule.tensor_by_rule(name, tuple(shape)) for name, shape in keys.items()}
    state = {
        name: own[name] if value is None else torch.from_numpy(np.asarray(value)) for name, value in values.items()
    }
    network.load_state_dict(state, strict=True)


@pytest.fixture(scope="module", params=["birefnet-lite", "rmbg-2.0"])
def reference(request: pytest.FixtureRequest, rule: WeightRule) -> Iterator[tuple[BiRefNet, str]]:
    preset = PRESETS[request.param]
    assert preset.patch_order is not None
    network = BiRefNet(preset.backbone, preset.patch_order)
    fill_by_rule(network, json.loads((DATA / f"{preset.name}.keys.json").read_text()), rule)
    place(network, torch.device("cpu"), torch.float32)
    yield network, preset.name


def differences(network: BiRefNet, name: str, rule: WeightRule, size: tuple[int, int]) -> tuple[float, float]:
    with torch.inference_mode():
        logits = network(torch.from_numpy(rule.input_by_rule(*size))).numpy()[..., ::4, ::4]
    with np.load(DATA / f"{name}.npz") as expected:
        gap = np.abs(logits.squeeze() - expected[f"{size[0]}x{size[1]}"].squeeze())
    return float(gap.max()), float(gap.mean())


@needs_reference
@pytest.mark.parametrize("size", [(256, 256), (256, 384)])
def test_its_logits_are_those_of_the_reference(
    reference: tuple[BiRefNet, str], rule: WeightRule, size: tuple[int, int]
) -> None:
    largest, mean = differences(*reference, rule, size)

    assert largest < 2e-3
    assert mean < 1e-4


@needs_reference
def test_the_other_patch_order_gives_other_logits(
    reference: tuple[BiRefNet, str], rule: WeightRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, name = reference
    monkeypatch.setattr(network.decoder, "patch_order", OTHER[network.decoder.patch_order])

    largest, mean = differences(network, name, rule, (256, 256))

    assert largest > 0.1
    assert mean > 1e-2


@needs_reference
@pytest.mark.parametrize("name", ["birefnet-lite", "rmbg-2.0"])
def test_its_keys_are_those_of_the_published_checkpoint(name: str) -> None:
    with torch.device("meta"):
        network = BiRefNet(PRESETS[name].backbone, "columns_first")

    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}

    assert shapes == json.loads((DATA / f"{name}.keys.json").read_text())


@pytest.mark.parametrize("name", ["birefnet-lite", "rmbg-2.0"])
def test_it_has_the_number_of_weights_of_its_preset(name: str) -> None:
    with torch.device("meta"):
        network = BiRefNet(PRESETS[name].backbone, "columns_first")

    count_m = sum(parameter.numel() for parameter in network.parameters()) / 1e6

    assert round(count_m, 1) == PRESETS[name].parameters_m


def test_the_backbone_agrees_with_torchvisions_swin() -> None:
    theirs = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=TINY.width,
        depths=list(TINY.depths),
        num_heads=list(TINY.heads),
        window_size=[TINY.window] * 2,
    ).eval()
    ours = Swin(TINY).eval()
    norms = {name: value for name, value in ours.state_dict().items() if name.startswith("norm")}
    ours.load_state_dict(_from_torchvision(theirs.state_dict()) | norms, strict=True)
    x = random_input(2, 3, 136, 168)

    with torch.inference_mode():
        features, expected = x, []
        for number, part in enumerate(theirs.features):
            features = part(features)
            if number % 2:
                expected.append(ours.get_submodule(f"norm{number // 2}")(features).permute(0, 3, 1, 2))
        actual = ours(x)

    for ours_at_scale, theirs_at_scale in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_at_scale, theirs_at_scale, atol=1e-4, rtol=1e-4)


def _from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of torchvision, whose features alternate between stages and patch merging."""
    ours = {}
    for name, value in state.items():
        name = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
        name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        parts = name.split(".")
        if parts[0] == "features":
            stage, merges = divmod(int(parts[1]) - 1, 2)
            name = ".".join([f"layers.{stage}", "downsample" if merges else "blocks", *parts[2:]])
        if not name.startswith(("norm.", "head.")):
            shape = (TINY.window**2, TINY.window**2) if name.endswith("position_index") else value.shape
            ours[name] = value.view(shape)
    return ours


def test_columns_first_stacks_patches_column_by_column() -> None:
    x = torch.arange(2 * 3 * 6 * 8.0).view(2, 3, 6, 8)

    patches = cut_patches(x, 3, 2, order="columns_first")

    expected = [x[:, :, row : row + 3, column : column + 2] for column in range(0, 8, 2) for row in range(0, 6, 3)]
    assert torch.equal(patches, torch.cat(expected, 1))


def test_channels_first_stacks_patches_channel_by_channel_and_row_by_row() -> None:
    x = torch.arange(2 * 3 * 6 * 8.0).view(2, 3, 6, 8)

    patches = cut_patches(x, 3, 2, order="channels_first")

    expected = [
        x[:, [channel], row : row + 3, column : column + 2]
        for channel in range(3)
        for row in range(0, 6, 3)
        for column in range(0, 8, 2)
    ]
    assert torch.equal(patches, torch.cat(expected, 1))


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_deformable_convolution_without_offsets_is_a_convolution(kernel: int) -> None:
    layer = DeformableConv(kernel)
    for part in (layer.offset_conv, layer.modulator_conv):  # no offsets, every tap weighted 2 * sigmoid(0) = 1
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    x = random_input(1, 64, 9, 11)

    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer.regular_conv(x), atol=1e-4, rtol=1e-4)


def test_the_head_before_upsampling_gives_the_same_as_after_it() -> None:
    network = make_tiny()
    decoder, x = network.decoder, random_input(1, 3, 64, 96)
    decoded = random_input(1, TINY.width, 16, 24)

    with torch.inference_mode():
        early = decoder.apply_head(x, decoded)
        upsampled = functional.interpolate(decoded, size=(64, 96), mode="bilinear", align_corners=True)
        late = decoder.conv_out1(torch.cat((upsampled, decoder.get_submodule("ipt_blk1")(x)), 1))

    torch.testing.assert_close(early, late, atol=1e-5, rtol=1e-4)


def test_a_batch_of_four_equals_four_batches_of_one() -> None:
    network, x = make_tiny(), random_input(4, 3, 96, 64)

    with torch.inference_mode():
        together = network(x)
        one_by_one = torch.cat([network(x[number : number + 1]) for number in range(4)])

    torch.testing.assert_close(together, one_by_one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(1024, 1024), (96, 224)])
def test_it_runs_at_full_and_oblong_sizes(size: tuple[int, int]) -> None:
    with torch.inference_mode():
        logits = make_tiny()(random_input(1, 3, *size))

    assert logits.shape == (1, 1, *size)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_a_size_that_is_no_multiple_of_32_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="multiples of 32, not 96 x 100"):
        make_tiny()(random_input(1, 3, 96, 100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_full_precision(dtype: torch.dtype) -> None:
    x = random_input(1, 3, 64, 64)
    with torch.inference_mode():
        full = make_tiny()(x).sigmoid()

        half = make_tiny().to(dtype)(x.to(dtype)).float().sigmoid()

    assert (full - half).abs().max() < 0.05


def test_a_compiled_network_gives_the_same_and_compiles_each_batch_size_once() -> None:
    """Captures the graph only: machine code takes minutes to compile, which the benchmark does."""
    network = make_tiny()
    compiled = torch.compile(network, dynamic=False, fullgraph=True, backend="eager")
    batches = [random_input(size, 3, 64, 64) for size in (1, 2, 1, 2)]

    with torch.inference_mode():
        expected = [network(x) for x in batches]
        warm = [compiled(x) for x in batches[:2]]
        with torch.compiler.set_stance("fail_on_recompile"):
            later = [compiled(x) for x in batches[2:]]

    for actual, wanted in zip([*warm, *later], expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-3, rtol=0)
