"""Is a folder the same, and writable, for all ranks? Asked before the first step."""

import contextlib
import secrets
from pathlib import Path
from time import monotonic

import torch.distributed as dist

from lhcp.training.checkpoint_files import wait_until_seen
from lhcp.training.together import RanksFailed, gather, together


class FolderNotShared(RuntimeError):
    """A rank cannot write where checkpoints go, or sees another folder there."""


def prove_shared(folder: Path, patience: float = 20.0) -> None:
    """Let every rank write a token there, each look for rank 0's, and rank 0 for all of them.

    Every rank calls it. Network storage may show a file `patience` seconds late.

    Raises:
        FolderNotShared: on all ranks; the message names those that cannot write or see.
    """
    rank = dist.get_rank()
    word = [secrets.token_hex(8)]
    dist.broadcast_object_list(word)
    names = [f".token-{word[0]}-{index}" for index in range(dist.get_world_size())]
    token = folder / names[rank]

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text("")

    try:
        try:
            together(write)
        except RanksFailed as error:
            raise FolderNotShared(
                f"{folder}: not every rank can write there ({error}): checkpoints need a folder "
                "that all ranks can write; name one with --out"
            ) from error
        # All of them are rank 0's business, the others look for its own.
        unseen = gather(unseen_of(folder, names if rank == 0 else names[:1], patience))
    finally:
        with contextlib.suppress(OSError):
            token.unlink()
    blind = [index for index, missing in enumerate(unseen) if names[0] in missing]
    hidden = [names.index(name) for name in unseen[0]]
    if ranks := sorted({*blind, *hidden}):
        raise FolderNotShared(
            f"{folder} is not one folder for all ranks: ranks {ranks} of {len(names)} and rank 0 "
            "do not see one another's files there; name storage that all of them share with --out"
        )


def unseen_of(folder: Path, names: list[str], patience: float) -> list[str]:
    """Return those of the tokens that this rank does not see within `patience` seconds in all."""
    deadline, unseen = monotonic() + patience, []
    for name in names:
        try:
            wait_until_seen(folder, {name: (0, "")}, deadline - monotonic())
        except OSError:
            unseen.append(name)
    return unseen
