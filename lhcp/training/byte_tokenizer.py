"""A tokenizer.json whose ids are the bytes of the text, for `AutoTokenizer`."""

from typing import Any

# What the byte-level BPE of GPT-2 calls the bytes: those that print are themselves, the others take
# the characters from 256 on, in order.
PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}


def byte_names() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    others = (byte for byte in range(256) if byte not in PRINTED)
    stands = {byte: 256 + place for place, byte in enumerate(others)}
    return [chr(stands.get(byte, byte)) for byte in range(256)]


def tokenizer() -> dict[str, Any]:
    """Return tokenizer.json: a byte-level BPE without a merge."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": False},
        "post_processor": None,
        "decoder": level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {name: byte for byte, name in enumerate(byte_names())},
            "merges": [],
        },
    }


def tokenizer_config(seqlen: int) -> dict[str, Any]:
    """Return tokenizer_config.json of a model of `seqlen` positions."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seqlen,
        "clean_up_tokenization_spaces": False,
    }
