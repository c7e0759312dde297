"""What the long campaigns of mutated files have in common."""

import faulthandler
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def attempt(name: str, seed: int, marker: Path, seconds: float) -> Iterator[None]:
    """Name the attempt in an error, and check that it took up to ``seconds`` and ran no payload.

    The limit is of the processor's time, so that a busy machine fails no attempt. One that waits is ended by the clock.

    Args:
        name: what is read.
        seed: of the campaign; both are what repeats the attempt.
        marker: the file that a payload would write.
        seconds: the limit.
    """
    start = time.process_time()
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    try:
        yield
    except BaseException:
        print(f"{name} of seed {seed}", file=sys.stderr)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.process_time() - start < seconds, name
    assert not marker.exists(), name


def main(fuzz: Callable[[int, int, Path], Counter[str]]) -> None:
    """Run a campaign in a temporary folder: ``python -m tests.fuzz_… [COUNT [SEED]]``."""
    logging.disable()
    warnings.filterwarnings("ignore")
    count, seed = (int(word) for word in (*sys.argv[1:], *("10000", "0")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        for outcome, times in sorted(fuzz(count, seed, Path(folder)).items()):
            print(f"{outcome}: {times:,}")
