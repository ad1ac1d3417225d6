"""What a run with `--debug` has of torch's own tools: its flight recorder and its debug server."""

import importlib.util
import json
import os
import socket
from pathlib import Path

from lhcp.comm.torch_private import recorded_messages

KEPT = 2000
"""Messages that the flight recorder keeps."""
PORT = 25999
NEEDS = ("jinja2", "tabulate", "aiohttp")
"""What torch's debug server imports."""


def record_messages() -> None:
    """Let torch keep the last messages of each rank; before the process group is made.

    Torch takes the size from the environment alone; what the user set there stays.
    """
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, str(KEPT))


def serve_messages() -> str:
    """Start torch's debug server: on rank 0 a page with all ranks' stacks and messages.

    Every rank calls it, after the process group is made.

    Returns:
        Where it is, or what it lacks.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return f"debug: no server, which needs {', '.join(NEEDS)}: pip install {' '.join(missing)}"
    if importlib.util.find_spec("torch.distributed.debug") is None:
        return "debug: no server, which this torch has not"
    from torch.distributed.debug import start_debug_server

    # A fork of a process that uses a GPU cannot be used.
    start_debug_server(PORT, start_method="spawn")
    return f"debug: http://{socket.gethostname()}:{PORT} shows the ranks' stacks and messages"


def write_messages(folder: Path, rank: int) -> Path | None:
    """Write what the flight recorder has of this rank's messages; return where, or None."""
    text = recorded_messages()
    if not text or not json.loads(text).get("entries"):
        return None
    path = folder / f"messages_rank{rank}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
