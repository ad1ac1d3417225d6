"""Printing that no console can fail."""

import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any


class Console(FileIO):
    """A file to print to whose end may go away, or fill up: what is printed then is lost."""

    def write(self, data: Any) -> int:
        """Write, or take the bytes for written."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def escape_unprintable() -> None:
    """Let this process print any text: what the console cannot show is printed as an escape.

    A program's text may hold a path or a trained model's bytes, and its console may be of any
    encoding. Without this, a print at the end of a long run can lose what it was about to say.
    """
    for stream in (sys.stdout, sys.stderr):
        # Something else may stand there: a notebook's stream, a test's.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_printing() -> None:
    """Let this process print for as long as it runs, any text, whoever listens.

    Who reads it may leave, as `| head` does, or the disk under it fill up: that is no reason to end
    a run. Beside that it is `escape_unprintable`.
    """
    escape_unprintable()
    sys.stdout, sys.stderr = kept(sys.stdout), kept(sys.stderr)


def kept(stream: Any) -> Any:
    """Return a stream that prints to the same place and never fails.

    Something that is no console (a notebook's stream, a test's) is returned as it is.
    """
    if not isinstance(stream, TextIOWrapper):
        return stream
    try:
        stream.flush()
        file = Console(stream.fileno(), "wb", closefd=False)
    except OSError:
        return stream
    return TextIOWrapper(
        BufferedWriter(file),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
