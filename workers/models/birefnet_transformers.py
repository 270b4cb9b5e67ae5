"""BiRefNet as a transformers model: after `register()`, `AutoModelForImageSegmentation` saves and loads it without
remote code. Only this module needs transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForImageSegmentation, PretrainedConfig, PreTrainedModel

from jobs.catalogue import PatchOrder
from workers.models.birefnet import BiRefNet


class BiRefNetConfig(PretrainedConfig):  # type: ignore[no-untyped-call]  # transformers is partly untyped
    """`patch_order` has no default that suits every checkpoint: the model's constructor refuses None."""

    model_type = "cutfleet_birefnet"

    def __init__(
        self,
        backbone: str = "swin_v1_l",
        patch_order: PatchOrder | None = None,
        input_size: tuple[int, int] = (1024, 1024),
        **kwargs: Any,  # fields that transformers adds to every config
    ) -> None:
        self.backbone = backbone
        self.patch_order = patch_order
        self.input_size = list(input_size)
        super().__init__(**kwargs)


class BiRefNetForImageSegmentation(PreTrainedModel):  # type: ignore[no-untyped-call]  # as above
    """Keys as in the published checkpoints. Like their code, returns a list with the (N, 1, H, W) logits last."""

    config_class = BiRefNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BiRefNetConfig) -> None:
        super().__init__(config)
        if config.patch_order is None:
            raise ValueError("The configuration has no patch_order: set columns_first (RMBG-2.0) or channels_first.")
        network = BiRefNet(config.backbone, config.patch_order)
        self.bb = network.bb
        self.squeeze_module = network.squeeze_module
        self.decoder = network.decoder
        self.post_init()  # type: ignore[no-untyped-call]  # as above

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        return [BiRefNet.forward(self, pixel_values)]  # type: ignore[arg-type]  # it has the same three parts


def register() -> None:
    """Register this model with transformers' Auto classes. Safe to call twice."""
    AutoConfig.register(BiRefNetConfig.model_type, BiRefNetConfig, exist_ok=True)
    AutoModelForImageSegmentation.register(BiRefNetConfig, BiRefNetForImageSegmentation, exist_ok=True)
