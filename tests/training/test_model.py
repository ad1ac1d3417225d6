"""The decoder: causal, at global positions, the paper's size, and its attention handed in."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lhcp import LighthouseAttention, LighthouseConfig
from lhcp.training import model as model_file
from lhcp.training.model import (
    Decoder,
    ModelConfig,
    flops_per_token,
    generate,
    num_parameters,
    rope_table,
    rotate,
)

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


def test_rope_sees_distances_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> float:
        tables = (rope_table(torch.tensor([at]), 16, 10000.0) for at in (i, j))
        turned_q, turned_k = (rotate(x, *t) for x, t in zip((q, k), tables, strict=True))
        return float((turned_q * turned_k).sum())

    assert product(5, 3) == pytest.approx(product(1_000_005, 1_000_003), abs=1e-5)
    assert product(5, 3) != pytest.approx(product(5, 4), abs=1e-3)


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


def test_flops_of_the_matrices_and_of_attention() -> None:
    model = small()
    matrices = sum(
        prod(p.shape) for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n
    )
    assert flops_per_token(SMALL, 1000) == 6 * matrices + 6 * 3 * 32 * 1000
    config = LighthouseConfig(num_levels=2, pool_factor=4, topk=16, num_strata=4)
    length = config.subsequence_length(1024)
    expected = 6 * matrices + 6 * 32 * (1024 + 2 * length**2 / 1024)
    assert flops_per_token(SMALL, 1024, config) == pytest.approx(expected)


def test_generate_is_seeded_and_continues_the_prompt() -> None:
    model = small()
    texts = [generate(model, b"ab", num_bytes=12, context=8, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(b"ab") and len(texts[0]) == 14
    with pytest.raises(ValueError, match="prompt"):
        generate(model, b"", num_bytes=1, context=8)


@pytest.mark.parametrize(
    "broken", [{"head_dim": 7}, {"num_kv_heads": 3}, {"dense_layers": (3,)}, {"dim": 0}]
)
def test_broken_sizes_are_named(broken: dict[str, object]) -> None:
    (name,) = broken
    with pytest.raises(ValueError, match=name):
        replace(SMALL, **broken)
