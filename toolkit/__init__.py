"""Medical images with unreliable labels become classifiers that hospitals can serve."""

import os

if __name__ != "noisyssl":
    raise ImportError(
        "folder toolkit/ is the package noisyssl: run `pip install -e .`, then import that name"
    )

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later reports every session (names and hashes of models, an identifier of the machine)
# to its maker unless this is set before it is imported. A hospital's server speaks to nobody unasked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
