"""The files of a text: which ones paths and globs name, and how a run knows them again."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

READ_WHOLE = 64 << 20
"""Bytes up to which a digest reads all of a file; of a longer one it reads `SAMPLES` places."""
SAMPLES = 256
SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True)
class TextFile:
    """A file as a run knows it."""

    path: Path
    name: str
    """Its path from the folder that all files of the text have in common."""
    size: int
    digest: str
    """SHA-256 of its bytes; of a file above `READ_WHOLE`, of evenly spread samples."""


@dataclass(frozen=True)
class Manifest:
    """All files of a text, sorted by name: the same list in another place is the same text."""

    files: tuple[TextFile, ...]

    @property
    def digest(self) -> str:
        """Return one digest of names, sizes and contents."""
        lines = (f"{f.size} {f.digest} {f.name}\n" for f in self.files)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

    def to_json(self) -> list[list[str | int]]:
        """Return what `changes` compares with, JSON-ready."""
        return [[f.name, f.size, f.digest] for f in self.files]

    def changes(self, before: list[list[str | int]]) -> str:
        """Say in words what is new, gone and changed against an earlier `to_json`."""
        old = {str(name): rest for name, *rest in before}
        new = {f.name: [f.size, f.digest] for f in self.files}
        kinds = {
            "new": [name for name in new if name not in old],
            "gone": [name for name in old if name not in new],
            "changed": [name for name in new if name in old and new[name] != old[name]],
        }
        said = (
            f"{len(names)} {kind} ({', '.join(map(repr, names[:3]))}"
            + (", ...)" if len(names) > 3 else ")")
            for kind, names in kinds.items()
            if names
        )
        return ", ".join(said) or "none"


def standard_library() -> list[Path]:
    """Return the sources of Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    found = (
        path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)
    )
    return sorted(found)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the paths and globs name, sorted, each once whatever it is called.

    A path that is there is taken as it is, also where it reads like a glob. Links, hard links and
    ways through other folders lead to one file: its shortest name stands for it.

    Raises:
        FileNotFoundError: a pattern names no file.
    """
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        literal = os.path.lexists(pattern)
        found = [pattern] if literal else glob.glob(pattern, recursive=True)
        named = [Path(p) for p in found if Path(p).is_file()]
        if not named:
            inside = f"{glob.escape(pattern.rstrip('/'))}/**/*.txt"
            hint = f"it is a folder; try '{inside}'" if Path(pattern).is_dir() else "check the path"
            raise FileNotFoundError(f"data.text: {pattern!r} names no file; {hint}")
        for path in named:
            about = path.stat()
            known = files.setdefault((about.st_dev, about.st_ino), path)
            if (len(str(path)), path) < (len(str(known)), known):
                files[about.st_dev, about.st_ino] = path
    return sorted(files.values())


def read_manifest(paths: Sequence[Path]) -> Manifest:
    """Return the manifest of files; reads each of them once, long ones in samples."""
    whole = [path.absolute() for path in paths]
    root = os.path.commonpath([path.parent for path in whole]) if whole else ""
    files = []
    for path, absolute in zip(paths, whole, strict=True):
        size = path.stat().st_size
        files.append(TextFile(path, os.path.relpath(absolute, root), size, file_digest(path, size)))
    return Manifest(tuple(sorted(files, key=lambda file: file.name)))


def file_digest(path: Path, size: int) -> str:
    """Return SHA-256 of a file of `size` bytes, or of evenly spread samples of a long one."""
    with open(path, "rb") as file:
        if size <= READ_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256()
        for index in range(SAMPLES):
            # From the first byte to the last.
            file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            found.update(file.read(SAMPLE_BYTES))
        return found.hexdigest()
