"""The pictures: what single things take beside the peer and the floor, and cost as work grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.crowd import CURVES, Curve
from bench.samples import FAST, FLOOR, PEER, VMBUS, Result

_COLORS = {VMBUS: "#1f6fb2", FAST: "#7db4dd", PEER: "#c8553d", FLOOR: "#9a9a9a"}
_PER_ROW = 3

mpl.use("svg")
# The same numbers make the same file.
mpl.rcParams["svg.hashsalt"] = "vmbus"
mpl.rcParams["font.size"] = 8


def draw_results(file: Path, results: Sequence[Result]) -> None:
    """Draw a panel for each result: medians as bars, 95th percentiles as marks."""
    shown = [each for each in results if each.unit]
    figure, panels = _grid(len(shown))
    for panel, result in zip(panels, shown, strict=False):
        names = [name for name in _COLORS if name in result.columns]
        medians = [result.columns[name].median for name in names]
        rows = range(len(names))
        panel.barh(rows, medians, color=[_COLORS[name] for name in names])
        panel.plot([result.columns[name].p95 for name in names], rows, "k|")
        panel.set_yticks(rows, names)
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.set_title(f"{result.title}, {result.unit}", fontsize=8)
    _save(figure, file)


def draw_curves(file: Path, curves: Mapping[str, Curve]) -> None:
    """Draw a panel for each curve, both axes logarithmic."""
    shown = {
        name: title for name, title in CURVES.items() if any(each[name] for each in curves.values())
    }
    figure, panels = _grid(len(shown))
    for panel, (name, title) in zip(panels, shown.items(), strict=False):
        for column, curve in curves.items():
            sizes = [size for size, _ in curve[name]]
            values = [value for _, value in curve[name]]
            panel.plot(sizes, values, "o-", color=_COLORS[column], label=column, markersize=3)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("VMs")
        panel.legend(fontsize=7)
    _save(figure, file)


def _grid(count: int) -> tuple[Any, list[Any]]:
    rows = math.ceil(count / _PER_ROW)
    figure = Figure(figsize=(11, 1.9 * rows + 0.2), layout="constrained")
    panels = list(figure.subplots(rows, _PER_ROW, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})
