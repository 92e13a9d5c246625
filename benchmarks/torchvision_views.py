"""What a view is in torchvision's words (transforms v2), for the opponent of the question "loading"."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import io
from torchvision.transforms import v2

from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.stain import STAINS
from noisyssl.views import View


class Files(Dataset[Any]):
    """Reads, decodes once, and makes each view."""

    def __init__(self, samples: Samples, makers: list[Any], kind: str) -> None:
        self.paths = [str(samples.file(i)) for i in range(len(samples))]
        self.makers, self.kind = makers, kind

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Any]:
        path = self.paths[index]
        image = (
            Image.open(path).convert("RGB")
            if self.kind == "pillow"
            else io.decode_image(path, io.ImageReadMode.RGB)
        )
        return [make(image) for make in self.makers]


def transforms(view: View, kind: str, kernel: int) -> v2.Compose:
    """`view` by torchvision's own operations, and by plain ones where it has none; uint8 CHW out.

    Its rotation fills with black where ours repeats the border.
    """
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    kernel = kernel or 2 * int(np.ceil(3 * view.sigma[1])) + 1
    bilinear = v2.InterpolationMode.BILINEAR
    steps = [
        v2.RandomResizedCrop(view.size, view.area, view.ratio, antialias=True),
        *([v2.RandomHorizontalFlip(view.flip)] if view.flip else []),
        *([v2.RandomVerticalFlip(view.upside)] if view.upside else []),
        *([v2.RandomApply([StainJitter(view)], view.stain)] if view.stain else []),
        v2.RandomApply([jitter], view.jitter),
        *([v2.RandomGrayscale(view.grey)] if view.grey else []),
        *([v2.RandomApply([v2.GaussianBlur(kernel, view.sigma)], view.blur)] if view.blur else []),
        *([v2.RandomApply([QuarterTurn()], view.turn)] if view.turn else []),
        *([v2.RandomRotation(view.angle, bilinear)] if view.angle else []),
        *([v2.RandomSolarize(128, view.solarise)] if view.solarise else []),
        *([v2.RandomApply([v2.JPEG(view.quality)], view.jpeg)] if view.jpeg else []),
        *([v2.PILToTensor()] if kind == "pillow" else []),
    ]
    return v2.Compose(steps)


class QuarterTurn(torch.nn.Module):
    """One of the four quarter turns; torchvision has none of its own."""

    def forward(self, image: Any) -> Any:
        turns = int(torch.randint(4, ()))
        if isinstance(image, Tensor):
            return image.rot90(turns, (1, 2))
        return image.transpose(Image.Transpose(turns + 1)) if turns else image


class StainJitter(torch.nn.Module):
    """Stain jitter as a user writes it (tiatoolbox, for one): image by image, with NumPy or torch."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.factor, self.shift = view.stain_factor, view.stain_shift
        self.together = torch.tensor(STAINS, dtype=torch.float32)
        self.apart = torch.linalg.inv(self.together)

    def forward(self, image: Any) -> Any:
        factor = 1 + self.factor * (2 * torch.rand(3) - 1)
        shift = self.shift * (2 * torch.rand(3) - 1)
        if isinstance(image, Tensor):
            density = -torch.log(image.clamp(min=1).permute(1, 2, 0) / 255)
            amounts = density @ self.apart * factor + shift
            light = 255 * torch.exp(-amounts @ self.together)
            return light.clamp(0, 255).to(torch.uint8).permute(2, 0, 1)
        pixels = np.maximum(np.asarray(image), 1).astype(np.float32)
        amounts = -np.log(pixels / 255) @ self.apart.numpy() * factor.numpy() + shift.numpy()
        light = 255 * np.exp(-amounts @ self.together.numpy())
        return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
