"""What the rotation costs, measured against its own twins.

Three runs take turns in every repeat, each after a barrier: the real thing (T), the same code on
groups that send nothing (C), and the same messages without attention (M). Then rank 0 runs the
whole sub-sequence alone (T1) while the others wait. A repeat counts its slowest rank.
"""

from lhcp.measure.measure import measure_overhead
from lhcp.measure.report import Mark, OverheadReport, PhaseReport, StepReport, Timing

__all__ = [
    "Mark",
    "OverheadReport",
    "PhaseReport",
    "StepReport",
    "Timing",
    "measure_overhead",
]
