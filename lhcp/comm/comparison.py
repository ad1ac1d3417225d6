"""What ranks say to one another before they send: posts to the store of their group, compared.

Without a collective, so that it needs no GPU and nothing is in flight.
"""

import json

from lhcp.comm.mesh import Ranks
from lhcp.comm.torch_private import is_fake, store_of
from lhcp.comm.trail import Fields, asked_of


def compare(ranks: Ranks, fields: Fields, problem: Exception | None = None) -> None:
    """Compare with the other ranks what this one was asked for; all of them call it.

    A rank with a problem posts that and returns at once, to raise it.

    Raises:
        ValueError: another rank has a problem, or was asked for something else; the message names
            the rank and the fields. Or a rank did not come within the timeout of the store.
    """
    if ranks.flat is None or ranks.world_size == 1 or is_fake(ranks.flat):
        return
    trouble = None if problem is None else f"{type(problem).__name__}: {problem}"
    number = _post(ranks, fields, trouble)
    if problem is not None:
        return
    posts = _read(ranks, number)
    for rank, (_, other) in enumerate(posts):
        if other is not None:
            raise ValueError(f"rank {rank} of {ranks.world_size} cannot go on: {other}")
    first, _ = posts[0]
    differ = [rank for rank, (other, _) in enumerate(posts) if other != first]
    if differ:
        theirs, _ = posts[differ[0]]
        names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        said = "; ".join(
            f"{name}: {first.get(name, 'none')} on rank 0, {theirs.get(name, 'none')} on rank "
            f"{differ[0]}"
            for name in names
        )
        raise ValueError(
            f"ranks were asked for different things: {said}. Ranks that differ from rank 0: "
            f"{differ} of {ranks.world_size}; every rank must call with equal shapes and choices"
        )


def told(ranks: Ranks, name: str, said: str) -> list[str]:
    """Return what each rank says of `name`; all of them call it.

    Raises:
        ValueError: as `compare`, of a rank that says something of something else.
    """
    if ranks.flat is None or ranks.world_size == 1 or is_fake(ranks.flat):
        return [said]
    posts = _read(ranks, _post(ranks, {name: said}))
    for rank, (fields, _) in enumerate(posts):
        if name not in fields:
            raise ValueError(
                f"rank {ranks.rank} of {ranks.world_size} says {name}: {said}, and rank {rank} is "
                f"at another call: {fields}; every rank must make the same calls in the same order"
            )
    return [fields[name] for fields, _ in posts]


def _post(ranks: Ranks, fields: Fields, trouble: str | None = None) -> int:
    """Post what this rank says and return the number of the post."""
    assert ranks.flat is not None
    asked = asked_of(ranks.flat)
    asked.posts += 1
    asked.asking = fields if trouble is None else None
    key = _key(asked.posts, ranks.rank)
    store_of(ranks.flat).set(key, json.dumps([fields, trouble]))
    return asked.posts


def _key(number: int, rank: int) -> str:
    return f"lhcp/{number}/{rank}"


def _read(ranks: Ranks, number: int) -> list[tuple[Fields, str | None]]:
    """Return what each rank posted as its post of this number; waits for them."""
    assert ranks.flat is not None
    store = store_of(ranks.flat)
    keys = [_key(number, rank) for rank in range(ranks.world_size)]
    try:
        store.wait(keys)
    except RuntimeError as error:
        late = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise ValueError(
            f"ranks {late} of {ranks.world_size} did not make this call within the timeout of the "
            f"group's store ({error}): every rank must make the same calls in the same order"
        ) from error
    posts = [json.loads(store.get(key)) for key in keys]
    asked_of(ranks.flat).asking = None
    # All have posted this one, so all have read the last.
    if number > 1:
        store.delete_key(_key(number - 1, ranks.rank))
    return posts
