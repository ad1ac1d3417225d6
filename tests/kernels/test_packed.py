"""Documents in every kernel against the torch path, whatever the selection was made for."""

import pytest
import torch

from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernel_sets import kernel_set
from tests.kernels.cases import CASES, KernelCase, assert_close

OURS, TORCHS = kernel_set("triton"), kernel_set("torch")
NAMES = [x if x == "p3" else pytest.param(x, marks=pytest.mark.slow) for x in CASES]


def doubled(rows: QKV) -> QKV:
    return QKV(*(x.double() for x in rows))


@pytest.mark.parametrize("name", NAMES)
def test_means_and_scores(name: str) -> None:
    """Fails if a token of another document is in a mean or a score, or a divisor is wrong."""
    case = CASES[name]
    tokens, positions = case.qkv(case.geom.num_tokens), case.positions(1)
    means, *scores = OURS.pool_and_score(tokens, case.geom, True, positions)
    exact, *exact_scores = TORCHS.pool_and_score(doubled(tokens), case.geom, True, positions)
    for got, want in zip(means, exact, strict=True):
        assert_close(got, want, case.dtype)
    for got, want in zip(scores, exact_scores, strict=True):
        assert_close(got, want, torch.float32)
    scored = OURS.score_tensors(tokens.q, tokens.k, case.geom, positions)
    assert all(torch.equal(a, b) for a, b in zip(scored, scores, strict=True))


@pytest.mark.parametrize("kind", ["ties", "special"])
@pytest.mark.parametrize("name", ["p2_deep", "all_taken"])
def test_the_selection_equals_the_torch_path_s(name: str, kind: str) -> None:
    """Fails if a document's first token is not taken before every score, or out of its turn."""
    case = CASES[name]
    for seed, begins in enumerate((0.05, 0.2)):
        positions = case.positions(seed, begins)
        scores = case.scores(kind)
        got = OURS.select(*scores, case.geom, positions)
        want = TORCHS.select(*scores, case.geom, positions)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_more_candidates_than_a_block() -> None:
    """Fails if what is forced is lost where a search goes round a loop."""
    from lhcp.lighthouse.kernels.select import select

    case = KernelCase(3, 4, 6, 37, num_kv_heads=1, num_strata=1, batch=2)
    positions, scores = case.positions(3, 0.02), case.scores("special")
    got = select(*scores, case.geom, positions, max_block=16)
    want = TORCHS.select(*scores, case.geom, positions)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("made_for_them", [True, False], ids=["selected", "given"])
@pytest.mark.parametrize("name", NAMES)
def test_gather_backward(name: str, made_for_them: bool) -> None:
    """Fails if a token has a share in an entry of another document."""
    case, positions = CASES[name], CASES[name].positions(2)
    _, row_of_entry = case.selection(positions if made_for_them else None)
    grads = case.qkv(case.geom.subsequence)
    got = OURS.gather_backward(grads, row_of_entry, case.geom, positions)
    exact = TORCHS.gather_backward(doubled(grads), row_of_entry, case.geom, positions)
    for ours, theirs in zip(got, exact, strict=True):
        assert_close(ours, theirs, case.dtype)


@pytest.mark.parametrize("made_for_them", [True, False], ids=["selected", "given"])
@pytest.mark.parametrize("name", NAMES)
def test_scatter_and_its_gradients(name: str, made_for_them: bool) -> None:
    """Fails if an entry, or what a chunk is owed, serves a token of another document."""
    case, positions = CASES[name], CASES[name].positions(3)
    geom, maps = case.geom, CASES[name].selection(positions if made_for_them else None)
    o, dout = (case.rows(n, case.num_heads) for n in (geom.subsequence, geom.num_tokens))
    exact = TORCHS.scatter(o.double(), maps[1], geom, positions)
    out = OURS.scatter(o, maps[1], geom, positions)
    assert_close(out, exact, case.dtype)

    halo = case.rows(geom.num_chunks * (geom.num_levels - 1), case.num_heads)
    halo = halo.unflatten(1, (geom.num_chunks, geom.num_levels - 1))
    TORCHS.scatter_edges(exact, o.double(), maps[1], halo.double(), geom, positions)
    OURS.scatter_edges(out, o, maps[1], halo, geom, positions)
    assert_close(out, exact, case.dtype)

    do = OURS.scatter_backward(dout, *maps, geom, positions)
    wanted = TORCHS.scatter_backward(dout.double(), *maps, geom, positions)
    assert_close(do, wanted, case.dtype)
    dhalo = OURS.edge_grads(dout, geom, positions)
    assert_close(dhalo, TORCHS.edge_grads(dout.double(), geom, positions), torch.float32)


@pytest.mark.parametrize("kernels", [OURS, TORCHS], ids=["triton", "torch"])
@pytest.mark.parametrize(
    "case",
    [
        KernelCase(3, 2, 2, 4, num_chunks=2, num_heads=1, num_kv_heads=1, head_dim=16),
        pytest.param(CASES["p2_deep"], marks=pytest.mark.slow),
    ],
    ids=["first", "later"],
)
def test_one_document_has_the_bits_of_none(case: KernelCase, kernels) -> None:
    """Fails if what is divided, added or chosen is so otherwise where nothing is kept apart."""
    geom = case.geom
    one = (
        torch.arange(geom.num_tokens, dtype=torch.int32)
        .expand(case.batch, -1)
        .to(case.scores()[0].device)
    )
    if not geom.has_first:
        one = one + 5 * geom.num_tokens
    tokens, scores = case.qkv(geom.num_tokens), case.scores("ties")
    grads, dout = case.qkv(geom.subsequence), case.rows(geom.num_tokens, case.num_heads)
    results = []
    for positions in (one, None):
        means, *found = kernels.pool_and_score(tokens, geom, True, positions)
        maps = kernels.select(*scores, geom, positions)
        halo = kernels.last_rows(grads.q, maps[1], geom).roll(1, 1)
        # Nobody owes the first chunk of a sequence anything.
        halo[:, 0] = 0
        out = kernels.scatter(grads.q, maps[1], geom, positions)
        found += [*means, *maps, out.clone()]
        kernels.scatter_edges(out, grads.q, maps[1], halo, geom, positions)
        found += [out, *kernels.gather_backward(grads, maps[1], geom, positions)]
        found.append(kernels.scatter_backward(dout, *maps, geom, positions))
        found.append(kernels.edge_grads(dout, geom, positions)[:, 1:])
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
