"""`graphed`: a model's attention as CUDA graphs, in one call."""

from collections.abc import Iterable

from torch import nn

from lhcp.layer.graphs import Graphs
from lhcp.layer.module import LighthouseAttention


def graphed(
    model: nn.Module | Iterable[LighthouseAttention], *, shared: bool = False, always: bool = False
) -> Graphs:
    """Let the attention of all layers of a model run as CUDA graphs, messages included.

    Call it once, before training; it changes the layers in place, which have no parameters, so FSDP
    may move weights as before. The first two calls of a layer run as they are, then it is recorded,
    and anew when `mode` or a size changes (of up to four sizes the graphs stay). An output that you
    keep is overwritten by the layer's next run, so copy it. Memory is that of the step without
    graphs and one layer's inputs and gradients more.

    Calls that take the GPU longer than the host are left as they are, unless `always`: there is
    nothing to gain, and a graph's copies of inputs and gradients cost some percent of the call.
    Which it is, each rank measures in the second call of its layers, and if the host of any of them
    is the slower, all ranks record: so call `graphed` on every rank.

    Documents (`cu_seqlens`) are read before a graph, which gets them as inputs: they may change at
    every step. How many lie in a chunk, how long they are and how far they reach, each up to a
    power of two, is a graph's own: where that changes it is recorded anew, as at another size.

    What cannot be a graph runs as it is and is counted by reason in `Graphs.eager` (and logged
    once each): calls without a gradient, on a CPU, with timers, or inside another graph. A model
    that runs two forwards before the first one's backward, as in a pipeline, gets an error in that
    backward.

    Args:
        model: Any module that holds `LighthouseAttention` layers, or the layers.
        shared: one pair of graphs for all layers of equal calls, for a model whose layers all are
            inside activation checkpointing: memory is that of one layer.
        always: record also what takes the GPU longer than the host.

    Returns:
        The `Graphs`; `release()` them before you destroy the process group.

    Raises:
        ValueError: there is no such layer.
    """
    modules = model.modules() if isinstance(model, nn.Module) else model
    layers = [module for module in modules if isinstance(module, LighthouseAttention)]
    if not layers:
        raise ValueError("model holds no lhcp.LighthouseAttention, whose calls would be graphs")
    graphs = Graphs(shared, always)
    for layer in layers:
        layer.graphs = graphs
    return graphs


def ungraphed(model: nn.Module | Iterable[LighthouseAttention]) -> None:
    """Take back what `graphed` did, and the memory of its graphs."""
    modules = model.modules() if isinstance(model, nn.Module) else model
    for module in modules:
        if isinstance(module, LighthouseAttention) and module.graphs is not None:
            module.graphs.release()
            module.graphs = None
