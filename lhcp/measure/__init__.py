"""What the rotation costs, measured against its own twins; and whether a selection is alive.

Three runs take turns in every repeat, each after a barrier: the real thing (T), the same code on
groups that send nothing (C), and the same messages without attention (M). Then rank 0 runs the
whole sub-sequence alone (T1) while the others wait. A repeat counts its slowest rank.
"""

from lhcp.measure.measure import measure_overhead
from lhcp.measure.report import OverheadReport
from lhcp.measure.selection import diagnose
from lhcp.measure.selection_report import LevelReport, SelectionReport
from lhcp.measure.step import StepCost, measure_step
from lhcp.measure.timings import Mark, PhaseReport, StepReport, Timing

__all__ = [
    "LevelReport",
    "Mark",
    "OverheadReport",
    "PhaseReport",
    "SelectionReport",
    "StepCost",
    "StepReport",
    "Timing",
    "diagnose",
    "measure_overhead",
    "measure_step",
]
