"""Measure vmbus beside libvirt-dbus, and alone with thousands of VMs. Needs root."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from bench import clients, crowd, imports, machine, pair, report
from bench.client import CallFailed
from bench.crowd import Curve
from bench.plan import LIBRARIES, MEASURES, Plan
from bench.reaper import under_a_reaper
from bench.samples import Result
from bench.stage import GUEST, compile_package
from tests.rig import ROOT

_PAIR = ("calls", "many", "lives", "create", "start")


def _measure(plan: Plan) -> tuple[list[Result], dict[str, Curve], list[str]]:
    """All that is wanted: the results, the curves, and what failed."""
    results: list[Result] = []
    curves: dict[str, Curve] = {}
    failures: list[str] = []

    def gather(found: Iterator[Result]) -> None:
        # What was measured before a failure stands, and so does what comes after it.
        try:
            results.extend(found)
        except (CallFailed, OSError) as error:
            failures.append(str(error))
            plan.console.print(f"[bold red]failed:[/bold red] {escape(str(error))}")

    with tempfile.TemporaryDirectory(prefix="vmbus-bench-") as name:
        # The service runs the stand-in as a user of its own.
        Path(name).chmod(0o755)
        standin = crowd.build_standin(Path(name))
        if plan.wants(*_PAIR):
            gather(pair.measure(plan))
        if plan.wants("crowd"):
            gather(crowd.measure(plan, standin, curves))
        if plan.wants("clients"):
            gather(clients.measure(plan, standin))
    return results, curves, failures


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("measures", nargs=-1, type=click.Choice(list(MEASURES)))
@click.option("--quick", is_flag=True, help="Few samples and small crowds.")
@click.option("--library", type=click.Choice(list(LIBRARIES.values())), help="With this one only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write JSON, tables and pictures here.  [default: docs, of a whole run]",
)
def _main(
    measures: tuple[str, ...], quick: bool, library: str | None, as_json: bool, into: Path | None
) -> None:
    """Measure all, or the MEASURES named: calls, many, lives, create, start, crowd, clients."""
    if os.geteuid() != 0:
        raise click.ClickException("it acts as several users, and so must be run by root")
    if not (GUEST / "initrd").exists():
        raise click.ClickException("the guest is missing: run `make guest`")
    if into is None:
        whole = not measures and not quick and library is None
        into = ROOT / "docs" if whole else ROOT / "build" / "bench"
    libraries = {column: each for column, each in LIBRARIES.items() if library in (None, each)}
    plan = Plan(frozenset(measures), libraries, quick, Console(stderr=True))
    # As /run is, where the service has its files.
    tempfile.tempdir = "/dev/shm"
    compile_package()
    about = machine.describe()
    results, curves, failures = _measure(plan)
    about["load after"] = machine.load()
    into.mkdir(parents=True, exist_ok=True)
    found = report.Report(about, results, curves, imports.slowest() if plan.wants("start") else {})
    found.write(into)
    _draw(into, results, curves)
    if as_json:
        print(found.as_json(), end="")
    else:
        found.show(Console())
    if failures:
        sys.exit(1)


def _draw(into: Path, results: list[Result], curves: dict[str, Curve]) -> None:
    # Not before: it would make each process that is forked meanwhile larger.
    from bench import pictures

    if results:
        pictures.draw_results(into / "benchmark.svg", results)
    if curves:
        pictures.draw_curves(into / "benchmark-growth.svg", curves)


if __name__ == "__main__":
    if set(sys.argv).intersection(("-h", "--help")):
        _main()
    under_a_reaper(_main)
