"""`set_mode` on whole models."""

import pytest
from torch import nn

import lhcp
from lhcp.testing.inputs import small_config

CONFIG, _ = small_config()


class Block(nn.Module):
    """A user's block, of which lhcp knows nothing."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"attend": attend})


def model(*configs: lhcp.LighthouseConfig | None) -> nn.Module:
    return nn.Sequential(*(Block(lhcp.LighthouseAttention(c)) for c in configs))


def modes(module: nn.Module) -> str:
    found = [m.mode for m in module.modules() if isinstance(m, lhcp.LighthouseAttention)]
    return "".join(mode[0] for mode in found)


def test_every_layer_of_any_model_switches() -> None:
    """Fails if a layer inside other modules is not found, or the count is wrong."""
    net = model(CONFIG, CONFIG, CONFIG)
    assert lhcp.set_mode(net, "dense") == 0 and modes(net) == "ddd"
    assert lhcp.set_mode(net, "lighthouse") == 3 and modes(net) == "lll"


def test_a_layer_without_a_config_stays_dense() -> None:
    net = model(None, CONFIG)
    assert lhcp.set_mode(net, "lighthouse") == 1 and modes(net) == "dl"


def test_dense_layers_count_as_the_models_layers_do() -> None:
    """Fails if an index counts the lighthouse layers alone, or from the wrong end."""
    net = model(None, CONFIG, CONFIG, CONFIG)
    assert lhcp.set_mode(net, "lighthouse", dense_layers=(1, -1)) == 1 and modes(net) == "ddld"
    # A later call says all there is to say.
    assert lhcp.set_mode(net, "lighthouse") == 3 and modes(net) == "dlll"


def test_a_layer_shared_by_two_blocks_counts_once() -> None:
    shared = lhcp.LighthouseAttention(CONFIG)
    net = nn.Sequential(Block(shared), Block(shared))
    assert lhcp.set_mode(net, "lighthouse") == 1
    with pytest.raises(ValueError, match=r"\[1\] are not layers"):
        lhcp.set_mode(net, "lighthouse", dense_layers=(1,))


@pytest.mark.parametrize(
    ("mode", "dense_layers", "message"),
    [("sparse", (), "must be 'lighthouse' or 'dense'"), ("dense", (2,), "0 to 1")],
)
def test_a_mistake_switches_nothing(mode: str, dense_layers: tuple[int], message: str) -> None:
    """Fails if half of a model is switched when the error comes."""
    net = model(CONFIG, CONFIG)
    with pytest.raises(ValueError, match=message):
        lhcp.set_mode(net, mode, dense_layers=dense_layers)  # type: ignore[arg-type]
    assert modes(net) == "ll"


def test_a_model_without_our_layers_is_told_how_to_have_one() -> None:
    with pytest.raises(ValueError, match=r"a Linear that holds no lhcp\.LighthouseAttention"):
        lhcp.set_mode(nn.Linear(2, 2), "dense")
