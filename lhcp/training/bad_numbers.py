"""Numbers gone bad: which tensor was the first that is not finite, where, and on which rank."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lhcp.training.together import gather


@dataclass
class Search:
    """What one rank has looked at, in the order in which it was computed."""

    looked: int = 0
    first: tuple[int, str] | None = None
    """How many were looked at before it, and what it is."""

    def look(self, what: str, x: Tensor) -> None:
        """Look at a tensor, or at this rank's part of it; the host waits for it."""
        here = x.to_local() if isinstance(x, DTensor) else x
        if self.first is None and not bool(here.isfinite().all()):
            self.first = (self.looked, what)
        self.looked += 1


def first_not_finite(model: nn.Module, again: Callable[[], object]) -> str:
    """Do a step's forward and backward again and say what was the first that is not finite.

    Every rank calls it with the same pass. Looked at are the weights, what each module returns, and
    the gradient of that. Compiled modules run as they are written meanwhile.

    Args:
        model: The model; its gradients are those of the pass afterwards.
        again: Does the forward and the backward.

    Returns:
        Words such as "what blocks.1.mlp returns, on rank 1"; the same on every rank.
    """
    search = Search()
    for name, weight in model.named_parameters():
        search.look(f"the weight {name}", weight.detach())
    # Of a rank with a bad weight the others still want the messages of the pass.
    with watched(model, search), torch.compiler.set_stance("force_eager"):
        again()
    firsts = gather(search.first)
    found = {rank: one for rank, one in enumerate(firsts) if one is not None}
    if not found:
        return (
            "nothing in a second pass over the same batch: a run that repeats would give it again, "
            "so see whether memory, a link or a kernel is at fault"
        )
    # All ranks look at as many, in one order.
    rank = min(found, key=lambda r: (found[r][0], r))
    others = [r for r in found if r != rank]
    return f"{found[rank][1]}, on rank {rank}" + (f", then on ranks {others}" if others else "")


@contextmanager
def watched(model: nn.Module, search: Search) -> Iterator[None]:
    """Look at what every module returns, and at the gradient of that, in the order of a pass."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, returned: Any) -> None:
            for x in tree_leaves(returned):
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    continue
                search.look(f"what {name} returns", x.detach())
                if x.requires_grad:
                    x.register_hook(
                        lambda grad: search.look(f"the gradient of what {name} returns", grad)
                    )

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(hook_of(name))
                stack.callback(handle.remove)
        yield
