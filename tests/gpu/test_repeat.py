"""Runs that repeat: the same bits, deterministic mode, CUDA graphs."""

import pytest
import torch

import lhcp
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernels import gather, pool, scatter, scatter_backward, select
from tests.gpu.problems import NAMES, LayerProblem, distance

LONG = LayerProblem(8, 4, 128, config=lhcp.LighthouseConfig(topk=512), seqlen=32768)


def test_our_kernels_give_the_same_bits_every_run():
    problem, geom = LONG, LONG.geom
    q, k, v, dout = (x.detach() for x in problem.draw())

    def run() -> tuple[torch.Tensor, ...]:
        tokens = QKV(q, k, v)
        means, sq, sk = pool.pool_and_score(tokens, geom)
        chosen = select.select(sq, sk, geom)
        sub = gather.gather(tokens, means, chosen[0], geom)
        out = scatter.scatter(sub[0], chosen[1], geom)
        do = scatter_backward.scatter_backward(dout, chosen[1], geom)
        grads = gather.gather_backward(QKV(do, sub.k, sub.v), chosen[1], geom)
        return (*means, sq, sk, *chosen, *sub, out, do, *grads)

    first = run()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("backend", ["flash", "auto"])
def test_deterministic_mode_gives_the_same_bits_every_run(deterministic, backend):
    rows = LONG.draw()
    first = LONG.answer(*rows, backend=backend)
    for _ in range(3):
        again = LONG.answer(*rows, backend=backend)
        for name, a, b in zip(NAMES, first, again, strict=True):
            assert torch.equal(a, b), name


def test_deterministic_mode_refuses_cudnn(deterministic):
    with pytest.raises(ValueError, match=r"not deterministic.*flash"):
        LONG.answer(*LONG.draw(), backend="cudnn")


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_a_cuda_graph_of_forward_and_backward_takes_new_inputs(backend):
    problem = LayerProblem(num_heads=4, num_kv_heads=2, head_dim=128)
    static = problem.draw(seed=1)

    def run() -> tuple[torch.Tensor, ...]:
        return problem.answer(*static, backend=backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    outputs = []
    for seed in (2, 3):
        fresh = problem.draw(seed)
        with torch.no_grad():
            for to, x in zip(static, fresh, strict=True):
                to.copy_(x)
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        want = problem.answer(*fresh, backend=backend)
        for name, a, b in zip(NAMES, results, want, strict=True):
            assert distance(a, b) < 5e-3, name
        outputs.append(results[0].clone())
    assert distance(*outputs) > 0.5
