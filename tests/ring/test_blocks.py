"""Blocks and their merge: against plain attention, in pieces that add up to the whole."""

import itertools

import pytest
import torch
from torch import Tensor

from lhcp.layer.plan import choose_backend
from lhcp.ring.block import BLOCKS, packages
from lhcp.ring.block.base import BackwardInputs, Request
from lhcp.ring.block.torch_ops import unrecognised_schemas
from lhcp.ring.kv import KV
from lhcp.ring.merge.merge import merge
from lhcp.ring.merge.partial import Partial
from lhcp.ring.shape import CAUSAL, FULL, Mask
from lhcp.testing.inputs import qkv
from lhcp.testing.tolerance import assert_close_float64
from tests.cases import dense_reference, strided

HERE = [
    name
    for name, block in BLOCKS.items()
    if block.missing is None and block.refuses(Request(torch.float64, 8, "cpu")) is None
]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("backend", HERE)
def test_block_equals_plain_attention(backend: str, groups: int, causal: bool) -> None:
    """Fails if heads, the mask, the scale or lse's base differ."""
    q, k, v, do = qkv(19, batch=2, num_heads=2 * groups, num_kv_heads=2, head_dim=7, seed=groups)
    mask, kv = Mask(causal), KV(k, v)
    out, lse = BLOCKS[backend].forward(q, kv, mask, 0.4)
    grads = BLOCKS[backend].backward(BackwardInputs(do, q, kv, out, lse), mask, 0.4)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, expected_lse = dense_reference(*leaves, causal, 0.4)
    assert_close_float64("out", out, o)
    assert_close_float64("lse", lse, expected_lse)
    for name, ours, theirs in zip(
        ("dq", "dk", "dv"), grads, torch.autograd.grad(o, leaves, do), strict=True
    ):
        assert_close_float64(name, ours, theirs)


@pytest.mark.parametrize("lengths", [(1, 6), (6, 1), (3, 8)], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_block_of_other_lengths(backend: str, lengths: tuple[int, int]) -> None:
    """Fails if a full block needs as many queries as keys."""
    q = qkv(lengths[0], num_kv_heads=2, seed=1)[0]
    _, k, v, _ = qkv(lengths[1], num_kv_heads=2, seed=2)
    out, lse = BLOCKS[backend].forward(q, KV(k, v), FULL, 0.4)
    expected, expected_lse = dense_reference(q, k, v, False, 0.4)
    assert_close_float64("out", out, expected)
    assert_close_float64("lse", lse, expected_lse)


@pytest.mark.parametrize("backend", HERE)
def test_block_takes_views(backend: str) -> None:
    """Fails if a block reads or writes through the wrong strides."""
    q, k, v, do = qkv(16, batch=2, num_kv_heads=2, seed=3)
    block = BLOCKS[backend]
    kv = KV(k, v)
    out, lse = block.forward(q, kv, CAUSAL, 0.4)
    again, lse_again = block.forward(strided(q), kv.map(strided), CAUSAL, 0.4)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    grads = block.backward(BackwardInputs(do, q, kv, out, lse), CAUSAL, 0.4)
    views = BackwardInputs(strided(do), strided(q), kv.map(strided), strided(out), lse)
    for ours, theirs in zip(block.backward(views, CAUSAL, 0.4), grads, strict=True):
        assert_close_float64("grad", ours, theirs)


def in_pieces(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Full attention, merged over pieces of the keys in the order of `cuts`."""
    block = BLOCKS["math"]
    kv, pieces = KV(k, v), itertools.pairwise(cuts)
    parts = [block.forward(q, kv.tokens(*piece), FULL, 0.4) for piece in pieces]
    out, lse = torch.full_like(q, torch.nan), torch.full_like(parts[0][1], torch.nan)
    merge(out, lse, [Partial.whole(*part) for part in parts])
    return out, lse


@pytest.mark.parametrize("size", [1, 30, 1000], ids=lambda s: f"logits{s}")
def test_merged_pieces_are_the_whole(size: int) -> None:
    """Fails if the merge loses a weight, or overflows where logits are large."""
    q, k, v, _ = qkv(24, batch=2, num_kv_heads=2, seed=4)
    q = q * size
    out, lse = in_pieces(q, k, v, [0, 5, 6, 17, 24])
    expected, expected_lse = dense_reference(q, k, v, False, 0.4)
    assert_close_float64("out", out, expected)
    assert_close_float64("lse", lse, expected_lse)


def test_merge_rounds_once() -> None:
    """Fails if a merge into a narrow output is computed in low precision."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out, other = draw(2, 33, 3, 8).bfloat16(), draw(2, 33, 3, 8).bfloat16()
    lse, other_lse = draw(2, 3, 33), draw(2, 3, 33)
    weight = torch.sigmoid(lse.double() - other_lse.double()).transpose(1, 2)[..., None]
    exact = out.double() * weight + other.double() * (1 - weight)
    merge(out, lse, [Partial.whole(out, lse), Partial.whole(other, other_lse)])
    eps = torch.finfo(torch.bfloat16).eps
    assert bool(((out.double() - exact).abs() <= 0.51 * eps * exact.abs() + 1e-6).all())


def test_torch_operators_are_as_known() -> None:
    """Fails on a torch whose attention operators changed: read them, then teach torch_ops.py."""
    assert unrecognised_schemas() == {}


def test_auto_is_a_function_of_static_facts() -> None:
    """Fails if "auto" could pick another backend on another rank, or none."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert choose_backend("auto", dtype, 64, cpu).name == "cpu"
    assert choose_backend("auto", torch.float32, 64, cuda).name == "math"
    assert choose_backend("auto", torch.bfloat16, 100, cuda).name == "math"


def test_a_backend_that_is_not_deterministic_refuses_that_mode() -> None:
    """Fails if a backend goes on in a mode that it does not obey."""
    cuda = torch.device("cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match=r"not deterministic .* backends that can: .*math"):
            choose_backend("cudnn", torch.bfloat16, 64, cuda)
        assert choose_backend("auto", torch.bfloat16, 64, cuda).can_be_deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "reason"),
    [
        ("cudnn", torch.float32, 64, "inputs are torch.float32, it takes"),
        ("cudnn", torch.bfloat16, 256, "head_dim=256, it takes at most 128"),
        ("flash", torch.bfloat16, 60, "head_dim=60, it takes multiples of 8"),
    ],
)
def test_a_refusal_says_why(backend: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    """Fails if a backend is handed what it cannot do, or the reason is not the reason."""
    with pytest.raises(ValueError, match=f"backend='{backend}': {reason}.*backends that can: "):
        choose_backend(backend, dtype, head_dim, torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "head_dim", "able"),
    [
        *(((9, 0), head_dim, True) for head_dim in (64, 192, 256)),
        *(((10, 3), head_dim, head_dim != 192) for head_dim in (128, 192, 256)),
        *(((12, 0), head_dim, head_dim <= 128) for head_dim in (128, 136)),
    ],
)
def test_flash_attn_4_is_not_handed_what_its_card_cannot(
    capability: tuple[int, int], head_dim: int, able: bool
) -> None:
    """Fails if "auto" would hand flash-attn-4 a head_dim that it has no kernel for on that card."""
    asked = Request(torch.bfloat16, head_dim, "cuda", capability)
    assert (BLOCKS["fa4"].refuses(asked) is None) == able
    if not able:
        assert f"capability {capability[0]}" in str(BLOCKS["fa4"].refuses(asked))


def test_no_two_backends_are_preferred_alike() -> None:
    """Fails if the order of a table would decide between two backends of one device."""
    for device in ("cpu", "cuda"):
        numbers = [b.preference for b in BLOCKS.values() if device in b.devices]
        assert len(set(numbers)) == len(numbers)


def test_a_package_that_cannot_import_is_missing(tmp_path, monkeypatch) -> None:
    """Fails if "auto" would take the copy of flash-attn-4 that flash-attn 2 brings, and crash."""
    (tmp_path / "shipped" / "cute").mkdir(parents=True)
    (tmp_path / "shipped" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert packages._missing("shipped", "cute", "install") is None
    said = packages._missing("shipped", "cute", "pip install x", needs="what_it_imports")
    assert said is not None and "what_it_imports" in said and "pip install x" in said
