"""The report's plots, as inline SVG that takes its colours and its typeface from the page around it.

matplotlib draws with placeholder colours; each becomes a CSS variable, so one drawing serves light and dark.
The palette is Okabe and Ito's, told apart by colour-blind readers; lines carry their names at their ends.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from noisyssl.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "blue": "#040404",
    "orange": "#050505",
    "green": "#060606",
    "purple": "#070707",
    "sky": "#080808",
    "amber": "#090909",
}
"""Name of the CSS variable -> the placeholder that is drawn."""
TOLD = ("blue", "orange", "green", "purple", "sky", "amber", "ink")
"""Colours of classes; with as many `MARKERS`, each class differs from the next ones in both."""
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
MOST_TOLD = 21
"""Classes that a map tells apart."""
MOST_POINTS = 400
"""A line is thinned to this many points: more cannot be seen, and the page stays small."""
STYLE: Any = {
    "font.size": 8.5,
    "text.parse_math": False,  # a class called "$x" is text
    "svg.fonttype": "none",
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "text.color": COLOURS["ink"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One named line of a plot."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float | None]
    """None where there is no value."""
    band: Sequence[tuple[float, float]] | None = None
    """Lowest and highest y at each x, drawn pale behind the line."""


def curves(
    lines: Sequence[Line],
    *,
    x: str,
    mark: tuple[float, float, str] | None = None,
    log: bool = False,
    smooth: bool = False,
    whole: bool = True,
) -> str:
    """SVG of lines that share both axes; `mark` is (x, y, words) of one point to show.

    `smooth` draws more than 60 points pale behind their running mean. `log` draws a logarithmic y axis where
    all values are positive. `whole` marks whole numbers of the x axis only.
    """
    with _drawing(4.4, 2.7) as (axes, svg):
        ends = []
        for line in lines:
            xs, ys = _finite(line.x, line.y)
            if not len(xs):
                continue
            noisy = smooth and len(xs) > 60
            drawn = _running_mean(ys, max(3, len(ys) // 25)) if noisy else ys
            keep = np.unique(np.linspace(0, len(xs) - 1, MOST_POINTS).astype(int))
            if noisy:
                axes.plot(xs[keep], ys[keep], color=COLOURS[line.colour], linewidth=0.7, alpha=0.3)
            style: dict[str, Any] = {"color": COLOURS[line.colour], "linewidth": 1.6}
            if len(xs) == len(line.x) > 1:
                axes.plot(xs[keep], drawn[keep], **style)
            else:  # with gaps: a line across them would claim values that nobody measured
                values = [float("nan") if value is None else value for value in line.y]
                axes.plot(line.x, values, marker="o", markersize=3, **style)
            if line.band is not None:
                low, high = np.array(line.band).T
                axes.fill_between(line.x, low, high, color=COLOURS[line.colour], alpha=0.15, linewidth=0)
            ends.append((float(drawn[-1]), float(xs[-1]), line))
        if log and all(value > 0 for line in lines for value in line.y if value is not None):
            axes.set_yscale("log")
        if mark:
            axes.axvline(mark[0], color=COLOURS["ink"], linewidth=0.8, linestyle=(0, (2, 2)))
            axes.plot([mark[0]], [mark[1]], "o", color=COLOURS["ink"], markersize=5)
            side = "right" if mark[0] > np.mean(axes.get_xlim()) else "left"
            shift = (-5 if side == "right" else 5, 2)
            axes.annotate(
                mark[2],
                (mark[0], 0.0),
                shift,
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha=side,
                va="bottom",
                fontweight="bold",
            )
        axes.set_xlabel(x)
        axes.locator_params(axis="x", nbins=8, integer=whole)
        axes.set_xlim(left=0)
        _label_ends(axes, ends if len(lines) > 1 else [])
        return svg()


def reliability(bins: Iterable[dict[str, float | None]]) -> str:
    """SVG of accuracy against confidence: one dot per bin, its area the share of images."""
    full = [one for one in bins if one["count"] and one["accuracy"] is not None]
    confidence, accuracy, count = (
        np.array([one[key] or 0.0 for one in full], dtype=float)
        for key in ("confidence", "accuracy", "count")
    )
    with _drawing(3.3, 3.1, square=True) as (axes, svg):
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1, linestyle=(0, (2, 2)))
        axes.vlines(confidence, accuracy, confidence, color=COLOURS["orange"], linewidth=1.4)
        area = 160 * count / count.max() if len(full) else count
        axes.scatter(confidence, accuracy, s=8 + area, color=COLOURS["blue"], linewidth=0, zorder=3)
        axes.set_xlabel("confidence of the prediction")
        axes.set_ylabel("share that is right")
        return svg()


def risk(curve: Sequence[Sequence[float]]) -> str:
    """SVG of the share of wrong answers over the share of images that are answered, surest first."""
    coverage, wrong = np.asarray(curve, dtype=float).T
    with _drawing(4.4, 2.7) as (axes, svg):
        axes.fill_between(coverage, wrong, color=COLOURS["blue"], alpha=0.12, linewidth=0)
        axes.plot(coverage, wrong, color=COLOURS["blue"], linewidth=1.6)
        axes.set(xlim=(0, 1.02), ylim=(0, None))
        axes.set_xlabel("share of the images answered, surest first")
        axes.set_ylabel("share of them wrong")
        return svg()


def roc(false_rate: Sequence[float], true_rate: Sequence[float]) -> str:
    """SVG of one ROC curve; both rates rise from 0 to 1."""
    keep = np.unique(np.linspace(0, len(false_rate) - 1, MOST_POINTS).astype(int))
    x, y = np.asarray(false_rate)[keep], np.asarray(true_rate)[keep]
    with _drawing(1.9, 1.9, square=True) as (axes, svg):
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
        axes.fill_between(x, y, color=COLOURS["blue"], alpha=0.12, linewidth=0)
        axes.plot(x, y, color=COLOURS["blue"], linewidth=1.6)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        axes.set_xlabel("1 - specificity")
        axes.set_ylabel("sensitivity")
        return svg()


def scatter(points: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """SVG of (N, 2) points, a colour and a marker for each class with a legend; label -1 is unknown, in grey.

    With more than `MOST_TOLD` classes the most frequent ones are told apart and the others are grey.
    """
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    told = np.sort(np.argsort(-counts, kind="stable")[: min(MOST_TOLD, int((counts > 0).sum()))])
    others = ~np.isin(labels, told)
    with _drawing(7.2 if len(told) else 5.2, 4.6) as (axes, svg):
        axes.set_axis_off()
        axes.margins(0.02)
        style: dict[str, Any] = {"s": 24, "linewidth": 0, "alpha": 0.8}
        if others.any():
            name = " other classes" if len(counts) > MOST_TOLD else " no label"
            axes.scatter(*points[others].T, color=COLOURS["muted"], marker=".", label=name, **style)
        for place, k in enumerate(told.tolist()):
            marker = MARKERS[(place + place // len(MARKERS)) % len(MARKERS)]
            name = classes[k] if len(classes[k]) <= 28 else f"{classes[k][:27]}…"
            colour = COLOURS[TOLD[place % len(TOLD)]]
            # the space: matplotlib leaves names that start with "_" out of a legend
            axes.scatter(*points[labels == k].T, color=colour, marker=marker, label=f" {name}", **style)
        if len(told):
            axes.figure.legend(loc="outside right center", frameon=False, markerscale=1.5, handletextpad=0.1)
        return svg()


@contextmanager
def _drawing(width: float, height: float, square: bool = False) -> Iterator[tuple["Axes", Any]]:
    """Axes of this size in inches, and a function that returns what was drawn as SVG text."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MachineError(
            "package 'matplotlib' is missing; the report draws with it. Run `pip install 'noisyssl[report]'`."
        ) from None
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own typeface draws the text
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if square:
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")

        def svg() -> str:
            target = io.StringIO()
            figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
            return themed(target.getvalue())

        yield axes, svg


def themed(svg: str) -> str:
    """A plot's SVG as an HTML fragment: the page's colours and typeface, no prolog, ids or fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', "<svg", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # inherited from the page
    for name, placeholder in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg


def _label_ends(axes: "Axes", ends: list[tuple[float, float, Line]]) -> None:
    """Each line's name right of its last point, moved apart where they would touch."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    below = -np.inf
    for y, x, line in sorted(ends, key=lambda end: end[0]):
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        below = max(height, below + 0.09)
        axes.annotate(
            line.name,
            (1.02, below),
            xycoords="axes fraction",
            va="center",
            color=COLOURS[line.colour],
            fontweight="bold",
            annotation_clip=False,
        )


def _finite(x: Sequence[float], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = np.asarray(x, dtype=float), np.array([np.nan if v is None else v for v in y], dtype=float)
    keep = np.isfinite(xs) & np.isfinite(ys)
    return xs[keep], ys[keep]


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window that shrinks at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)
