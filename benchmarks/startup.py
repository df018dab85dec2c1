"""How long `flopprof --help` takes, which must not import torch: median of whole processes.

python benchmarks/startup.py [--runs 10]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    """Print the medians of `python -c pass` and of `python -m flopprof --help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="processes of each (default 10)")
    options = parser.parse_args()
    for name, arguments in (("python", ["-c", "pass"]), ("flopprof --help", ["-m", "flopprof", "--help"])):
        times = []
        for _ in range(options.runs + 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        print(f"{name:<16}{statistics.median(times[1:]):7.3f} s")


if __name__ == "__main__":
    main()
