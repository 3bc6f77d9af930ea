"""All benchmarks one after the other, each in a process of its own: ``python -m benchmarks [--quick] [--threads N]``.

Each writes its section of ``benchmarks/RESULTS.md``. What they need that an installation of dynlrp has not is in
``benchmarks/requirements.txt`` and ``benchmarks/libraries.txt``; ``make bench`` installs it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.results import RESULTS

SCRIPTS: dict[str, tuple[str, ...]] = {
    "exactness": ("--quick",),
    "speed": ("--quick", "--threads"),
    "many": ("--threads",),
    "faithfulness": ("--quick", "--threads"),
}
"""Scripts, and which of the options they take."""


def main() -> None:
    """Run from the command line; the exit status is that of the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS), metavar="SCRIPT")
    parser.add_argument("--quick", action="store_true", help="small grids: some minutes")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    worst = 0
    for script in options.only:
        command = [sys.executable, "-m", f"benchmarks.{script}", "--write"]
        if options.quick and "--quick" in SCRIPTS[script]:
            command.append("--quick")
        if options.threads and "--threads" in SCRIPTS[script]:
            command += ["--threads", str(options.threads)]
        print("\n" + " ".join(command[1:]), flush=True)
        worst = max(worst, subprocess.run(command, check=False).returncode)
    print(f"\nwritten: {RESULTS}")
    sys.exit(worst)


if __name__ == "__main__":
    main()
