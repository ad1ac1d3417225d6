"""lhcp: the context-parallel runtime for Lighthouse attention (arXiv 2605.06554).

Start with `LighthouseConfig` and `LighthouseAttention`; lhcp/METHOD.md explains the method.
"""

from lhcp.bounds import (
    cu_seqlens_from_document_ids,
    cu_seqlens_from_hugging_face,
    cu_seqlens_from_position_ids,
)
from lhcp.comm.sharding import pad_to_length, pad_to_multiple, positions, shard, unshard
from lhcp.comm.watchdog import RanksLost, Watchdog
from lhcp.config import LighthouseConfig
from lhcp.context.context_parallel import ContextParallel
from lhcp.cost.calibration import Calibration
from lhcp.cost.tables import built_in_calibration, read_calibration
from lhcp.integrations.ring_flash_attn import RING_FLASH_ATTN
from lhcp.layer.choices import PACKAGE_RINGS
from lhcp.layer.dense import ring_attention
from lhcp.layer.graphed import graphed, ungraphed
from lhcp.layer.lighthouse import lighthouse_attention
from lhcp.layer.mode import set_mode
from lhcp.layer.module import LighthouseAttention
from lhcp.layer.select import select
from lhcp.lighthouse.select import Selection
from lhcp.measure import (
    OverheadReport,
    SelectionReport,
    StepCost,
    diagnose,
    measure_overhead,
    measure_step,
)
from lhcp.timing import Timers

# Here the rooms meet: integrations are above the layer, which takes their rings by name.
PACKAGE_RINGS["ring_flash_attn"] = RING_FLASH_ATTN

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "ContextParallel",
    "LighthouseAttention",
    "LighthouseConfig",
    "OverheadReport",
    "RanksLost",
    "Selection",
    "SelectionReport",
    "StepCost",
    "Timers",
    "Watchdog",
    "built_in_calibration",
    "cu_seqlens_from_document_ids",
    "cu_seqlens_from_hugging_face",
    "cu_seqlens_from_position_ids",
    "diagnose",
    "graphed",
    "lighthouse_attention",
    "measure_overhead",
    "measure_step",
    "pad_to_length",
    "pad_to_multiple",
    "positions",
    "read_calibration",
    "ring_attention",
    "select",
    "set_mode",
    "shard",
    "ungraphed",
    "unshard",
]
