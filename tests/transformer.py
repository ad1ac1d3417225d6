"""A small transformer block around the layer, and its answers in three arithmetics."""

import copy

import torch
from torch import Tensor, nn

import lhcp
from lhcp.testing.inputs import small_config
from lhcp.training.model import DecoderLayer
from lhcp.training.model_config import ModelConfig
from lhcp.training.rope import rope_table
from tests.devices import Place

HEAD_DIM = 64


class Scored(nn.Module):
    """The layer, scored on tensors of its own.

    What a compiler fuses rounds differently; scores of equal bits keep the selection the same.
    """

    def __init__(self, layer: lhcp.LighthouseAttention, score_q: Tensor, score_k: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("score_q", score_q)
        self.register_buffer("score_k", score_k)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.layer(q, k, v, score_q=self.score_q, score_k=self.score_k)


def make_block(
    place: Place, seed: int = 0
) -> tuple[DecoderLayer, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return a block of RMSNorm, qkv, RoPE, the layer and SwiGLU; its inputs; dout."""
    torch.manual_seed(seed)
    config, seqlen = small_config(num_strata=4, picks=2)
    sizes = ModelConfig(
        dim=2 * HEAD_DIM,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        hidden_dim=96,
        dense_layers=(),
    )
    layer = lhcp.LighthouseAttention(config, backend=place.backend, kernels=place.kernels)
    scored = Scored(layer, torch.randn(1, seqlen, 2, 8), torch.randn(1, seqlen, 1, 8))
    block = DecoderLayer(sizes, scored, always_dense=False)
    x, dout = torch.randn(2, 1, seqlen, sizes.dim).unbind(0)
    cos, sin = rope_table(torch.arange(seqlen), HEAD_DIM, 10000.0)
    block = block.to(place.device, place.dtype)
    x, dout = (t.to(place.device, place.dtype) for t in (x, dout))
    return block, (x.requires_grad_(), cos.to(place.device), sin.to(place.device)), dout


def attention_of(block: DecoderLayer) -> lhcp.LighthouseAttention:
    layer = block.attention.core.layer
    assert isinstance(layer, lhcp.LighthouseAttention)
    return layer


def answer(run: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of all parameters."""
    out = run(*inputs)
    wanted = [inputs[0], *run.parameters()]
    return [out.detach(), *torch.autograd.grad(out, wanted, dout)]


def exact_answer(
    block: DecoderLayer, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor
) -> list[Tensor]:
    """The same in float64, by the torch path."""
    wide = copy.deepcopy(block).double()
    layer = attention_of(wide)
    layer.backend, layer.kernels = "math", "torch"
    x, cos, sin = (t.detach().double() for t in inputs)
    return answer(wide, (x.requires_grad_(), cos, sin), dout.double())
