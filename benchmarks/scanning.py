"""How fast is `data check`, and does it find every kind of broken file without a false alarm?"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from noisyssl.benchmarks import image_zoo
from noisyssl.benchmarks.measure import interleaved, rate
from noisyssl.benchmarks.records import Record, record
from noisyssl.pipelines.scan import check


def measure(good: int = 1000, each: int = 10, size: int = 224, threads: int = 2, runs: int = 5) -> Record:
    """The record of scanning `good` good files of all supported kinds and `each` broken ones of every kind.

    Every run has an empty cache, so each decodes all files; the files themselves stay in the memory of the
    operating system. `false_alarms` are good files called bad, `found` broken ones with the right reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = image_zoo.good(root / "good", good, size)
        broken = image_zoo.bad(root / "bad", each)

        def scan(part: str) -> dict[str, str]:
            with empty_cache():
                return dict(check(root / part, threads=threads).bad)

        seconds = interleaved({"scan": lambda: scan("good")}, warm=1, runs=runs)["scan"]
        said, reasons = scan("good"), scan("bad")
    right = sum(image_zoo.REASONS[kind] in reasons.get(name, "") for name, kind in broken.items())
    speed = rate(len(names), seconds)
    return record(
        "scan",
        settings={"good": len(names), "kinds": len(set(names.values())), "size": size, "threads": threads},
        figures={
            "images_per_s": speed.median,
            "broken": len(broken),
            "found": right,
            "false_alarms": len(said),
        },
        n=runs,
        spread={"images_per_s": speed},
    )


@contextmanager
def empty_cache() -> Iterator[None]:
    """Makes `check` scan everything anew: its cache is an empty folder for the time being."""
    before = os.environ.get("NOISYSSL_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NOISYSSL_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("NOISYSSL_CACHE")
            if before is not None:
                os.environ["NOISYSSL_CACHE"] = before
