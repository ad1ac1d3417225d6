"""Rotary embeddings of transformers that choose frequencies by the positions of each call."""

from typing import Any

from lhcp.context.context_parallel import ContextParallel


def check_frequencies(config: Any, seqlen: int, cp: ContextParallel) -> None:
    """Check that all ranks turn by the same frequencies, each called with its own positions.

    transformers makes those of "dynamic" of the largest position of a call, and those of "longrope"
    one of two by it.

    Args:
        config: of a model of transformers.
        seqlen: N, tokens of the whole sequence.
        cp: the ranks and their layout.

    Raises:
        ValueError: they would not.
    """
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [x for x in given.values() if isinstance(x, dict)] or [given]
    chunks = [max(cp.cut.chunks(rank)) + 1 for rank in range(cp.world_size)]
    least = min(chunks) * seqlen // cp.cut.num_chunks
    for rope in kinds:
        kind = rope.get("rope_type")
        if kind == "dynamic":
            known, name = config.max_position_embeddings, "max_position_embeddings"
        elif kind == "longrope":
            name = "original_max_position_embeddings"
            known = rope.get(name, config.max_position_embeddings)
        else:
            continue
        if seqlen <= known or (kind == "longrope" and least > known) or cp.world_size == 1:
            continue
        raise ValueError(
            f"rope_type={kind!r} and a sequence of {seqlen} tokens, more than {name}={known}: it "
            "takes frequencies by the largest position of each call, and some ranks hold positions "
            f"below {least} alone, so that ranks would turn q and k by different ones; take "
            f"{name}={seqlen}, sequences of at most {known} tokens, or another rope_type, as "
            "'yarn' or 'llama3'"
        )
