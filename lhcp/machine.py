"""What a result tells of the machine and the code that it came from."""

import ctypes
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str:
    """Return the version of a package that may not be there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def loaded_files(name: str) -> list[Path]:
    """Return the files that this process has mapped whose names begin so; none if unknown."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    mapped = {Path(parts[5]) for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return sorted(path for path in mapped if path.name.startswith(name))


def nccl_version(library: Path) -> str:
    """Return the version that a libnccl says of itself, as "2.27.5"."""
    found = ctypes.c_int()
    ctypes.CDLL(str(library)).ncclGetVersion(ctypes.byref(found))
    major, rest = divmod(found.value, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


def cpu_name() -> str:
    """Return the processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def commit() -> str:
    """Return the checkout's commit, with "+" if files differ from it; "" outside a checkout."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    # An installed package may lie inside of somebody's checkout.
    if not git("ls-files", Path(__file__).name):
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
