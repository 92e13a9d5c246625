"""What all tests share: no cache outside the test's folders, and one painted data set."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Scans of generated data stay out of the user's cache."""
    os.environ["NOISYSSL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tissue(tmp_path_factory) -> Path:
    """The manifest of 270 painted images of 32 pixels; read only."""
    from noisyssl.pipelines.generate import generate

    folder = tmp_path_factory.mktemp("data") / "tissue"
    generate(folder, count=270, size=32, seed=0)
    return folder / "manifest.csv"
