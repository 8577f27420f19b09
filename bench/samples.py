"""What was measured: samples, what must hold of them, and what is reported."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.client import Stalled

#: Whose numbers stand in which column.
VMBUS = "vmbus"
FAST = "vmbus, dbus-fast"
PEER = "libvirt-dbus"
FLOOR = "floor"


@dataclass
class Samples:
    """Numbers of one kind, in the unit of the result that they belong to."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def most(self) -> float:
        return max(self.values)

    def quantile(self, part: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

    @property
    def p95(self) -> float:
        return self.quantile(0.95)

    def __sub__(self, floor: Samples) -> float:
        return self.median - floor.median

    def __truediv__(self, other: Samples) -> float:
        return self.median / other.median


@dataclass(frozen=True)
class Check:
    """Something that must not be more than a limit."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.what}: {self.value:.3g}{unit} (at most {self.limit:g}{unit})"


@dataclass
class Result:
    """One thing that was measured: its columns, and the checks for each column that has any."""

    title: str
    columns: dict[str, Samples]
    unit: str = "ms"
    checks: dict[str, list[Check]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def check(self, column: str, what: str, value: float, limit: float, unit: str = "") -> None:
        self.checks.setdefault(column, []).append(Check(what, value, limit, unit))

    def check_ratio(self, column: str, limit: float, to: str = PEER) -> None:
        """The medians' ratio, where both were measured."""
        if column in self.columns and to in self.columns:
            ratio = self.columns[column] / self.columns[to]
            self.check(column, f"ratio to {to}", ratio, limit)

    def check_over_floor(self, column: str, limit: float) -> None:
        if column in self.columns and FLOOR in self.columns:
            over = self.columns[column] - self.columns[FLOOR]
            self.check(column, "over the floor", over, limit, self.unit)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "notes": self.notes,
            "columns": {
                name: {
                    "median": each.median,
                    "p95": each.p95,
                    "min": min(each.values),
                    "max": each.most,
                    "samples": len(each.values),
                }
                for name, each in self.columns.items()
            },
            "checks": {
                name: [{**vars(each), "met": each.met} for each in checks]
                for name, checks in self.checks.items()
            },
        }


def timed(function: Callable[[], object]) -> float:
    """How long a call takes, in milliseconds."""
    before = time.perf_counter()
    function()
    return (time.perf_counter() - before) * 1e3


def alternate(
    functions: Mapping[str, Callable[[], float]], rounds: int, tick: Callable[[], None]
) -> dict[str, Samples]:
    """Call them in turn, over and over, so that what else the machine does hits all of them.

    Each gives one sample, unless polkitd stalls. The first round warms up, and doesn't count.
    """
    columns = {name: Samples() for name in functions}
    for number in range(rounds + 1):
        for name in shuffled(functions, number):
            with contextlib.suppress(Stalled):
                value = functions[name]()
                if number:
                    columns[name].values.append(value)
        tick()
    return columns


def shuffled(names: Iterable[str], number: int) -> list[str]:
    """The order of a round: who has just had a turn may still tidy up while the next has its own.

    The same for the same number.
    """
    order = list(names)
    random.Random(number).shuffle(order)
    return order
