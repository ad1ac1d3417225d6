"""A pool of gloo ranks that stays alive across tests.

    pool = RankPool(4)
    results = pool.run(check, 2, "zigzag")     # check(group, "zigzag") on ranks 0 and 1

`check` is a function of an importable module. Results and arguments are pickled by value. If a rank
raises, or nobody answers in time, every worker is ended and the next run starts new ones.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_CTX = multiprocessing.get_context("spawn")


class RankError(AssertionError):
    """A rank raised or did not answer; the message holds every rank's traceback."""


class RankPool:
    """Worker processes, one a rank.

    Args:
        size: the largest world size that `run` may ask for.
        timeout: seconds that one run may take.
        poison: fill what torch.empty and its kin return with NaN on every rank.
        grace: seconds that the other ranks have once one has failed.
        by_nccl: whether each rank has a GPU, and NCCL for it; else gloo alone. Ranks beyond the
            GPUs share them, which NCCL lets them where it is told so.
    """

    def __init__(
        self,
        size: int,
        timeout: float = 240,
        poison: bool = False,
        grace: float = 5,
        by_nccl: bool = False,
    ) -> None:
        self.size, self.timeout, self.poison, self.grace = size, timeout, poison, grace
        self._by_nccl = by_nccl
        self._folder = ""
        self._workers: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def run(
        self, fn: Callable[..., Any], world_size: int, *args: Any, num_nodes: int | None = None
    ) -> list[Any]:
        """Call fn(group, *args) on ranks 0 to world_size - 1; return their results by rank.

        With num_nodes, `group` is a `Ranks` of two axes: that many nodes of equal size.

        Raises:
            ValueError: world_size is larger than the pool.
            RankError: a rank raised, died, or took longer than the timeout.
        """
        if world_size > self.size:
            raise ValueError(f"world_size={world_size}: this pool has {self.size} ranks")
        if not self._workers:
            self._start()
        job = pickle.dumps((fn, (world_size, num_nodes), args))
        for pipe in self._pipes:
            # A worker that died since the last run shows below, as a pipe that ends.
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(job)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = [p for rank, p in enumerate(self._pipes) if rank not in answers]
            ready: list[Any] = multiprocessing.connection.wait(waiting, left)
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    answers[rank] = (False, "the process died")
                if not answers[rank][0]:
                    # The others may wait for this rank's messages for ever.
                    deadline = min(deadline, time.monotonic() + self.grace)
        silent = {rank: (False, "no answer") for rank in range(self.size) if rank not in answers}
        failed = {rank: text for rank, (ok, text) in (answers | silent).items() if not ok}
        if failed:
            self.close()
            raise RankError(
                "\n".join(f"rank {rank} of {world_size}: {text}" for rank, text in failed.items())
            )
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="lhcp-ranks-")
        store = os.path.join(self._folder, "store")
        for rank in range(self.size):
            ours, theirs = _CTX.Pipe()
            worker = _CTX.Process(
                target=_work,
                args=(theirs, rank, self.size, store, self.poison, self._by_nccl),
                daemon=True,
            )
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)


def _work(
    pipe: multiprocessing.connection.Connection,
    rank: int,
    size: int,
    store: str,
    poison: bool,
    by_nccl: bool,
) -> None:
    # Also for what the ranks start themselves, such as a compiler.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from lhcp.testing.inputs import poisoned_empty

    torch.set_num_threads(1)
    if by_nccl:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if by_nccl else "gloo",
        f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    groups: dict[tuple[int, int | None], Any] = {}
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        try:
            fn, shape, args = pickle.loads(job)
            if shape not in groups:
                groups[shape] = _make_group(rank, *shape)
            with poisoned_empty() if poison else contextlib.nullcontext():
                result = fn(groups[shape], *args) if rank < shape[0] else None
            answer = pickle.dumps((True, result))
        except Exception:  # told to the caller, who raises it
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _make_group(rank: int, world_size: int, num_nodes: int | None) -> Any:
    """Make the groups of a job. Every worker takes part in each, also those outside of it."""
    import torch.distributed as dist

    from lhcp.comm.mesh import Ranks

    flat: Any = dist.new_group(list(range(world_size)))
    if num_nodes is None:
        return flat
    size = world_size // num_nodes
    nodes = [list(range(node * size, (node + 1) * size)) for node in range(num_nodes)]
    inner: list[Any] = [dist.new_group(node) for node in nodes]
    outer: list[Any] = [dist.new_group(list(across)) for across in zip(*nodes, strict=True)]
    if rank >= world_size:
        return None
    return Ranks(flat, outer[rank % size], inner[rank // size])
