"""A run whose rank 1 is frozen when it has said where it can be reached, and answers nobody."""

import os
import signal
import sys
import time
from threading import Timer
from typing import Any

import torch.distributed as dist

from lhcp.programs.main import main

init_process_group = dist.init_process_group


def late(*args: Any, **how: Any) -> None:
    """Connect when rank 1 is frozen."""
    time.sleep(2)
    init_process_group(*args, **how)


def frozen(*args: Any, **how: Any) -> None:
    """Wait for rank 0, and be frozen meanwhile."""
    Timer(1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    init_process_group(*args, **how)


if __name__ == "__main__":
    dist.init_process_group = frozen if os.environ["RANK"] == "1" else late
    main(["train", *sys.argv[1:]])
