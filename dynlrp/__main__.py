"""``python -m dynlrp``, and the program ``dynlrp``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, or say which extra it needs."""
    try:
        from dynlrp.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dynlrp"):
            raise
        print(f"the command line needs {error.name}: pip install dynlrp[cli]", file=sys.stderr)
        return 2
    app(prog_name="dynlrp")
    return 0


if __name__ == "__main__":
    sys.exit(main())
