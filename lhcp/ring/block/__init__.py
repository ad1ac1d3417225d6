"""Block attention backends: one table."""

from lhcp.ring.block.base import Block
from lhcp.ring.block.math import MATH
from lhcp.ring.block.packages import FA4, FLASH_ATTN
from lhcp.ring.block.torch_ops import CPU, CUDNN, FLASH

BLOCKS: dict[str, Block] = {
    block.name: block for block in (CPU, CUDNN, FLASH, FA4, FLASH_ATTN, MATH)
}
"""Every backend by its name. Which one is taken for what is decided above the ring."""
