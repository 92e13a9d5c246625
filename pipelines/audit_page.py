"""A page to judge suspicious labels by eye: images with keep, relabel or drop, saved as `audit.csv`."""

import base64
import html
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from noisyssl.geometry import evaluation_view
from noisyssl.pipelines.audit import Audit
from noisyssl.pipelines.samples import Samples

SIDE = 160
"""Pixels of a picture."""

PAGE = Path(__file__).with_name("audit_page.html")


def page(found: Audit, samples: Samples, shown: int, flagged: str, size: int, fit: str, threads: int) -> str:
    """The page of the `shown` most suspicious images; it loads nothing from elsewhere.

    Args:
        flagged: what is chosen beforehand for flagged images.
        size: pixels of the evaluation view that a picture is made of.
        fit: how an image becomes square.
        threads: that decode.
    """
    from noisyssl.pipelines.tables import quote

    order = found.order()[:shown]

    def card(place: int) -> dict[str, str]:
        row = int(found.rows[place])
        label, suggested = (samples.classes[i] for i in (found.labels[place], found.suggested[place]))
        return {
            "path": samples.paths[row],
            "label": label,
            "suggested": suggested,
            "quoted": quote(samples.paths[row]),
            "quoted_label": quote(label),
            "quoted_suggested": quote(suggested),
            "score": f"{found.score[place]:.6f}",
            "decision": flagged if found.flagged[place] else "keep",
            "picture": picture(evaluation_view(samples.image(row), max(size, SIDE), fit)),
        }

    with ThreadPoolExecutor(threads) as pool:
        rows = list(pool.map(card, order.tolist()))
    rate, low, high = found.rate
    summary = (
        f"{len(found.rows):,} labels; about {rate:.1%} are wrong (95 % interval {low:.1%} to {high:.1%}); "
        f"{int(found.flagged.sum()):,} are flagged."
    )
    told = f"The {len(rows):,} most suspicious are shown."
    text = (
        PAGE.read_text(encoding="utf-8")
        .replace("@SUMMARY@", html.escape(summary))
        .replace("@SHOWN@", html.escape(told))
    )
    return text.replace(
        "@ROWS@", json.dumps(rows).replace("<", "\\u003c")
    )  # "</script>" would end the script


def picture(view: np.ndarray) -> str:
    """A small JPEG in base64."""
    image = Image.fromarray(view).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
