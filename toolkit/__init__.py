"""Medical images with unreliable labels become classifiers that hospitals can serve."""

if __name__ != "noisyssl":
    raise ImportError(
        "folder toolkit/ is the package noisyssl: run `pip install -e .` and import noisyssl instead"
    )

__version__ = "0.1.0"
