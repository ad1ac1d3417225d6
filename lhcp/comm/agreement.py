"""Do all ranks mean the same call? Asked before the first messages of a call that is new.

Ranks that differ would read one another's messages as what they are not. So each rank posts what it
was asked for, field by field, and reads what the others posted: once for each new kind of call, or
at each call of those that are debugged.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

from lhcp.comm.comparison import compare
from lhcp.comm.mesh import Ranks
from lhcp.comm.trail import Fields, asked_of

T = TypeVar("T")

REFUSALS = (TypeError, ValueError, ImportError)
"""What a rank raises where it was asked for something that it cannot do."""


def agreed(
    ranks: Ranks,
    key: Hashable,
    prepare: Callable[[], T],
    fields: Callable[[T | None], Fields],
    counted: bool = True,
) -> T:
    """Return what `prepare` returns, when all ranks were asked for the same.

    Every rank of the group calls it, in the same order. A key that was agreed on costs a look-up.

    Args:
        key: the call; equal where what it asks for is.
        prepare: checks and plans, without a message.
        fields: the call in words, with what was prepared, or None where that failed.
        counted: whether it is a call that sends, of which every rank makes as many.

    Raises:
        TypeError, ValueError, ImportError: from `prepare`; or ValueError, as `compare`.
    """
    if ranks.flat is None or ranks.world_size == 1:
        return prepare()
    asked = asked_of(ranks.flat)
    if (call := asked.known.get(key)) is not None:
        prepared = prepare()
    else:
        prepared = compared(ranks, prepare, fields)
        call = asked.learn(key, fields(prepared))
    if counted:
        asked.calls = asked.calls.and_then(*call)
    return prepared


def agreed_each_time(
    ranks: Ranks,
    key: Hashable,
    prepare: Callable[[], T],
    fields: Callable[[T | None], Fields],
    layer: object = None,
) -> T:
    """Do what `agreed` does for a call that sends, with a comparison at every one: for debugging.

    Which call it is, after which others and of which layer is compared too. Each time the hosts of
    all ranks meet: a rank posts once, and reads the posts of all.

    Args:
        key, prepare, fields: as in `agreed`.
        layer: whose call it is, a small object that is kept; None: a function's.

    Raises:
        TypeError, ValueError, ImportError: as `agreed`.
    """
    if ranks.flat is None or ranks.world_size == 1:
        return prepare()
    asked = asked_of(ranks.flat)
    turn = asked.turn(layer)
    prepared = compared(ranks, prepare, lambda made: fields(made) | turn)
    # Not before: a layer whose call failed may be another's in the next.
    if layer is not None:
        asked.layers.setdefault(layer, len(asked.layers) + 1)
    asked.calls = asked.calls.and_then(*asked.learn(key, fields(prepared)))
    return prepared


def agree_on_sizes(ranks: Ranks, sizes: Hashable, said: Callable[[], Fields]) -> None:
    """Compare sizes with the other ranks, at the first call with them.

    For what a graph of torch.compile runs, which may be traced for sizes that nobody knows then.

    Raises:
        ValueError: as `compare`.
    """
    agreed(ranks, sizes, lambda: None, lambda _: said())


def compared(ranks: Ranks, prepare: Callable[[], T], fields: Callable[[T | None], Fields]) -> T:
    """Do what `agreed` does at a call that is new, at every call.

    Raises:
        TypeError, ValueError, ImportError: as `agreed`.
    """
    try:
        prepared = prepare()
    except REFUSALS as problem:
        compare(ranks, fields(None), problem)
        raise
    compare(ranks, fields(prepared))
    return prepared
