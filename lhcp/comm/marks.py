"""`Marks`: where a rank is, as it says itself."""

from lhcp.comm.whereabouts import Place


class Marks:
    """Notes where this rank is; a `Watchdog` reads it from its own thread.

    A mark costs less than a microsecond and sends nothing. Ranks make the same ones in one order.
    """

    def __init__(self, timeout: float = float("inf")) -> None:
        self.timeout = timeout
        """Seconds that a rank may stay at a mark of patience 1."""
        self.patience = 1.0
        """Of marks that name none."""
        self.place = Place()

    def at(self, phase: str, step: int | None = None, patience: float | None = None) -> None:
        """Note that this rank begins something.

        Args:
            phase: what it is, such as "forward", "backward", "save".
            step: of which step, as a reader counts them.
            patience: how many times the timeout it may take.
        """
        times = self.patience if patience is None else patience
        self.place = Place(self.place.number + 1, phase, step, times * self.timeout)
