"""What the documentation shows to root: read in order, from the installation on, in one machine."""

from __future__ import annotations

from collections.abc import Iterator

from tests.pages import Block, all_blocks, is_as_shown, printed
from tests.rig import ROOT
from tests.system.conftest import Packages
from tests.system.machine import LONG, Machine, Program

#: What a page that comes first has to have done for the others.
FIRST = ROOT / "docs" / "install.md"


def _blocks() -> Iterator[Block]:
    """The commands behind "# ", and the files that are shown with their paths."""
    chosen = [block for block in all_blocks() if block.prompt == "#" or block.file.startswith("/")]
    yield from sorted(chosen, key=lambda block: block.page != FIRST)


def _prepare(machine: Machine, packages: Packages) -> None:
    """Who and what the pages say is there: alice and bob, the package, a guest's files."""
    for user in ("alice", "bob"):
        machine.run("useradd", "--create-home", user)
    machine.run("install", "-D", f"/packages/{packages.current.name}", "build/deb/vmbus_0_all.deb")
    machine.run("cp", "/guest/vmlinuz", "/guest/initrd", ".")


def _settled(machine: Machine, scopes: Program, block: Block) -> None:
    """Wait for what comes by itself a moment after the commands before."""
    if "machinectl" in block.commands:
        scopes.until('"MachineNew"')
    machine.run("journalctl", "--sync")


def test_what_root_is_shown_is_what_happens(clean: Machine, packages: Packages) -> None:
    """All commands for root succeed and print what the pages say, with the files that they show."""
    _prepare(clean, packages)
    monitor = ("busctl", "monitor", "--json=short", "--match=type='signal',member='MachineNew'")
    with clean.program(*monitor) as scopes:
        scopes.until("Monitoring")
        for block in _blocks():
            if block.file:
                clean.write(block.file, block.text)
                if block.file.endswith(".rules"):
                    # polkitd would take it as well, but who knows when.
                    clean.run("systemctl", "restart", "polkit.service")
                continue
            _settled(clean, scopes, block)
            done = clean.command("bash", "-euc", f"exec 2>&1\n{block.commands}", deadline=LONG)
            assert done.returncode == 0, f"{block}: {done.stdout}"
            shown = printed(block)
            assert shown is not None and is_as_shown(done.stdout, shown), f"{block}: {done.stdout}"
