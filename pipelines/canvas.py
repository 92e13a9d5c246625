"""The brushes of generated tissue: smooth noise, nuclei, fibres and cells as densities of two stains."""

from functools import lru_cache

import numpy as np

FIELD = 64.0
"""Width of a tile in units of length; at 64 pixels a unit is a pixel, larger tiles show the same finer."""


@lru_cache(maxsize=64)
def _basis(size: int, scale: float) -> np.ndarray:
    """(size, K) bumps of width `scale` units: `basis @ noise @ basis.T` is smooth noise of variance 1."""
    at = (np.arange(size) + 0.5) * (FIELD / size)
    knots = np.arange(-scale, FIELD + 2 * scale, scale)
    bumps = np.exp(-0.5 * ((at[:, None] - knots) / (0.7 * scale)) ** 2)
    return (bumps / np.linalg.norm(bumps, axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    at = ((np.arange(size) + 0.5) * (FIELD / size)).astype(np.float32)
    y, x = np.meshgrid(at, at, indexing="ij")
    return y, x


class Canvas:
    """Densities of one tile while it is painted; every length is in units of a 64th of the tile."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.size = size
        self.y, self.x = _grid(size)
        self.haematoxylin = np.zeros((size, size), np.float32)
        self.eosin = np.zeros((size, size), np.float32)

    def smooth(self, scale: float) -> np.ndarray:
        """(size, size) Gaussian noise of variance 1, correlated over about `scale` units."""
        basis = _basis(self.size, scale)
        knots = basis.shape[1]
        return basis @ self.rng.standard_normal((knots, knots), np.float32) @ basis.T

    def uniform(self, low: float, high: float, count: int | None = None) -> np.ndarray:
        return np.asarray(self.rng.uniform(low, high, count), np.float32)

    def scatter(self, spacing: float, jitter: float, keep: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """(N,) y and (N,) x of a jittered hexagonal arrangement that reaches past the edges."""
        lines = np.arange(-spacing, FIELD + spacing, spacing * 0.87, dtype=np.float32)
        steps = np.arange(-spacing, FIELD + spacing, spacing, dtype=np.float32)
        y = np.repeat(lines, steps.size) + self.uniform(-1, 1) * spacing / 2
        x = (steps[None] + (np.arange(lines.size) % 2)[:, None] * spacing / 2).ravel()
        y = y + self.uniform(-1, 1, y.size) * jitter * spacing
        x = x + self.uniform(-1, 1, x.size) * jitter * spacing
        kept = self.rng.random(y.size) < keep
        return y[kept], x[kept]

    def nuclei(
        self,
        y: np.ndarray,
        x: np.ndarray,
        radius: tuple[float, float],
        *,
        length: float = 1.0,
        angle: np.ndarray | float | None = None,
        lumpy: float = 0.1,
        rim: float = 0.2,
        dark: tuple[float, float] = (0.7, 1.1),
    ) -> None:
        """Stamps one nucleus at each (y, x) into the haematoxylin.

        Args:
            radius: range of the short half axis.
            length: long half axis / short one, about.
            angle: direction of the long axis in radians; drawn when None.
            lumpy: how far the outline leaves the ellipse.
            rim: how much paler the inside is than the membrane.
            dark: range of the density.
        """
        seen = (y > -8) & (y < FIELD + 8) & (x > -8) & (x < FIELD + 8)
        y, x = y[seen], x[seen]
        count = y.size
        if not count:
            return
        scale = self.size / FIELD
        short = self.uniform(*radius, count)
        long = short * np.maximum(1, length * self.uniform(0.8, 1.2, count))
        turn = self.uniform(0, np.pi, count) if angle is None else np.broadcast_to(angle, seen.shape)[seen]
        reach = int(np.ceil(float(long.max()) * 1.2 * scale)) + 1
        offset = np.arange(-reach, reach + 1)
        row = np.floor(y * scale).astype(np.int64)
        column = np.floor(x * scale).astype(np.int64)
        dy = (((row[:, None] + offset + 0.5) / scale) - y[:, None]).astype(np.float32)[:, :, None]
        dx = (((column[:, None] + offset + 0.5) / scale) - x[:, None]).astype(np.float32)[:, None, :]
        cos, sin = (f(turn).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        u = (dx * cos + dy * sin) / long[:, None, None]
        v = (dy * cos - dx * sin) / short[:, None, None]
        rho = np.sqrt(u * u + v * v) + 1e-6
        c = u / rho
        bump = self.uniform(-lumpy, lumpy, count)[:, None, None]
        rho = rho * (1 + bump * (4 * c * c * c - 3 * c))  # cos 3 phi, without computing phi
        edge = np.clip((1 - rho) * short[:, None, None] * scale + 0.5, 0, 1)
        inside = (1 - rim * np.clip(1.3 - 1.6 * rho, 0, 1)) * self.uniform(*dark, count)[:, None, None]
        pad = reach + int(8 * scale) + 2
        wide = self.size + 2 * pad
        padded = np.zeros(wide * wide, np.float32)
        index = (row[:, None, None] + offset[:, None] + pad) * wide + column[:, None, None] + offset + pad
        np.maximum.at(padded, index.ravel(), (edge * inside).ravel())
        stamped = padded.reshape(wide, wide)[pad:-pad, pad:-pad]
        np.maximum(self.haematoxylin, stamped, out=self.haematoxylin)

    def fibres(self, angle: float, waviness: float, bend: float, pitch: float, gap: float) -> np.ndarray:
        """(size, size) in [0, 1]: bundles along `angle`, about `pitch` apart, `gap` of the width empty."""
        across = self.y * np.cos(angle) - self.x * np.sin(angle) + waviness * self.smooth(bend)
        knots = np.arange(-128.0, 192.0, pitch / 2)
        heights = np.where(np.arange(knots.size) % 2, 1.0, 0.0) + self.uniform(-0.35, 0.35, knots.size)
        profile = np.interp(across, knots + self.uniform(-0.2, 0.2, knots.size) * pitch, heights)
        return np.clip((profile - gap) / (1 - gap) + 0.1, 0, 1).astype(np.float32)

    def cells(
        self, y: np.ndarray, x: np.ndarray, stretch: float = 1.0, turn: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distance of each pixel to the nearest and to the second nearest of the (N,) centres.

        Distances along the direction `turn` (radians) are divided by `stretch`, those across it multiplied.
        """
        cos, sin = np.cos(turn), np.sin(turn)
        near = np.full((self.size, self.size), np.inf, np.float32)
        second = near.copy()
        along, across = (self.x * cos + self.y * sin) / stretch, (self.y * cos - self.x * sin) * stretch
        for u, v in zip((x * cos + y * sin) / stretch, (y * cos - x * sin) * stretch, strict=True):
            square = np.square(along - u)
            square += np.square(across - v)
            np.minimum(second, np.maximum(near, square), out=second)
            np.minimum(near, square, out=near)
        return np.sqrt(near), np.sqrt(second)

    def at(self, picture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(N,) values of a (size, size) picture at the pixels nearest to (y, x)."""
        scale = self.size / FIELD
        row, column = (np.clip((v * scale).astype(np.int64), 0, self.size - 1) for v in (y, x))
        return picture[row, column]
