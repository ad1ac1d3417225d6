"""A run that is asked to stop: it ends the step, saves, and leaves with a status of its own."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType

import torch.distributed as dist

from lhcp.training.together import causes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to stop; the second is what Slurm is told to send before its time is over."""


class AskedToStop(Exception):
    """The run ends because a signal asked it to, with a status of its own."""

    def __init__(self, number: int, said: str) -> None:
        code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} {said} (exit status {code})")
        self.code = code
        """Exit status, as a shell shows a process that a signal ended: 143, or 138 of SIGUSR1."""


class Stopped(AskedToStop):
    """All ranks ended one step, and its checkpoint is written."""

    def __init__(self, step: int, path: Path, number: int) -> None:
        said = f"after step {step}; {path} is written, and the same command goes on from there"
        super().__init__(number, said)


class StoppedCompiling(AskedToStop):
    """The signal also ended the compiler that a step waited for: whoever ends a job tells all of
    its processes. The step cannot end, and nothing is saved."""

    def __init__(self, number: int, error: subprocess.CalledProcessError) -> None:
        said = (
            f"in a step that waited for a compiler, which it ended too ({error}): checkpoints are "
            "as they were, and the same command goes on from the newest"
        )
        super().__init__(number, said)


class Stop:
    """Whether this rank was asked to stop, and whether all ranks know.

    Ranks hear of it at different times, if at all: each adds its `asked` to a sum that every step
    makes anyway, and hands the sum to `hear`. So all of them stop after one and the same step.
    """

    def __init__(self) -> None:
        self.asked = 0
        """0; or of SIGTERM 1; or of SIGUSR1 more than all ranks' 1 together."""
        self.agreed: int | None = None
        """The signal that all ranks stop for."""

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note that this process was asked to stop."""
        self.asked = 1 if number == signal.SIGTERM else dist.get_world_size() + 1

    def hear(self, total: float) -> None:
        """Note the sum of all ranks' `asked`."""
        if total:
            self.agreed = SIGNALS[total > dist.get_world_size()]


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catch the signals that ask to stop, until the block ends; in a thread there are none.

    Raises:
        StoppedCompiling: the block failed after one came, because it had ended a compiler too.
    """
    stop = Stop()
    if current_thread() is not main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.on_signal) for number in SIGNALS}
    try:
        yield stop
    except Exception as error:
        for one in causes(error) if stop.asked else ():
            if isinstance(one, subprocess.CalledProcessError) and -one.returncode in SIGNALS:
                raise StoppedCompiling(-one.returncode, one) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.asked and stop.agreed is None:
        # It came after the last step, when all was written: nothing is left to wait for.
        signal.raise_signal(SIGNALS[stop.asked > 1])
