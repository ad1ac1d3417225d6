"""The decoder: causal, at global positions, the paper's size, and its attention handed in."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lhcp import LighthouseAttention
from lhcp.training import model as model_file
from lhcp.training.model import Decoder, num_parameters
from lhcp.training.model_config import ModelConfig

SMALL = ModelConfig(
    dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, dense_layers=(2,)
)


def dense_attention(always_dense: bool) -> nn.Module:
    """Whole causal attention, in any mode."""
    return LighthouseAttention(None)


def small(config: ModelConfig = SMALL, **options: bool) -> Decoder:
    model = Decoder(config, dense_attention, **options)
    model.initialize(0)
    return model


def test_a_later_byte_changes_nothing_before_it() -> None:
    model = small().double()
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens, torch.arange(16))
    tokens[:, 9] = (tokens[:, 9] + 1) % 256
    after = model(tokens, torch.arange(16))
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


def test_weights_depend_on_the_seed_alone() -> None:
    one, same = small(), small()
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    same.initialize(1)
    assert not torch.equal(one.head.weight, same.head.weight)


def test_recomputing_changes_no_gradient() -> None:
    tokens, positions = torch.arange(16)[None], torch.arange(16)
    grads = []
    for options in ({}, {"recompute": True}, {"recompute": True, "offload": True}):
        model = small(**options)
        model(tokens, positions).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, grads[0], grads[1]))
    assert all(map(torch.equal, grads[0], grads[2]))


def test_the_embedding_sums_its_gradient_wide() -> None:
    """Fails if many tokens of one byte are added up in bfloat16, where small ones are lost."""
    tokens = torch.randint(4, (1, 4096), generator=torch.Generator().manual_seed(0))
    dout = torch.randn(1, 4096, 32, generator=torch.Generator().manual_seed(1)) + 1

    def gradient(dtype: torch.dtype) -> Tensor:
        model = small().to(dtype)
        model.blocks, model.norm, model.head = nn.ModuleList(), nn.Identity(), nn.Identity()
        model(tokens, torch.arange(4096)).backward(dout.bfloat16().to(dtype))
        grad = model.embedding.weight.grad
        assert grad is not None and grad.dtype == dtype
        return grad.double()

    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16) - exact).norm() <= 4e-3 * exact.norm()


def test_only_inputs_of_layers_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if offloading also copies what all layers share, or a layer's input stays."""
    packed: list[tuple[int, ...]] = []

    def watching(pin_memory: bool) -> saved_tensors_hooks:
        def pack(x: Tensor) -> Tensor:
            packed.append(tuple(x.shape))
            return x

        return saved_tensors_hooks(pack, lambda x: x)

    monkeypatch.setattr(model_file, "save_on_cpu", watching)
    model = small(recompute=True, offload=True)
    logits = model(torch.arange(16)[None], torch.arange(16))
    assert [shape for shape in packed if 0 not in shape] == [(1, 16, SMALL.dim)] * SMALL.num_layers
    logits.sum().backward()
    assert len(packed) == SMALL.num_layers or all(0 in x for x in packed[SMALL.num_layers :])


def test_tied_head_is_the_embedding() -> None:
    untied, tied = small(), small(replace(SMALL, tied=True))
    assert num_parameters(untied) - num_parameters(tied) == 256 * 32
    assert tied.head.weight is tied.embedding.weight


def test_the_papers_size() -> None:
    with torch.device("meta"):
        model = Decoder(ModelConfig(), dense_attention)
    assert num_parameters(model) == pytest.approx(267e6, rel=0.005)
