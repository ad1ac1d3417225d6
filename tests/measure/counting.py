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

    A gather counts (W - 1) times its input, an all-to-all the parts that are not for the rank
    itself, a send its tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[tuple[str, str, int]] = []
        self.receivers: list[dict[int, int]] = []
        """Of each message its bytes by receiver, as global ranks."""

    def __enter__(self) -> "Messages":
        original = self._all_to_all = dist.all_to_all_single

        def wrapped(
            output: torch.Tensor, given: torch.Tensor, group: dist.ProcessGroup, **splits: Any
        ) -> Any:
            rows = splits.get("input_split_sizes", [given.shape[0] // group.size()] * group.size())
            self._post("all_to_all", group, [n * _bytes(given[:1]) for n in rows])
            return original(output, given, group=group, **splits)

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
        if op == "send":
            by_rank = [0] * group.size()
            by_rank[args[2]] = _bytes(args[0][0])
        elif op == "_allgather_base_":
            by_rank = [_bytes(args[1])] * group.size()
        else:
            raise AssertionError(f"a message of a kind that this test does not know: {op}")
        self._post(op, group, by_rank)

    def _post(self, op: str, group: dist.ProcessGroup, by_rank: list[int]) -> None:
        by_rank[group.rank()] = 0
        ranks = dist.get_process_group_ranks(group)
        self.posted.append((op, group.group_name, sum(by_rank)))
        self.receivers.append({ranks[i]: size for i, size in enumerate(by_rank) if size})


def _bytes(x: torch.Tensor) -> int:
    return math.prod(x.shape) * x.element_size()
