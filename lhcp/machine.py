"""What a result tells of the machine and the code that it came from."""

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

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
