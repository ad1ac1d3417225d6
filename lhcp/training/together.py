"""What one rank finds is told to all before any goes on: they go on together, or fail together."""

import errno
import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

T = TypeVar("T")

FAILURES = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, CheckpointException),
)
"""What reading or writing files that may be damaged, on a disk that may be full, can raise."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that say: the disk, or this user's share of it, is full."""


class RanksFailed(RuntimeError):
    """Something failed on one rank or more; every rank raises it, and it names them."""

    def __init__(self, said: str, full: bool) -> None:
        super().__init__(said)
        self.full = full
        """Whether a disk was full."""


def gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank; every rank calls it."""
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def together(do: Callable[[], T]) -> list[T]:
    """Call `do` on every rank and return what it returned, by rank; every rank calls it.

    `do` must not send messages, or must fail on all ranks where it fails on one.

    Raises:
        RanksFailed: it failed somewhere.
    """
    value, trouble = None, None
    try:
        value = do()
    except FAILURES as error:
        trouble = error
    mine = None if trouble is None else (in_words(trouble), is_full(trouble))
    answers = gather((value, mine))
    failed = {rank: said for rank, (_, said) in enumerate(answers) if said is not None}
    if failed:
        texts = {text: rank for rank, (text, _) in reversed(failed.items())}
        # torch tells each rank the errors of all.
        shared = len(texts) == 1 and isinstance(trouble, CheckpointException)
        said = "; ".join(t if shared else f"rank {rank}: {t}" for t, rank in sorted(texts.items()))
        raise RanksFailed(said, any(full for _, full in failed.values())) from trouble
    return [value for value, _ in answers]  # type: ignore[misc]


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and those that it came from, its own first; of torch's, all ranks'."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is None or one in found:
            continue
        found.append(one)
        if isinstance(one, CheckpointException):
            todo += [inner for inner, _ in one.failures.values()]
        todo += [one.__cause__, one.__context__]
    return found


def is_full(error: BaseException) -> bool:
    """Tell whether an error is, or came from, a full disk."""
    return any(
        # torch's zip writer keeps of it the text alone.
        getattr(one, "errno", None) in NO_SPACE or "No space left on device" in str(one)
        for one in causes(error)
    )


def in_words(error: BaseException) -> str:
    """Return an error in a line; torch's of several ranks without its stacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(
            f"rank {rank}: {in_words(inner)}" for rank, (inner, _) in error.failures.items()
        )
    return f"{type(error).__name__}: {error}"
