"""Leaving training: bundles, exports, runtimes. Its serving half needs neither torch nor DALI."""

if __name__ != "noisyssl.deploy":
    raise ImportError(
        "folder deploy/ is the package noisyssl.deploy: run `pip install -e .`, then import that name"
    )
