"""Count what really goes to torch.distributed, below every Python name that could hide it.

All but the all-to-all is seen as it reaches c10d; that one may be inside an operator of ours, where
a dispatch mode cannot look, so its Python function is wrapped. Give the code under test an
`lhcp.Timers`, so that the rest does not go through operators.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Messages(TorchDispatchMode):
    """Record (operator, group, bytes sent) of every message that is posted.

    A gather counts (W - 1) times its input, an all-to-all of equal parts those that are not for the
    rank itself, a send its tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[tuple[str, str, int]] = []

    def __enter__(self) -> "Messages":
        original = self._all_to_all = dist.all_to_all_single

        def wrapped(output: torch.Tensor, given: torch.Tensor, group: dist.ProcessGroup) -> Any:
            sent = _bytes(given) * (group.size() - 1) // group.size()
            self.posted.append(("all_to_all", group.group_name, sent))
            return original(output, given, group=group)

        dist.all_to_all_single = wrapped
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        dist.all_to_all_single = self._all_to_all
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def bytes_on(self, group: str) -> int:
        """Bytes that this rank sent over the group called so."""
        return sum(size for _, name, size in self.posted if name == group)

    def count_on(self, group: str) -> int:
        """Messages and collectives that this rank posted to the group called so."""
        return sum(name == group for _, name, _ in self.posted)

    def _record(self, op: str, args: Any) -> None:
        if op in ("recv_", "barrier", "alltoall_base_"):
            return
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        world = group.size()
        if op == "send":
            share = args[0][0]
            sent = _bytes(share)
        elif op == "_allgather_base_":
            sent = (world - 1) * _bytes(args[1])
        else:
            raise AssertionError(f"a message of a kind that this test does not know: {op}")
        self.posted.append((op, group.group_name, sent))


def _bytes(x: torch.Tensor) -> int:
    return math.prod(x.shape) * x.element_size()
