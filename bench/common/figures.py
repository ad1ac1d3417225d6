"""Pictures: matplotlib without a display, imported where one is drawn."""

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: str | Path, dpi: int = 130) -> None:
    """Write a figure and forget it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    pyplot().close(figure)
