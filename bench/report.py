"""What is shown and kept of a run: a table, the checks, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.crowd import CURVES, Curve
from bench.samples import FAST, FLOOR, PEER, VMBUS, Result, Samples

_COLUMNS = (VMBUS, FAST, PEER, FLOOR)


def show(console: Console, machine: Mapping[str, str], results: Sequence[Result]) -> None:
    """Print it all, for people."""
    console.print("; ".join(f"{name}: {value}" for name, value in machine.items()), style="dim")
    table = Table("", *_COLUMNS, title="median / p95")
    for result in results:
        title = f"{result.title}, {result.unit}" if result.unit else result.title
        table.add_row(title, *(_cell(result.columns.get(name)) for name in _COLUMNS))
    console.print(table)
    for result in results:
        for column, checks in result.checks.items():
            for check in checks:
                mark = "[green]met   [/green]" if check.met else "[bold red]missed[/bold red]"
                console.print(f"{mark} {column}: {result.title}: {check}")


def _cell(samples: Samples | None) -> str:
    return "" if samples is None else f"{samples.median:.3g} / {samples.p95:.3g}"


def as_json(
    machine: Mapping[str, str], results: Iterable[Result], curves: Mapping[str, Curve]
) -> str:
    whole = {
        "machine": machine,
        "results": [each.as_json() for each in results],
        "curves": curves,
    }
    return json.dumps(whole, indent=1) + "\n"


def write_markdown(
    file: Path, machine: Mapping[str, str], results: Sequence[Result], curves: Mapping[str, Curve]
) -> None:
    """Write the numbers as tables."""
    lines = ["# The numbers of the last run", "", "Written by `make bench`;"]
    lines += ["[performance.md](performance.md) says what they mean.", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "Median / 95th percentile:", "", _row("", *_COLUMNS), _rule(len(_COLUMNS) + 1)]
    for result in results:
        title = f"{result.title}, {result.unit}" if result.unit else result.title
        lines.append(_row(title, *(_cell(result.columns.get(name)) for name in _COLUMNS)))
    lines += ["", "Where it must be:", "", _row("what", "limit", VMBUS, FAST), _rule(4)]
    for result in results:
        first = next(iter(result.checks.values()), [])
        for index, check in enumerate(first):
            found = [result.checks[name][index] for name in result.checks]
            cells = [f"{each.value:.3g}{'' if each.met else ' **missed**'}" for each in found]
            limit = f"{check.limit:.4g} {check.unit}".strip()
            lines.append(_row(f"{result.title}: {check.what}", limit, *cells))
    for name, title in CURVES.items():
        lines += _curve(name, title, curves)
    file.write_text("\n".join(lines) + "\n")


def _curve(name: str, title: str, curves: Mapping[str, Curve]) -> list[str]:
    sizes = sorted({size for curve in curves.values() for size, _ in curve[name]})
    if not sizes:
        return []
    lines = ["", f"{title}, by the number of VMs:", "", _row("", *map(str, sizes))]
    lines.append(_rule(len(sizes) + 1))
    for column, curve in curves.items():
        found = dict(curve[name])
        cells = [f"{found[size]:.3g}" if size in found else "" for size in sizes]
        lines.append(_row(column, *cells))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(count: int) -> str:
    return "|" + "---|" * count
