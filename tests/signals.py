"""Signals of processes that tests start."""

import signal


def heed_interrupts() -> None:
    """End at SIGINT, as what a shell started in the background does not, nor what that starts.

    For `subprocess.Popen(preexec_fn=)`.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
