"""Passkey text: one digit hidden in alphanumeric filler, and asked for where the text ends.

The paper's simplified retrieval test (arXiv 2605.06554). Filler is drawn from `FILLER`, digits
among them, so that only what stands before a digit tells that it is the key: a key is `MARK` and
its digit, the question `MARK` alone.
"""

import numpy as np

FILLER = b"abcdefghijklmnopqrstuvwxyz0123456789"
DIGITS = b"0123456789"
MARK = b"\n#"
NEAREST = 4
"""Bytes from the start of one mention to the start of the next at the least: one is filler."""
SHORTEST = 18
"""Bytes of a text at the least, for a key, filler and the question."""
PASSKEY = 0x9A55
"""Keeps these draws apart from those of other things with the same seed and index."""


def is_passkey(seed: int, index: int, share: float) -> bool:
    """Tell whether sequence `index` of a run is passkey text, of which `share` of all are."""
    return bool(np.random.default_rng((seed, index, PASSKEY, 1)).random() < share)


def filler(draw: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` random bytes of `FILLER`, uint8."""
    return np.frombuffer(FILLER, np.uint8)[draw.integers(len(FILLER), size=count)]


def training_sequence(seed: int, index: int, seqlen: int) -> np.ndarray:
    """Return passkey text to learn from, uint8 [seqlen + 1]: a pure function of its arguments.

    Its one digit is the last byte, after the question, and is mentioned at places before, so that
    it is asked for more than once. From mention to mention, backwards, the distance is drawn evenly
    on a logarithmic scale, from `NEAREST` to the whole sequence in one half of the sequences, to a
    limit drawn in the same way in the other half. So some have one mention far away, as the test,
    and some have many close by, from which the task is learnt first.

    Raises:
        ValueError: the sequence is too short for a key and a question.
    """
    check_length(seqlen)
    draw = np.random.default_rng((seed, index, PASSKEY, 2))
    text = filler(draw, seqlen + 1)
    mention = np.frombuffer(MARK + bytes([DIGITS[draw.integers(len(DIGITS))]]), np.uint8)
    last = seqlen + 1 - len(mention)
    text[last:] = mention
    longest = last + 1.0
    if draw.random() < 0.5:
        longest = np.exp(draw.uniform(np.log(NEAREST), np.log(longest)))
    places = [last]
    while True:
        # Many at once: a long sequence has thousands, and one by one they take longer than a step.
        gaps = np.exp(draw.uniform(np.log(NEAREST), np.log(longest), size=256)).astype(np.int64)
        gaps = np.maximum(gaps, NEAREST)
        before = places[-1] - gaps.cumsum()
        if len(places) == 1:
            # A last question always has its answer somewhere before.
            before[0] = max(before[0], 0)
            before[1:] = before[0] - gaps[1:].cumsum()
        inside = before[before >= 0]
        places += inside.tolist()
        if len(inside) < len(gaps):
            break
    for offset, byte in enumerate(mention):
        text[np.array(places) + offset] = byte
    return text


def asked_at(seed: int, depth: float, trial: int, context: int) -> tuple[np.ndarray, int]:
    """Return a text with one key and the question at its end, uint8 [context], and the digit.

    Args:
        seed: Of the whole test.
        depth: Where the key is: 0 at the text's start, 1 where the question follows after
            `NEAREST` bytes, the least that training has.
        trial: Number of the draw of filler and digit, among those of its context and depth.
        context: Bytes of the text.

    Raises:
        ValueError: `depth` is outside 0 to 1, or the text is too short for a key and a question.
    """
    check_length(context)
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: must lie in 0 to 1, for example 0.5")
    # Each cell's texts are its own, so that what cells say adds up.
    draw = np.random.default_rng((seed, trial, context, round(depth * 1e6), PASSKEY, 3))
    text, digit = filler(draw, context), int(draw.integers(len(DIGITS)))
    key, question = MARK + bytes([DIGITS[digit]]), MARK
    start = round(depth * (context - NEAREST - len(question)))
    text[start : start + len(key)] = np.frombuffer(key, np.uint8)
    text[context - len(question) :] = np.frombuffer(question, np.uint8)
    return text, digit


def check_length(count: int) -> None:
    """Check that a key, a question and some filler fit.

    Raises:
        ValueError: they do not.
    """
    if count < SHORTEST:
        raise ValueError(
            f"a passkey text of {count} bytes: must have at least {SHORTEST}, for a key, "
            "filler and the question; for example 256"
        )
