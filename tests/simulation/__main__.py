"""Replay seeds:  python -m simulation SEED [LAST] [--trace]  (in tests)."""

from __future__ import annotations

import argparse
import sys
import time

from simulation.machine import play


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation")
    parser.add_argument("seed", type=int)
    parser.add_argument("last", type=int, nargs="?", help="run all up to this one")
    parser.add_argument("--trace", action="store_true", help="print all that happened")
    asked = parser.parse_args()
    began_s = time.perf_counter()
    seeds = range(asked.seed, (asked.last or asked.seed) + 1)
    found = 0
    for seed in seeds:
        report = play(seed)
        if asked.trace:
            _say("\n".join(map(str, report.trace)))
        if report.complaint:
            found += 1
            _say(report.told() if not asked.trace else f"seed {seed}: {report.complaint}")
    took_s = time.perf_counter() - began_s
    sys.stderr.write(f"{len(seeds)} seeds, {found} complaints, {took_s:.1f} s\n")
    return bool(found)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
