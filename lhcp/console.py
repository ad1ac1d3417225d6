"""Printing that no console can fail."""

import sys
from io import TextIOWrapper


def escape_unprintable() -> None:
    """Let this process print any text: what the console cannot show is printed as an escape.

    A program's text may hold a path or a trained model's bytes, and its console may be of any
    encoding. Without this, a print at the end of a long run can lose what it was about to say.
    """
    for stream in (sys.stdout, sys.stderr):
        # Something else may stand there: a notebook's stream, a test's.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
