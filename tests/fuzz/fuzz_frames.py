"""Fuzz everything that reads a peer's bytes. By hand, from the repository's root:

    python -m tests.fuzz.fuzz_frames --inputs 1000000 --seed 0
    python -m tests.fuzz.fuzz_frames --seed 0 --only 4711    # one input again, with its traceback

Input n of a seed is always the same one. Exits with 1 at the first input that breaks something.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

from tests.fuzz.hostile_frames import HostileFrames
from tests.fuzz.targets import PEAK_BYTES, TARGETS, peak_bytes

MEASURED_EACH = 50
"""For every so-manieth input the memory is measured."""
_NAMES, _WEIGHTS = [target for target, _ in TARGETS], [weight for _, weight in TARGETS]


def run_input(seed: int, number: int) -> tuple[str, int]:
    """The target's name, and the most memory it held (0: not measured). Raises what the input has broken."""
    rng = random.Random((seed << 40) | number)
    [target] = rng.choices(_NAMES, _WEIGHTS)
    hostile = HostileFrames(rng)
    if number % MEASURED_EACH:
        target(hostile)
        return target.__name__, 0
    peak = peak_bytes(target, hostile)
    assert peak <= PEAK_BYTES, f"{peak} bytes were allocated; the bound is {PEAK_BYTES}"
    return target.__name__, peak


def run(seed: int, numbers: range) -> tuple[Counter[str], int]:
    """How many inputs each target got, and the largest peak. Raises with a note that names the input."""
    counts: Counter[str] = Counter()
    largest = 0
    for number in numbers:
        try:
            name, peak = run_input(seed, number)
        except BaseException as error:
            error.add_note(f"again: python -m tests.fuzz.fuzz_frames --seed {seed} --only {number}")
            raise
        counts[name] += 1
        largest = max(largest, peak)
    return counts, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    arguments = parser.parse_args()
    numbers = range(arguments.inputs) if arguments.only is None else range(arguments.only, arguments.only + 1)
    started_s = time.monotonic()
    counts, largest = run(arguments.seed, numbers)
    print(f"{len(numbers)} inputs in {time.monotonic() - started_s:.1f} s, seed {arguments.seed}: nothing found")
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"most memory at once: {largest} bytes (bound {PEAK_BYTES})")


if __name__ == "__main__":
    sys.exit(main())
