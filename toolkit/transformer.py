"""Vision transformers for images of any size, such as DINO's small crops.

Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; position embeddings are resampled to the image's grid of
patches (section 3.2).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vit_b_16, vit_b_32, vit_h_14, vit_l_16, vit_l_32
from torchvision.models.vision_transformer import VisionTransformer

BUILDERS = {
    "vit_b_16": vit_b_16,
    "vit_b_32": vit_b_32,
    "vit_l_16": vit_l_16,
    "vit_l_32": vit_l_32,
    "vit_h_14": vit_h_14,
}
SMALL = {  # DeiT's (arXiv:2012.12877, table 1), which torchvision lacks: width and heads of 12 layers
    "vit_ti_16": (192, 3),
    "vit_s_16": (384, 6),
}


class Transformer(VisionTransformer):
    """torchvision's model and names of weights; (B, 3, H, W) to the class token, (B, D)."""

    def forward(self, images: Tensor) -> Tensor:
        return self._tokens(images)[0][:, 0]

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, D, h, w): the patch tokens where their patches lie."""
        tokens, rows, columns = self._tokens(images)
        return tokens[:, 1:].mT.unflatten(2, (rows, columns))

    def settle(self, size: int) -> None:
        """Resample the positions once, for images of `size` x `size` alone.

        A graph to serve then holds a constant instead of a bicubic resize, which ONNX Runtime cannot fold in
        FP16 (opening such a file ended the process) and TensorRT does not have.
        """
        side = size // self.patch_size
        with torch.no_grad():
            self.settled = nn.Buffer(self._added(side, side), persistent=False)

    def _added(self, rows: Any, columns: Any) -> Tensor:
        """(1, 1 + rows x columns, D): the class token at its position, and the positions of the patches."""
        position = self.encoder.pos_embedding
        side = self.image_size // self.patch_size
        grid = position[:, 1:].mT.unflatten(2, (side, side))
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([self.class_token + position[:, :1], grid.flatten(2).mT], 1)

    def _tokens(self, images: Tensor) -> tuple[Tensor, Any, Any]:
        patches = self.conv_proj(images)
        rows, columns = patches.shape[2], patches.shape[3]
        settled: Tensor | None = getattr(self, "settled", None)
        added = self._added(rows, columns) if settled is None else settled
        # a padded row becomes the class token: an expanded one would put the batch size into the ONNX graph
        tokens = F.pad(patches.flatten(2).mT, (0, 0, 1, 0)) + added
        tokens = self.encoder.dropout(tokens)
        return self.encoder.ln(self.encoder.layers(tokens)), rows, columns


def build_transformer(name: str) -> Transformer:
    """The transformer called `name`, for 224 pixels and any other size, without its classifier."""
    if name in SMALL:
        width, heads = SMALL[name]
        return Transformer(
            image_size=224, patch_size=16, num_layers=12, num_heads=heads, hidden_dim=width,
            mlp_dim=4 * width, num_classes=1,
        )  # fmt: skip
    model = BUILDERS[name](num_classes=1)
    model.__class__ = Transformer
    return model
