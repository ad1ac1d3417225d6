"""`debug=True` on a GPU: what is not finite is named; what a graph replays is not looked at."""

import pytest
import torch

import lhcp
from lhcp.layer.module import Mode
from tests.gpu.problems import LayerProblem

PROBLEM = LayerProblem()


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_a_captured_call_says_that_it_is_not_looked_at(mode: Mode) -> None:
    """Fails if looking breaks a capture, or a graph passes for one whose runs are looked at."""
    layer = lhcp.LighthouseAttention(PROBLEM.config, debug=True)
    layer.mode = mode
    q, k, v = (x.detach() for x in PROBLEM.draw()[:3])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="part of a graph"), torch.cuda.graph(graph):
        out = layer(q, k, v)
    v[0, 1] = torch.nan
    graph.replay()
    assert bool(out.isnan().any())
    with pytest.raises(ValueError, match=r"v of rank 0 of 1 has .*first nan at \[0, 1, 0, 0\]"):
        layer(q, k, v)
