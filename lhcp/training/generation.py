"""Text that a trained decoder writes."""

import torch

from lhcp.layer.mode import set_mode
from lhcp.training.model import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: bytes,
    *,
    num_bytes: int,
    context: int,
    temperature: float = 0.7,
    seed: int = 0,
) -> bytes:
    """Continue `prompt` with a dense model on one rank, one byte at a time.

    Args:
        model: A decoder whose attention needs no other rank.
        prompt: Non-empty start of the text.
        num_bytes: How many bytes to add.
        context: The last bytes that the model sees at each step, at most what it was trained on.
        temperature: Divides the logits, > 0; small is greedy.
        seed: Draws the bytes.
    """
    if not prompt:
        raise ValueError("prompt=b'': must have at least one byte, for example b'\\n'")
    set_mode(model, "dense")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(num_bytes):
        seen = torch.tensor([text[-context:]], device=device)
        logits = model(seen, torch.arange(seen.shape[1], device=device))[0, -1].float().cpu()
        weights = (logits / temperature).softmax(-1)
        text.append(int(torch.multinomial(weights, 1, generator=generator)))
    return bytes(text)
