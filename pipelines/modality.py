"""The views of a stage as they suit the images, and what does not suit them."""

import numpy as np

from noisyssl.config import Config
from noisyssl.images import BadImage
from noisyssl.methods import METHODS
from noisyssl.pipelines.samples import Samples
from noisyssl.views import TURNABLE, View, adapt, training

LOOKED_AT = 32
"""Images that decide whether a set is grey."""


def stage_views(config: Config, stage: str) -> tuple[View, ...]:
    """The views of "pretrain" or "train" under `data.modality`."""
    size = config.data.size
    views = METHODS[config.pretrain.method].views(size) if stage == "pretrain" else training(size)
    return tuple(adapt(view, config.data.modality) for view in views)


def concerns(config: Config, stage: str, samples: Samples) -> list[str]:
    """What in this stage's views or method does nothing, or no good, on these images; to be said once."""
    modality, method = config.data.modality, config.pretrain.method
    views, told = stage_views(config, stage), []
    if stage == "pretrain" and METHODS[method].upright and modality in TURNABLE:
        told.append(
            f"{method} asks which way is up, and {modality} images have no such way: expect little from it; "
            "choose another --method."
        )
    colour = any(view.grey or (view.jitter and (view.hue or view.saturation)) for view in views)
    stain = any(view.stain for view in views)
    if (colour or stain) and is_grey(samples):
        what = "hue, saturation and grey of the views do nothing" if colour else "stain jitter tints them"
        told.append(f"the images are grey: {what}; --modality xray is for radiographs.")
    return told


def is_grey(samples: Samples) -> bool:
    """Whether the training images are grey, by some of them from all over the set."""
    train = samples.where("train")
    looked = False
    for index in train[np.linspace(0, len(train) - 1, min(LOOKED_AT, len(train))).astype(np.int64)]:
        try:
            image = samples.image(int(index))
        except BadImage:
            continue  # it broke since the scan; the loader will say so
        if (image[..., :1] != image[..., 1:]).any():
            return False
        looked = True
    return looked
