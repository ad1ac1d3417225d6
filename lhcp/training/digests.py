"""Digests of files: of a large one by parts, which several threads read at once."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PART, BLOCK = 1 << 26, 1 << 20
"""Bytes of a part, which one thread digests, and of one look at it."""
PARTS = "parts:"
"""What the digest of a file in parts begins with."""


def digest_of(path: Path, part: int = PART) -> str:
    """Return SHA-256 of a file; of one larger than `part`, `PARTS` and SHA-256 of its parts' own.

    One thread digests about a gigabyte a second, which a save of a large model would wait for.
    """
    size = path.stat().st_size
    if size <= part:
        return whole_digest(path)

    def of_part(start: int) -> bytes:
        found = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(start)
            for at in range(0, part, BLOCK):
                found.update(file.read(min(BLOCK, part - at)))
        return found.digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        parts = threads.map(of_part, range(0, size, part))
        return PARTS + hashlib.sha256(b"".join(parts)).hexdigest()


def whole_digest(path: Path) -> str:
    """Return SHA-256 of a file, as older checkpoints have it of large ones too."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_as_written(path: Path, digest: str, part: int = PART) -> bool:
    """Whether a file has a digest, of either kind."""
    found = digest_of(path, part) if digest.startswith(PARTS) else whole_digest(path)
    return found == digest
