"""One check across ranks, before the first messages: does everybody mean the same call?"""

import torch.distributed as dist

from lhcp.comm.mesh import Ranks


def check_agreement(ranks: Ranks, meaning: str, problem: Exception | None) -> None:
    """Raise on every rank if any rank has a problem, or if ranks mean different calls.

    A collective: every rank of the group must call it.

    Args:
        meaning: everything that must be equal on all ranks, as text.
        problem: what is wrong on this rank, if anything.

    Raises:
        Exception: this rank's own `problem`.
        ValueError: another rank has a problem, or means something else; the message says which and
            what.
    """
    if ranks.world_size > 1:
        said: list[tuple[str, str | None]] = [("", None)] * ranks.world_size
        trouble = None if problem is None else f"{type(problem).__name__}: {problem}"
        dist.all_gather_object(said, (meaning, trouble), group=ranks.flat)
        if problem is None:
            for rank, (_, other) in enumerate(said):
                if other is not None:
                    raise ValueError(f"rank {rank} of {ranks.world_size} cannot go on: {other}")
            different = [rank for rank, (other, _) in enumerate(said) if other != said[0][0]]
            if different:
                raise ValueError(
                    f"ranks do not agree on the call. Rank 0: {said[0][0]}. "
                    f"Rank {different[0]}: {said[different[0]][0]}. "
                    f"Ranks that differ from rank 0: {different}"
                )
    if problem is not None:
        raise problem
