"""What is shown and kept of a run: a table, the checks, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.crowd import CURVES, Curve
from bench.samples import FAST, FLOOR, PEER, VMBUS, Result, Samples

_COLUMNS = (VMBUS, FAST, PEER, FLOOR)


@dataclass(frozen=True)
class Report:
    """A run. imports: what each module takes at the service's start, in milliseconds."""

    machine: dict[str, str]
    results: list[Result]
    curves: dict[str, Curve]
    imports: dict[str, float]

    def show(self, console: Console) -> None:
        """Print it, for people."""
        about = "; ".join(f"{name}: {value}" for name, value in self.machine.items())
        console.print(about, style="dim", highlight=False)
        table = Table("", *_COLUMNS, title="median / p95")
        for result in self.results:
            table.add_row(*_row_of(result))
        console.print(table)
        for result in self.results:
            for column, notes in result.notes.items():
                for note in notes:
                    console.print(f"{column}: {result.title}: {note}", soft_wrap=True, markup=False)
            for column, checks in result.checks.items():
                for check in checks:
                    mark = "[green]met   [/green]" if check.met else "[bold red]missed[/bold red]"
                    console.print(f"{mark} {column}: {result.title}: {check}", soft_wrap=True)

    def write(self, directory: Path) -> None:
        """Write it as JSON, and its tables as Markdown."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "benchmark.json").write_text(self.as_json())
        (directory / "benchmark.md").write_text("\n".join(self._markdown()) + "\n")

    def as_json(self) -> str:
        results = [each.as_json() for each in self.results]
        return json.dumps({**vars(self), "results": results}, indent=1) + "\n"

    def _markdown(self) -> Iterator[str]:
        yield "# The numbers of the last run"
        yield ""
        yield "Written by `make bench`; [performance.md](performance.md) says what they mean."
        yield ""
        yield from (f"- {name}: {value}" for name, value in self.machine.items())
        yield from _table("Median / 95th percentile:", ["", *_COLUMNS], map(_row_of, self.results))
        yield from _table("Where it must be:", ["what", "limit", VMBUS, FAST], self._verdicts())
        for result in self.results:
            for column, notes in result.notes.items():
                yield ""
                yield f"{result.title}: {column}: {'; '.join(notes)}."
        for name, title in CURVES.items():
            sizes = sorted({size for each in self.curves.values() for size, _ in each[name]})
            if sizes:
                heads = ["", *map(str, sizes)]
                yield from _table(f"{title}, by the number of VMs:", heads, self._curve(name))
        if self.imports:
            rows = ([name, f"{value:.1f}"] for name, value in self.imports.items())
            yield from _table("Imports at the service's start:", ["module", "ms of its own"], rows)

    def _verdicts(self) -> Iterator[list[str]]:
        for result in self.results:
            first = next(iter(result.checks.values()), [])
            for index, check in enumerate(first):
                limit = f"{check.limit:.4g} {check.unit}".strip()
                row = [f"{result.title}: {check.what}", limit]
                for column in (VMBUS, FAST):
                    found = result.checks.get(column, [])[index : index + 1]
                    row += [f"{e.value:.3g}{'' if e.met else ' **missed**'}" for e in found] or [""]
                yield row

    def _curve(self, name: str) -> Iterator[list[str]]:
        sizes = sorted({size for each in self.curves.values() for size, _ in each[name]})
        for column, curve in self.curves.items():
            found = dict(curve[name])
            yield [column, *(f"{found[size]:.3g}" if size in found else "" for size in sizes)]


def _row_of(result: Result) -> list[str]:
    title = f"{result.title}, {result.unit}" if result.unit else result.title
    return [title, *(_cell(result.columns.get(name)) for name in _COLUMNS)]


def _cell(samples: Samples | None) -> str:
    return "" if samples is None else f"{samples.median:.3g} / {samples.p95:.3g}"


def _table(title: str, heads: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield from ("", title, "")
    for row in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(row)} |"
