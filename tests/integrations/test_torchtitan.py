"""torchtitan's own modules on one rank; on two ranks it trains in launch/test_readme_titan.py."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp.comm.layout import make_layout
from lhcp.testing.inputs import small_config

pytest.importorskip("torchtitan")

from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import deepseekv3_configs
from torchtitan.models.llama3 import llama3_configs
from torchtitan.models.qwen3 import qwen3_configs

from lhcp.integrations import torchtitan as titan

CONFIG, SEQLEN = small_config()
SIZES = {
    "num_levels": CONFIG.num_levels,
    "pool_factor": CONFIG.pool_factor,
    "topk": CONFIG.topk,
    "num_strata": CONFIG.num_strata,
}
ALONE: Any = SimpleNamespace(cp_enabled=False, spmd_backend="full_dtensor")
POSITIONS = torch.arange(SEQLEN)[None]


def decoder(family: str = "llama3") -> Any:
    """A config of torchtitan's, of three layers."""
    configs = {"llama3": llama3_configs, "qwen3": qwen3_configs}[family]
    config = configs["debugmodel"](attn_backend="flex")
    config.layers = config.layers[:3]
    return config


def build(attention: Any) -> Any:
    module = attention.build()
    module.parallelize(ALONE)
    torch.manual_seed(0)
    with torch.no_grad():
        module.init_states()
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return module


def tokens() -> Tensor:
    return torch.randn(2, SEQLEN, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_dense_is_torchtitans_own_attention(family: str) -> None:
    """Fails if heads, scale, mask or order of axes differ."""
    config = decoder(family).layers[0].attention
    config.inner_attention = ScaledDotProductAttention.Config()
    own = config.build()
    ours = titan.attention(decoder(family), dense=True, **SIZES).layers[0].attention
    module = build(ours)
    own.init_states()
    own.load_state_dict(module.state_dict())
    x = tokens()
    found, expected = module(x, None, POSITIONS), own(x, None, POSITIONS)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_scores_are_taken_before_a_norm_of_q_and_k(family: str) -> None:
    """Fails if Qwen3 is scored on norms that say nothing."""
    module = build(titan.attention(decoder(family), **SIZES).layers[1].attention)
    seen: dict[str, Tensor] = {}
    module.qkv_linear.register_forward_hook(lambda *x: seen.update(projected=x[2][0]))
    module.inner_attention.layer.register_forward_pre_hook(
        lambda _, qkv, options: seen.update(q=qkv[0], **options), with_kwargs=True
    )
    module(tokens(), None, POSITIONS)
    if family == "qwen3":
        assert torch.equal(seen["score_q"], seen["projected"])
        spread = seen["q"].norm(dim=-1).std() / seen["q"].norm(dim=-1).mean()
        assert spread < 1e-3
    else:
        assert "score_q" not in seen


def test_documents_are_attended_to_alone() -> None:
    """Fails if a token sees another document: torchtitan's own attention on each one alone."""
    config = decoder().layers[0].attention
    config.inner_attention = ScaledDotProductAttention.Config()
    own = config.build()
    ours = titan.attention(decoder(), dense=True, documents=True, **SIZES).layers[0].attention
    module, x = build(ours), tokens()
    own.init_states()
    own.load_state_dict(module.state_dict())
    bounds = [[0, 7, 150, SEQLEN], [0, SEQLEN - 1, SEQLEN]]
    places = [torch.cat([torch.arange(n) for n in torch.tensor(b).diff().tolist()]) for b in bounds]
    found = module(x, None, torch.stack(places))
    for row, ends in enumerate(bounds):
        for begin, end in pairwise(ends):
            alone = own(x[row : row + 1, begin:end], None, torch.arange(end - begin)[None])
            error = (found[row, begin:end] - alone[0]).norm()
            assert error <= 1e-5 * alone.norm()


def test_documents_are_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each layer makes the ranks gather positions and wait for them."""
    config = titan.attention(decoder(), documents=True, **SIZES)
    layers, asked = [build(layer.attention) for layer in config.layers], []
    own = titan.documents_of
    monkeypatch.setattr(titan, "documents_of", lambda *x: asked.append(x) or own(*x))
    for step in range(2):
        places = (POSITIONS % (100 + step)).repeat(2, 1)
        for layer in layers:
            layer(tokens(), None, places)
        assert len(asked) == step + 1


def test_layers_and_stages_are_asked_for_by_number() -> None:
    """Fails if a dense layer is another than meant, or the second stage is not dense."""

    def modes(**asked: Any) -> list[bool]:
        changed = titan.attention(decoder(), **asked, **SIZES)
        return [layer.attention.inner_attention.dense for layer in changed.layers]

    assert modes(dense_layers=[0, -1]) == [True, False, True]
    assert modes(dense=True) == [True] * 3
    with pytest.raises(ValueError, match=r"dense_layers: \[3\] are not layers; this model has 3"):
        modes(dense_layers=[3])
    module = build(titan.attention(decoder(), dense=True, **SIZES).layers[0].attention)
    assert lhcp.set_mode(module, "lighthouse") == 1


def test_a_layer_that_nobody_parallelized_has_the_sequence_whole() -> None:
    """Fails if torchtitan's partial_dtensor, which tells layers of no mesh, meets an error of ours,
    or a part of a sequence passes for the whole one."""
    config = titan.attention(decoder(), dense=True, **SIZES).layers[0].attention
    told = build(config)
    alone = config.build()
    alone.load_state_dict(told.state_dict())
    assert torch.equal(alone(tokens(), None, POSITIONS), told(tokens(), None, POSITIONS))
    with pytest.raises(ValueError, match=r"holds \[?0\]? there"):
        alone(tokens()[:, : SEQLEN // 2], None, POSITIONS[:, SEQLEN // 2 :])


def test_documents_masks_and_other_attentions_are_refused() -> None:
    module = build(titan.attention(decoder(), **SIZES).layers[0].attention)
    with pytest.raises(ValueError, match=r"holds \[?100\]? there.*whole_sequences.*documents"):
        module(tokens(), None, POSITIONS % 100)
    kept = build(titan.attention(decoder(), documents=True, **SIZES).layers[0].attention)
    with pytest.raises(ValueError, match=r"token 100 of sequence 1 has 7, .* one more than"):
        kept(tokens(), None, torch.cat((POSITIONS, POSITIONS % 100 + 7 * (POSITIONS > 99))))
    with pytest.raises(ValueError, match=r"no positions.*whole_sequences"):
        module(tokens(), None, None)
    with pytest.raises(ValueError, match="attention_masks must be None"):
        module(tokens(), "a mask", POSITIONS)
    other = deepseekv3_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard")
    with pytest.raises(ValueError, match=r"layer 0 attends by .*must be GQAttention"):
        titan.attention(other, **SIZES)
    with pytest.raises(TypeError, match="top_k"):
        titan.attention(decoder(), top_k=3)


def test_whole_sequences_replaces_positions_alone() -> None:
    """Fails if tokens, labels or the loader's state are touched, or documents stay."""
    batch = {"input": torch.arange(8).view(2, 4), "positions": torch.tensor([[0, 1, 0, 1]] * 2)}
    heard: list[Any] = []

    class Loader(list[Any]):
        """A loader of one batch, which is asked for its state."""

        def state_dict(self) -> dict[str, int]:
            return {"at": 3}

        def load_state_dict(self, state: dict[str, int]) -> None:
            heard.append(state)

    def make(**options: Any) -> Loader:
        heard.append(options)
        return Loader([(batch, batch["input"] + 1)])

    loader = titan.WholeSequences.Config(inner=SimpleNamespace(build=make)).build(seq_len=4)
    ((inputs, labels),) = loader
    assert torch.equal(inputs["positions"], torch.arange(4).repeat(2, 1))
    assert inputs["input"] is batch["input"] and torch.equal(labels, batch["input"] + 1)
    assert loader.state_dict() == {"at": 3}
    loader.load_state_dict({"at": 5})
    assert heard == [{"seq_len": 4}, {"at": 5}]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_headtail_is_zigzag(world_size: int) -> None:
    """Fails if torchtitan hands a rank other tokens than lhcp takes them for."""
    from torch.distributed.tensor.experimental._attention import _HeadTailLoadBalancer

    order = _HeadTailLoadBalancer(SEQLEN, world_size, "cpu")._generate_indices().flatten()
    layout, size = make_layout("zigzag", world_size), SEQLEN // (2 * world_size)
    ours = [
        torch.arange(chunk * size, (chunk + 1) * size)
        for rank in range(world_size)
        for chunk in layout.chunks(rank)
    ]
    assert torch.equal(order.long(), torch.cat(ours))
