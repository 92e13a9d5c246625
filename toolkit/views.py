"""What one augmented copy of an image is: probabilities and ranges only.

How it is computed is said twice, from the same draws: `pipelines.compiled` and `pipelines.batched`.
`adapt` fits a view to what the images are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from noisyssl.errors import ConfigError, pick


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One augmented copy. In this order:

    1. crop and resize, with the flips;
    2. stain: the optical densities of haematoxylin, eosin and DAB, each c -> factor * c + shift;
    3. blur;
    4. colour: one affine map per image (hue, saturation, contrast about mid-grey, brightness, in this order);
    5. quarter turn;
    6. rotation by a small angle;
    7. solarisation;
    8. JPEG compression.

    Blur and colour commute, so they are clamped and rounded to bytes once, after both; every other step
    that happens gives bytes. All implementations compute the same thing.
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
    turn: float = 0.0
    """Probability of a quarter turn, one of all four (0, 90, 180, 270 degrees) alike: at 1 every way up is
    equally likely, and with `flip` at 0.5 also every mirror image."""
    angle: float = 0.0
    """Rotation in [-x, x] degrees, at most 45, about the centre. What lies outside repeats the border: that
    smears a few pixels, where a reflection invents mirrored anatomy and black a collimator's edge."""
    stain: float = 0.0
    """Probability that the two stain numbers below are drawn, for each of the three stains."""
    stain_factor: float = 0.0
    """Factor on a stain's amount in [1 - x, 1 + x]."""
    stain_shift: float = 0.0
    """Added to a stain's amount, in [-x, x] of optical density (natural logarithm)."""
    solarise: float = 0.0
    """Probability that values of 128 and above are inverted."""
    jpeg: float = 0.0
    """Probability of a JPEG compression (chroma 4:2:0, as most files have it)."""
    quality: tuple[int, int] = (50, 95)
    """Range of its quality, 1 to 100."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside its range."""
        if self.size < 8:
            raise ConfigError(f"data.size is {self.size}; it must be at least 8 pixels.")
        for name in ("flip", "upside", "jitter", "grey", "blur", "turn", "stain", "solarise", "jpeg"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name} probability of a view is {value}; it must lie in [0, 1].")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"crop area of a view is {self.area}; it must be a range within (0, 1].")
        if not 0 <= self.angle <= 45:
            raise ConfigError(f"angle of a view is {self.angle} degrees; it must lie in [0, 45].")
        if self.stain_factor < 0 or self.stain_shift < 0:
            raise ConfigError(
                f"stain factor and shift of a view are {self.stain_factor} and {self.stain_shift}; "
                "they must be 0 or above."
            )
        if not 1 <= self.quality[0] <= self.quality[1] <= 100:
            raise ConfigError(
                f"JPEG quality of a view is {self.quality}; it must be a range within 1 to 100."
            )


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


def asymmetric_pair(size: int) -> tuple[View, ...]:
    """BYOL's two views (arXiv:2006.07733, appendix B): one always blurred, one at times solarised.

    Barlow Twins, VICReg, MoCo v3 and DINO took them over. The crop and the range of the blur stay `pair`'s.
    """
    first, second = (replace(view, saturation=0.2) for view in pair(size))
    return replace(first, blur=1.0), replace(second, blur=0.1, solarise=0.2)


def natural(view: View) -> View:
    """As the method's paper has it."""
    return view


def histology(view: View) -> View:
    """Stained tissue: no side is up or left, and colour is a matter of the laboratory, within its stains.

    A network that never saw turned tissue is not invariant to it (Elphick et al. 2024, arXiv:2412.11938).
    Stain jitter follows the saturation jitter that it replaces: 0.2 for SimCLR's views, the "strong" one of
    Tellez et al. 2019 (arXiv:1902.06543), and half of that as shift, or the glass would be dyed too.
    """
    if view.flip or view.upside:
        view = replace(view, flip=0.5, upside=0.5, turn=1.0)
    if view.jitter and (view.hue or view.saturation):
        factor = 0.5 * view.saturation or view.hue
        view = replace(
            view, hue=0.0, saturation=0.0, stain=view.jitter, stain_factor=factor, stain_shift=0.5 * factor
        )
    return replace(view, solarise=0.0)


def xray(view: View) -> View:
    """Radiographs: the heart is on one side, there is no colour, and patients stand a little askew.

    Rotation by 10 degrees as in MoCo-CXR (Sowrirajan et al., MIDL 2021, arXiv:2010.05352); against that paper
    no mirror image, which would be situs inversus. Compression differs between archives, often by class.
    """
    if view.flip or view.upside:
        view = replace(view, flip=0.0, upside=0.0, angle=10.0, jpeg=0.5, quality=(40, 95))
    return replace(_unburnt(view), hue=0.0, saturation=0.0, grey=0.0, solarise=0.0)


def fundus(view: View) -> View:
    """Photographs of the retina: colour is a finding, heads tilt, and a mirror image is nearly the other eye.

    Nearly: networks tell a mirrored left eye from a right one (Kang et al., Scientific Reports 12, 2022,
    doi 10.1038/s41598-021-04323-3). The flip stays, as in RETFound (Zhou et al., Nature 622, 2023): which
    disease an eye has does not hang on its side. Upside down it is no eye. Mild colour: Cheng et al. (MIDL
    2025, arXiv:2501.02451) find weak augmentation better on these images.
    """
    if view.flip or view.upside:
        view = replace(view, upside=0.0, angle=15.0)
    hue, saturation = min(view.hue, 0.02), min(view.saturation, 0.2)
    return replace(_unburnt(view), hue=hue, saturation=saturation, grey=0.0, solarise=0.0)


def _unburnt(view: View) -> View:
    """At 0.4 one chest film in thirty burns out over a fifth of its area, at 0.3 one in a hundred."""
    return replace(view, brightness=min(view.brightness, 0.3), contrast=min(view.contrast, 0.3))


MODALITIES: dict[str, Callable[[View], View]] = {
    "natural": natural,
    "histology": histology,
    "xray": xray,
    "fundus": fundus,
}
"""What the images are (`data.modality`): how a view changes for them.

What depends on direction (turns, JPEG blocks) is only added to views that flip: a method that does not flip
may live on orientation, as Rotation and Jigsaw do.
"""
TURNABLE = frozenset({"histology"})
"""Modalities without an up direction."""


def adapt(view: View, modality: str) -> View:
    """`view` as it suits images of this modality.

    Raises:
        ConfigError: unknown modality.
    """
    return pick(MODALITIES, modality, "data.modality")(view)
