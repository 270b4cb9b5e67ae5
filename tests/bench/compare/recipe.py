"""The model card's script with u2netp's weights, which every tool here except ours uses: Pillow, transforms of
torchvision, and Pillow's default PNG.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from workers.models.checkpoint import fill, read_weights
from workers.models.device import place
from workers.models.model_files import PACKAGED
from workers.models.u2net import U2Net, fold_batch_norm

Model = Callable[[Tensor], Tensor]
SIDE = 320
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def load_model(threads: int) -> Model:
    """Load our weights and network in torch, float32."""
    torch.set_num_threads(threads)
    network = U2Net("u2netp")
    fill(network, fold_batch_norm(read_weights(PACKAGED["u2netp"])), name="u2netp")
    placed = place(network, torch.device("cpu"), torch.float32)
    return lambda x: torch.sigmoid(placed(x))


TO_INPUT = transforms.Compose(
    [
        transforms.Resize((SIDE, SIDE)),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


def cut_out(data: bytes, model: Model) -> tuple[bytes, bytes]:
    """Return cutout and mask as PNG."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    with torch.no_grad():
        alpha = model(TO_INPUT(image).unsqueeze(0))[0].squeeze()
    mask = transforms.ToPILImage()(alpha).resize(image.size)
    image.putalpha(mask)
    return to_png(image), to_png(mask)


def to_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
