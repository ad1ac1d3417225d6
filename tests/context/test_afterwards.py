"""After training: the same model, made for one rank, takes the weights and generates densely."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lhcp
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankPool
from tests import llama

CONFIG, SEQLEN = small_config(num_strata=8)
PROMPT = 9


def tokens() -> Tensor:
    return torch.randint(llama.VOCABULARY, (1, SEQLEN), generator=torch.Generator().manual_seed(2))


def trained(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Take a lighthouse step under FSDP2; return dense logits of the ranks, and whole weights."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    cp = lhcp.ContextParallel(mesh["cp"])
    model = llama.make(lambda _: cp.attention(CONFIG), torch.float64)
    lhcp.set_mode(model, "lighthouse")
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["cp"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = cp.shard({"input_ids": tokens(), "labels": tokens()})
    logits = model(batch["input_ids"], batch["position_ids"])
    cp.loss(logits, batch["shift_labels"], over=mesh).backward()
    optimizer.step()
    lhcp.set_mode(model, "dense")
    with torch.no_grad():
        whole = cp.unshard(model(batch["input_ids"], batch["position_ids"]))
    options = StateDictOptions(full_state_dict=True)
    return whole, get_model_state_dict(model, options=options)


def test_a_model_of_one_rank_goes_on_from_the_weights(ranks: RankPool) -> None:
    """Fails if the layers leave something in a state dict, or a dense model alone is another; it
    takes prompts of any length."""
    logits, state = ranks.run(trained, 4)[0]
    alone = lhcp.ContextParallel()
    model = llama.make(lambda _: alone.attention(CONFIG), torch.float64)
    assert not any("attend" in name for name in state)
    model.load_state_dict(state)
    lhcp.set_mode(model, "dense")
    places = torch.arange(SEQLEN)
    with torch.inference_mode():
        assert torch.allclose(model(tokens(), places[None]), logits, rtol=1e-12, atol=1e-12)
        for length in (1, PROMPT):
            found = model(tokens()[:, :length], places[None, :length])
            assert torch.allclose(found, logits[:, :length], rtol=1e-12, atol=1e-12)
