"""Medical images with unreliable labels become classifiers that hospitals can serve."""

if __name__ != "noisyssl":
    raise ImportError(
        "folder toolkit/ is the package noisyssl: run `pip install -e .`, then import that name"
    )

__version__ = "0.1.0"
