"""What one augmented copy of an image is: probabilities and ranges only.

How it is computed is said twice, from the same draws: `pipelines.dali` and `pipelines.batched`.
"""

from dataclasses import dataclass

from noisyssl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One augmented copy: crop and resize, then flips, then blur, then colour.

    Colour is one affine map per image (hue, saturation, contrast about mid-grey, brightness, in this
    order). It commutes with the blur, so only the end is clamped and rounded to bytes, and both
    implementations compute the same thing.
    """

    size: int
    """Height and width in pixels."""
    area: tuple[float, float] = (1.0, 1.0)
    """Crop area as a fraction of the image; (1, 1) with ratio (1, 1) is the evaluation view's centre crop."""
    ratio: tuple[float, float] = (1.0, 1.0)
    """Width / height of the crop, drawn log-uniformly."""
    flip: float = 0.0
    """Probability of a left-right flip."""
    upside: float = 0.0
    """Probability of an upside-down flip."""
    jitter: float = 0.0
    """Probability that the four colour factors below are drawn."""
    brightness: float = 0.0
    """Factor in [1 - x, 1 + x]."""
    contrast: float = 0.0
    """Factor in [1 - x, 1 + x], about mid-grey."""
    saturation: float = 0.0
    """Factor in [1 - x, 1 + x]; 0 is grey."""
    hue: float = 0.0
    """Rotation in [-x, x] turns of the hue circle, at most 0.5."""
    grey: float = 0.0
    """Probability that the copy is turned grey."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside its range."""
        if self.size < 8:
            raise ConfigError(f"data.size is {self.size}; it must be at least 8 pixels.")
        for name in ("flip", "upside", "jitter", "grey", "blur"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name} probability of a view is {value}; it must lie in [0, 1].")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"crop area of a view is {self.area}; it must be a range within (0, 1].")


def evaluation(size: int) -> View:
    """The view that figures, gates and `predict` use: no randomness at all."""
    return View(size=size)


def training(size: int) -> tuple[View, ...]:
    """The one view of supervised training: a moderate crop, a flip, mild colour."""
    return (
        View(
            size=size, area=(0.5, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5,
            jitter=0.8, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02,
        ),
    )  # fmt: skip


def pair(size: int) -> tuple[View, ...]:
    """Two strong views of one sample, SimCLR's (arXiv:2002.05709, appendix A) at strength 0.5.

    Blur scales with the view: sigma is 0.1-2.0 at 224 pixels.
    """
    view = View(
        size=size, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5,
        jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
        grey=0.2, blur=0.5, sigma=(0.1, max(0.2, 2.0 * size / 224)),
    )  # fmt: skip
    return view, view
