"""VMs that Slurm places: vmbusctl is its task, and the VM goes where the task goes."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.rig import DEADLINE, Client, client, guest
from tests.slurm import NODES, Cluster

#: As docs/declared.md has them.
SRUN, SCANCEL = """
srun --nodes=2 --label --job-name=web vmbusctl run --config web.toml
scancel --name=web
""".strip().splitlines()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


@pytest.fixture
async def nodes(cluster: Cluster) -> AsyncIterator[dict[str, Client]]:
    """For each node a client that hears its service."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for node in NODES:
            connected = await stack.enter_async_context(client(cluster.services[node].rig))
            await connected.listen()
            clients[node] = connected
        yield clients


class Job:
    """A command of Slurm's that runs, in a directory with a web.toml."""

    def __init__(self, cluster: Cluster, command: str, directory: Path, **guest_does: object):
        guest(directory, **guest_does).rename(directory / "kernel")
        (directory / "web.toml").write_text('kernel = "kernel"\n')
        self._process = cluster.start(command, directory)
        self._heard = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def until(self, *wanted: str) -> None:
        """Wait until all that was said."""
        assert self._process.stdout is not None
        while not all(each in self._heard for each in wanted):
            assert select.select([self._process.stdout], [], [], DEADLINE)[0], self._heard
            data = os.read(self._process.stdout.fileno(), 65536).decode()
            assert data, self._heard
            self._heard += data

    def end(self) -> tuple[int, str]:
        """Its exit status, and all that was said."""
        said, _ = self._process.communicate(timeout=DEADLINE)
        return self._process.returncode, self._heard + said


async def died(bus: Client) -> list[Any]:
    """The reason and the status of the one VM that died there."""
    (_, *how) = (await bus.until(lambda message: message.member == "Died")).body
    assert len([each for each in bus.signals if each.member == "Died"]) == 1
    return how


async def test_srun_runs_a_vm_on_each_node(
    cluster: Cluster, nodes: dict[str, Client], tmp_path: Path
) -> None:
    """Each node's own service has one, and what both guests print comes back."""
    with Job(cluster, SRUN, tmp_path, console="hello\n", then={"exit": 0}) as job:
        status, said = job.end()
    assert status == 0, said
    for task, node in enumerate(NODES):
        assert f"{task}: hello\n" in said
        assert f"{task}: vmbusctl: web: died: shutdown (0)\n" in said
        assert await died(nodes[node]) == ["shutdown", 0]


async def test_the_exit_status_comes_back(
    cluster: Cluster, nodes: dict[str, Client], tmp_path: Path
) -> None:
    """srun ends as vmbusctl does, which says how the VM ended, on the node that was asked for."""
    command = SRUN.replace("--nodes=2", "--nodelist=two")
    assert command != SRUN
    with Job(cluster, command, tmp_path, then={"exit": 34}) as job:
        status, said = job.end()
    assert status == 11, said
    assert await died(nodes["two"]) == ["guest-panic", 34]


@pytest.mark.parametrize(
    ("heard", "end", "code"), [(True, ["stopped", 0], 0), (False, ["requester-gone", -9], 137)]
)
async def test_scancel_ends_guests(
    cluster: Cluster,
    nodes: dict[str, Client],
    tmp_path: Path,
    heard: bool,
    end: list[Any],
    code: int,
) -> None:
    """They are shut down. Slurm kills a task that takes too long for it, and the VM goes along."""
    deaf = {"Powerbtn": {"ignore": True}, "Exit": {"ignore": True}}
    with Job(cluster, SRUN, tmp_path, console="up\n", on={} if heard else deaf) as job:
        job.until("0: up\n", "1: up\n")
        subprocess.run(SCANCEL.split(), env=cluster.environment, timeout=DEADLINE, check=True)
        assert [await died(nodes[node]) for node in NODES] == [end, end]
        status, said = job.end()
    assert status == code, said
