"""Nine kinds of tissue, painted as stain densities.

The kinds differ in what stands where (nuclei, glands, fibres, vacuoles, streaks); how much stain they hold is
levelled afterwards. Some look alike, as in colon sections: muscle and stroma, lymphocytes and debris, mucosa
and tumour, mucus and stroma.
"""

from collections.abc import Callable

import numpy as np

from noisyssl.pipelines.canvas import FIELD, Canvas


def adipose(c: Canvas) -> None:
    """Large empty vacuoles between thin membranes; a flat nucleus here and there."""
    y, x = c.scatter(float(c.uniform(15, 22)), 0.3)
    near, second = c.cells(y, x)
    width = c.uniform(0.9, 1.5) * (1 + 0.3 * c.smooth(8))
    wall = np.exp(-np.square((second - near) / (1.6 * width)))
    c.eosin += 0.10 + 0.9 * wall + 0.05 * c.smooth(6)
    c.haematoxylin += 0.05 + 0.25 * wall
    spots = c.rng.choice(np.flatnonzero(wall > 0.8), int(c.rng.integers(2, 7)))
    c.nuclei(c.y.ravel()[spots], c.x.ravel()[spots], (0.8, 1.2), length=2.5)


def background(c: Canvas) -> None:
    """Glass with a film of stain, uneven light and a little dust."""
    c.eosin += 0.07 + 0.02 * c.smooth(float(c.uniform(10, 30)))
    c.haematoxylin += 0.07 + 0.02 * c.smooth(float(c.uniform(10, 30)))
    count = int(c.rng.integers(0, 5))
    c.nuclei(c.uniform(0, FIELD, count), c.uniform(0, FIELD, count), (0.4, 2.0), lumpy=0.3, dark=(0.05, 0.3))


def debris(c: Canvas) -> None:
    """Necrosis: granular eosin in clouds, fragments of nuclei of every size."""
    cloud = np.clip(0.6 + 0.35 * c.smooth(7), 0.1, 2)
    c.eosin += cloud * np.clip(0.8 + 0.35 * c.smooth(1.3), 0, 2)
    c.haematoxylin += 0.15 * cloud
    y, x = c.scatter(float(c.uniform(5, 7)), 0.5, float(c.uniform(0.5, 0.9)))
    c.nuclei(y, x, (0.5, 1.4), length=1.3, lumpy=0.35, rim=0.0, dark=(0.6, 1.3))
    y, x = c.scatter(11, 0.5, float(c.uniform(0.3, 0.7)))
    c.nuclei(y, x, (1.6, 2.9), length=1.2, lumpy=0.35, rim=0.15, dark=(0.3, 1.0))


def lymphocytes(c: Canvas) -> None:
    """Small round dark nuclei, packed, all alike."""
    c.eosin += 0.5 + 0.12 * c.smooth(4)
    c.haematoxylin += 0.12
    y, x = c.scatter(float(c.uniform(5.2, 7.0)), 0.28, float(c.uniform(0.7, 0.95)))
    c.nuclei(y, x, (1.8, 2.4), length=1.1, lumpy=0.08, rim=0.15, dark=(0.7, 1.2))


def mucus(c: Canvas) -> None:
    """Pale pools with wispy streaks that curl; few cells."""
    angle = float(c.uniform(0, np.pi))
    wisps = c.fibres(angle, float(c.uniform(5, 9)), 14, float(c.uniform(4, 8)), 0.4)
    pools = np.clip(0.5 + 0.5 * c.smooth(9), 0, 2)
    c.eosin += 0.2 + 0.6 * wisps * pools
    c.haematoxylin += 0.25 + 0.45 * wisps * pools + 0.05 * c.smooth(5)
    y, x = c.scatter(16, 0.5, float(c.uniform(0.2, 0.7)))
    c.nuclei(y, x, (1.2, 2.2), length=1.3, lumpy=0.15)


def muscle(c: Canvas) -> None:
    """Broad parallel bundles that wave together, blunt nuclei along them."""
    angle = float(c.uniform(0, np.pi))
    bundles = c.fibres(angle, float(c.uniform(1.0, 2.5)), 22, float(c.uniform(6.0, 8.5)), 0.15)
    c.eosin += 0.3 + 0.6 * bundles + 0.06 * c.smooth(2)
    c.haematoxylin += 0.12 + 0.06 * bundles
    y, x = c.scatter(float(c.uniform(9, 13)), 0.45, float(c.uniform(0.4, 0.8)))
    c.nuclei(y, x, (1.0, 1.6), length=3.2, angle=angle + c.uniform(-0.12, 0.12, y.size), dark=(0.6, 1.0))


def stroma(c: Canvas) -> None:
    """Thin collagen fibres that wander, thin pointed nuclei roughly along them."""
    angle = float(c.uniform(0, np.pi))
    fibres = c.fibres(angle, float(c.uniform(3.0, 5.0)), 11, float(c.uniform(2.8, 4.2)), 0.25)
    c.eosin += 0.3 + 0.6 * fibres * np.clip(0.9 + 0.3 * c.smooth(8), 0, 2)
    c.haematoxylin += 0.12 + 0.06 * fibres
    y, x = c.scatter(float(c.uniform(9, 13)), 0.45, float(c.uniform(0.4, 0.8)))
    c.nuclei(y, x, (0.8, 1.3), length=3.2, angle=angle + c.uniform(-0.6, 0.6, y.size), dark=(0.6, 1.0))


def _glands(c: Canvas, spacing: float, oval: float, warp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radius of each pixel within its gland (1 at the wall), and the (N,) centres."""
    y, x = c.scatter(spacing, 0.12)
    near, _ = c.cells(y, x, float(c.uniform(1, oval)), float(c.uniform(0, np.pi)))
    radius = near / (0.46 * spacing) + warp * c.smooth(6)
    return radius, y, x


def mucosa(c: Canvas) -> None:
    """Round glands side by side: one ring of even nuclei at the wall, goblet cells, a round lumen."""
    spacing = float(c.uniform(23, 31))
    radius, gy, gx = _glands(c, spacing, 1.15, 0.05)
    lumen, epithelium = radius < c.uniform(0.18, 0.32), radius < 1
    c.eosin += np.where(
        lumen, 0.1, np.where(epithelium, 0.45 + 0.1 * c.smooth(2.5), 0.6 + 0.15 * c.smooth(2))
    )
    c.haematoxylin += np.where(epithelium & ~lumen, 0.2, 0.1)
    around = int(0.39 * spacing * 2 * np.pi / 4.2)
    phi = np.arange(around) * (2 * np.pi / around) + c.uniform(0, 7)
    y = (gy[:, None] + 0.39 * spacing * np.sin(phi)).ravel() + c.uniform(-0.5, 0.5, gy.size * around)
    x = (gx[:, None] + 0.39 * spacing * np.cos(phi)).ravel() + c.uniform(-0.5, 0.5, gy.size * around)
    c.nuclei(y, x, (1.3, 1.7), length=1.4, angle=np.tile(phi, gy.size), dark=(0.7, 1.0))
    y, x = c.scatter(7, 0.4, 0.7)
    between = c.at(radius, y, x) > 1.05
    c.nuclei(y[between], x[between], (1.1, 1.7), length=1.5)


def tumour(c: Canvas) -> None:
    """Crowded crooked glands: large pale nuclei of uneven size in several layers, slit-like lumina."""
    spacing = float(c.uniform(22, 32))
    radius, _, _ = _glands(c, spacing, 1.5, 0.16)
    lumen, epithelium = radius < c.uniform(0.12, 0.3), radius < 1.05
    c.eosin += np.where(
        lumen, 0.1, np.where(epithelium, 0.45 + 0.1 * c.smooth(2.5), 0.6 + 0.15 * c.smooth(2))
    )
    c.haematoxylin += np.where(epithelium & ~lumen, 0.2, 0.1)
    y, x = c.scatter(float(c.uniform(5.2, 6.8)), 0.3, float(c.uniform(0.8, 0.95)))
    depth = c.at(radius, y, x)
    inside = (depth > 0.38) & (depth < 1.02)
    c.nuclei(y[inside], x[inside], (1.7, 3.3), length=1.35, lumpy=0.2, rim=0.5, dark=(0.6, 1.1))
    outside = depth > 1.1
    c.nuclei(y[outside], x[outside], (0.9, 1.4), length=2)


KINDS: dict[str, Callable[[Canvas], None]] = {
    "adipose": adipose,
    "background": background,
    "debris": debris,
    "lymphocytes": lymphocytes,
    "mucus": mucus,
    "muscle": muscle,
    "normal_mucosa": mucosa,
    "stroma": stroma,
    "tumour_epithelium": tumour,
}
"""The classes in label order."""
