"""What HiGHS prints on its own."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LINE = re.compile(rb"^HighsMipSolverData::.*\n?", re.MULTILINE)
"""Printed by the HiGHS of scipy 1.17 where it repairs a solution: a message of its developers, which no option turns
off."""
_one_at_a_time = threading.Lock()


@contextmanager
def without_line() -> Iterator[None]:
    """Take :data:`LINE` out of what is written to standard output inside; all else comes out at the end.

    HiGHS writes to the file descriptor, not through ``sys.stdout``. So what other threads write meanwhile waits too.
    """
    with _one_at_a_time, tempfile.TemporaryFile() as written:
        try:
            kept = os.dup(1)
        except OSError:  # standard output is closed
            yield
            return
        os.dup2(written.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            written.seek(0)
            rest = LINE.sub(b"", written.read())
            while rest:
                rest = rest[os.write(kept, rest) :]
            os.close(kept)
