"""Generation: seeded, and it continues the prompt."""

import pytest

from lhcp.training.generation import generate
from tests.training.test_model import small


def test_generate_is_seeded_and_continues_the_prompt() -> None:
    model = small()
    texts = [generate(model, b"ab", num_bytes=12, context=8, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(b"ab") and len(texts[0]) == 14
    with pytest.raises(ValueError, match="prompt"):
        generate(model, b"", num_bytes=1, context=8)
