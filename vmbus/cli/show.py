"""The commands that look: list and status."""

from __future__ import annotations

from dataclasses import asdict, replace

import click

from ..client import About
from ..events import Snapshot
from .common import Options, command, complete_names, connect, find
from .size import size_text
from .text import ago, clean, moment, print_json, print_table, user_name

HEADER = ("ID", "NAME", "STATE", "VMM", "CID", "MEMORY", "CPUS", "USER", "REASON")


@command(name="list")
async def list_command(options: Options) -> None:
    """Show all VMs."""
    async with connect(options, asks=False) as bus:
        vms = await bus.vms()
    if options.json:
        print_json([asdict(vm) for vm in vms])
    else:
        print_table(HEADER, [row(vm) for vm in vms], legend=options.legend)


def row(vm: Snapshot) -> list[str]:
    """A VM's line of the table; no cell is empty."""
    user = user_name(vm.requester_uid)
    numbers = (str(vm.cid), f"{vm.memory_mib}MiB", str(vm.cpus))
    return [str(vm.id), vm.name, vm.state, vm.vmm, *numbers, user, vm.death_reason or "-"]


@command()
@click.argument("name", required=False, shell_complete=complete_names)
async def status(options: Options, name: str | None) -> None:
    """Show one VM in full, or without NAME the service."""
    async with connect(options, asks=False) as bus:
        if name is None:
            about = await bus.about()
            _show(options, about, "vmbus", _about(about))
            return
        found = await find(bus, name)
        vm = await found.properties()
        if vm.pid:
            vm = replace(vm, memory_actual=await found.memory_actual())
    _show(options, vm, f"VM {vm.id}: {vm.name}", _details(vm))


def _show(
    options: Options, what: Snapshot | About, title: str, lines: list[tuple[str, str]]
) -> None:
    if options.json:
        print_json(asdict(what))
        return
    click.echo(clean(title))
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        click.echo(f"{label:>{width}}: {clean(value)}")


def _about(about: About) -> list[tuple[str, str]]:
    vmms = ", ".join(about.available_vmms) or "none, or not known yet"
    return [("Version", about.version), ("VMMs", vmms), ("VMs", str(about.vm_count))]


def _details(vm: Snapshot) -> list[tuple[str, str]]:
    since = _since(vm)
    lines = [("State", f"{vm.state} since {moment(since)}; {ago(since)}" if since else vm.state)]
    if vm.death_reason:
        lines.append(("Reason", f"{vm.death_reason} (status {vm.exit_status})"))
    if vm.last_words:
        lines.append(("Last words", vm.last_words))
    if vm.payload_state not in ("", "none"):
        exited = f" (status {vm.payload_exit_status})" if vm.payload_exit_status >= 0 else ""
        lines.append(("Guest says", f"{vm.payload_state}{exited} {vm.status_text}".rstrip()))
    lines.append(("VMM", f"{vm.vmm}, pid {vm.pid}" if vm.pid else vm.vmm))
    now = f", now {size_text(vm.memory_actual)}" if vm.pid else ""
    lines.append(("Memory", f"{vm.memory_mib} MiB{now}"))
    lines.append(("CPUs", str(vm.cpus)))
    lines.append(("CID", str(vm.cid)))
    if vm.protected:
        lines.append(("Protected", "yes"))
    lines.append(("Created", moment(vm.created_timestamp)))
    if vm.started_timestamp:
        lines.append(("Started", moment(vm.started_timestamp)))
    label = f", label {vm.requester_sid}" if vm.requester_sid else ""
    who = f"{user_name(vm.requester_uid)} (uid {vm.requester_uid}, pid {vm.requester_pid}{label})"
    return [*lines, ("Requester", who), ("Object", vm.path)]


def _since(vm: Snapshot) -> int:
    """When the VM came into its state, 0 where nothing tells."""
    if vm.state == "not-started":
        return vm.created_timestamp
    if vm.state in ("dead", "failed"):
        return vm.died_timestamp
    return vm.started_timestamp if vm.state == "running" else 0


COMMANDS = (list_command, status)
