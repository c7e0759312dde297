"""Every test runs offline and on one thread; set before any library reads the environment."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other

os.environ["HALOS_CACHE"] = tempfile.mkdtemp(prefix="halos-cache-")
atexit.register(shutil.rmtree, os.environ["HALOS_CACHE"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Only tests that are marked so may start ranks, their fixtures too: ``make test-fast`` leaves them out."""
    if fork := sys.modules.get("tests.fork"):
        fork.allowed = item.get_closest_marker("ranks") is not None  # type: ignore[attr-defined]


def pytest_collection_finish() -> None:
    """What the libraries hold lives as long as the process: the garbage collector need not go through it each time."""
    gc.collect()
    gc.freeze()
