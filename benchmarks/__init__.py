"""One script per question; every measured number becomes a record."""

if __name__ != "noisyssl.benchmarks":
    raise ImportError(
        "folder benchmarks/ is the package noisyssl.benchmarks: run `pip install -e .`, then import that name"
    )
