"""Everything of torch, mostly torch.distributed, that is not public, in one file.

Each function says what it uses, in which versions that was read, and what happens when it is gone:
an optional one has a substitute; for a necessary one `UnknownTorch` names it and the versions that
have it. Nothing here is looked up before it is needed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

READ_IN = "2.11, 2.13, 2.14.1 and 2.15"
"""Versions of torch in whose sources every use below was read, and found the same."""


class UnknownTorch(ImportError):
    """The installed torch lacks something private that lhcp needs."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"torch {torch.__version__} has no {name}, which lhcp uses and which torch {READ_IN} "
            "have; install one of these, or a newer lhcp"
        )


def _need(owner: Any, name: str, shown: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise UnknownTorch(shown)
    return found


def coalesces(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether the group's backend can start several messages as one.

    Uses `ProcessGroup._get_backend(device).supports_coalescing`. Without either, messages are
    started one by one, which every backend can.
    """
    find = getattr(group, "_get_backend", None)
    return find is not None and bool(getattr(find(device), "supports_coalescing", False))


def coalescing(
    group: dist.ProcessGroup, device: torch.device | None = None
) -> AbstractContextManager[Any]:
    """Return a context in which messages are collected, and whose value is waited for.

    Uses `torch.distributed._coalescing_manager`. It is entered only where `coalesces` holds.

    Args:
        device: where the messages are; None for all-gathers, which torch then starts as one.

    Raises:
        UnknownTorch: it is gone.
    """
    manager = _need(dist, "_coalescing_manager", "torch.distributed._coalescing_manager")
    context: AbstractContextManager[Any] = manager(group, device, async_ops=True)
    return context


def send(x: Tensor, peer: int, group: dist.ProcessGroup) -> Any:
    """Start to send `x` to rank `peer` of the group.

    Uses `ProcessGroup.send`, below `torch.distributed.isend`, which takes the host longer than NCCL
    takes for a short message. Without it, that.
    """
    if (post := getattr(group, "send", None)) is not None:
        return post([x], peer, 0)
    return dist.isend(x, group=group, group_dst=peer)


def receive(x: Tensor, peer: int, group: dist.ProcessGroup) -> Any:
    """Start to receive `x` from rank `peer` of the group; as `send`, by `ProcessGroup.recv`."""
    if (post := getattr(group, "recv", None)) is not None:
        return post([x], peer, 0)
    return dist.irecv(x, group=group, group_src=peer)


def resolve_group(name: str) -> dist.ProcessGroup:
    """Return the process group that is called so on this rank.

    Uses `torch.distributed.distributed_c10d._resolve_process_group`, as torch's own functional
    collectives do.

    Raises:
        UnknownTorch: it is gone.
    """
    where = "torch.distributed.distributed_c10d._resolve_process_group"
    group: dist.ProcessGroup = _need(dist.distributed_c10d, "_resolve_process_group", where)(name)
    return group


def flat_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Return the group of all ranks of a mesh of several axes; None to a rank outside.

    A collective at its first call, for ranks outside too.

    Raises:
        UnknownTorch: see `flat_mesh`.
    """
    flat = flat_mesh(mesh)
    return None if mesh.get_coordinate() is None else flat.get_group()


def flat_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return a mesh of several axes as one of one axis, whose name is all of theirs.

    Uses `DeviceMesh._flatten`, which makes the group at its first call: a collective then.

    Raises:
        UnknownTorch: it is gone.
    """
    flat: DeviceMesh = _need(mesh, "_flatten", "DeviceMesh._flatten")()
    return flat


def store_of(group: dist.ProcessGroup) -> dist.Store:
    """Return the store through which the ranks of a group found each other.

    Uses `torch.distributed.distributed_c10d._world.pg_map`.

    Raises:
        UnknownTorch: it is gone.
    """
    world = _need(dist.distributed_c10d, "_world", "torch.distributed.distributed_c10d._world")
    groups = _need(world, "pg_map", "torch.distributed.distributed_c10d._world.pg_map")
    store: dist.Store = groups[group][1]
    return store


def copy_of(store: dist.Store) -> dist.Store:
    """Return the same store by a connection of its own, for another thread.

    Uses `Store.clone`, which is public and which torch's type hints leave out.

    Raises:
        UnknownTorch: it is gone.
    """
    copy: dist.Store = _need(store, "clone", "torch.distributed.Store.clone")()
    return copy


def recorded_messages() -> str:
    """Return what torch's flight recorder has of this process's messages, as JSON; "": nothing.

    Uses `torch._C._distributed_c10d._dump_fr_trace_json`. Without it, nothing.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    found = b"" if dump is None else dump()
    return found.decode() if isinstance(found, bytes) else str(found)


def keep_stream_busy(cycles: int) -> None:
    """Let the current stream of the current GPU do nothing for so many clock cycles.

    Uses `torch.cuda._sleep`. Without, the stream goes on at once: slower at most.
    """
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(cycles)


FAKE = "fake"
"""torch's backend whose groups have ranks and sizes and nothing behind them."""


def _fake_module() -> Any:
    """Import the module that registers the "fake" backend, and that has its store.

    Uses `torch.testing._internal.distributed.fake_pg`. Only measurements and tests need it.

    Raises:
        UnknownTorch: it is gone.
    """
    try:
        import torch.testing._internal.distributed.fake_pg as fake_pg
    except ImportError as error:
        raise UnknownTorch("torch.testing._internal.distributed.fake_pg") from error
    return fake_pg


def new_fake_group(members: Sequence[int]) -> dist.ProcessGroup:
    """Make a group of these global ranks that completes every message and sends nothing.

    Every member must call it, and no other rank needs to. Since 2.14 torch counts such a group on
    its members alone: the next group of all would have one name there and another elsewhere, and
    its ranks would wait for each other for ever. So the count (`_world.group_count`) is put back,
    and a number that no count reaches makes the name unique meanwhile, as 2.13 does it.
    """
    _fake_module()
    world = _need(dist.distributed_c10d, "_world", "torch.distributed.distributed_c10d._world")
    counted = _need(world, "group_count", "torch.distributed.distributed_c10d._world.group_count")
    names = _need(world, "pg_names", "torch.distributed.distributed_c10d._world.pg_names")
    world.group_count = (1 << 32) + len(names)
    try:
        made: Any = dist.new_group(list(members), backend=FAKE, use_local_synchronization=True)
    finally:
        world.group_count = counted
    assert isinstance(made, dist.ProcessGroup)
    return made


def init_fake_world(rank: int, world_size: int) -> None:
    """Make the default group one of `world_size` ranks of which only this one exists."""
    store = _fake_module().FakeStore()
    dist.init_process_group(FAKE, store=store, rank=rank, world_size=world_size)


def is_fake(group: dist.ProcessGroup) -> bool:
    """Return whether the group sends nothing."""
    return bool(dist.get_backend(group) == FAKE)
