"""A Slurm cluster on one machine: two nodes, each with a bus and a vmbusd of its own."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.ctl import VMBUSCTL
from tests.rig import CROSVM, DEADLINE, ROOT, Rig, Service

NODES = ("one", "two")

_CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdSpoolDir={directory}/%n
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
TaskProlog={directory}/prolog
ReturnToService=2
KillWait=5
NodeName=one NodeHostname=localhost Port={one}
NodeName=two NodeHostname=localhost Port={two}
PartitionName=all Nodes=ALL Default=YES
"""


class Cluster:
    """What was started for it, until `close`. Commands find the vmbusd of the node they run on.

    slurmd looks up addresses as hosts do that have another interface than lo, and fails elsewhere.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix="vmbus-slurm-"))
            stack.callback(shutil.rmtree, self.directory)
            # Where keys lie, munged trusts nobody else.
            self.directory.chmod(0o755)
            self.services: dict[str, Service] = {}
            for node in NODES:
                rig = Rig(system=False)
                stack.callback(rig.close)
                self.services[node] = Service(rig, {"crosvm": str(CROSVM), "kvm": "on"})
            self._write_files()
            stack.enter_context(self._munged())
            for command, ready in (
                (["slurmctld", "-D", "-i"], "Running as primary controller"),
                *((["slurmd", "-D", "-N", node], "slurmd started") for node in NODES),
            ):
                stack.enter_context(self._daemon(command, ready))
            self.close = stack.pop_all().close

    @property
    def environment(self) -> Mapping[str, str]:
        """What Slurm's commands need to find it."""
        kept = {key: each for key, each in os.environ.items() if not key.startswith("DBUS_")}
        path = f"{self.directory}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {**kept, "PATH": path, "SLURM_CONF": f"{self.directory}/slurm.conf"}

    def start(self, command: str, directory: Path) -> subprocess.Popen[str]:
        """Start what a user types in a directory. It says all on stdout."""
        return subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            env=self.environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _write_files(self) -> None:
        ports = dict(zip(("controller", *NODES), _free_ports(), strict=True))
        config = _CONFIG.format(directory=self.directory, **ports)
        (self.directory / "slurm.conf").write_text(config)
        for name in ("state", "bin", *NODES):
            (self.directory / name).mkdir()
        # The nodes are one machine, so that which bus is a node's has to be said.
        prolog = ["#!/bin/sh", 'case "$SLURMD_NODENAME" in']
        for node, service in self.services.items():
            prolog.append(f"{node}) echo export DBUS_SESSION_BUS_ADDRESS={service.rig.address} ;;")
        _script(self.directory / "prolog", *prolog, "esac")
        python, *arguments, code = VMBUSCTL
        _script(
            self.directory / "bin" / "vmbusctl",
            "#!/bin/sh",
            f"export PYTHONPATH={ROOT}",
            f'exec {python} {" ".join(arguments)} "{code}" --user "$@"',
        )

    @contextlib.contextmanager
    def _munged(self) -> Iterator[None]:
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        where = f"--socket={self.directory}/munge.sock"
        files = {"key": "key", "pid": "pid", "log": "log", "seed": "seed"}
        command = ["munged", where]
        command += [f"--{each}-file={self.directory}/munge.{end}" for each, end in files.items()]
        # It goes into the background when it can be asked.
        subprocess.run(command, env=self.environment, timeout=DEADLINE, check=True)
        try:
            yield
        finally:
            stop = ["munged", "--stop", where]
            subprocess.run(stop, env=self.environment, timeout=DEADLINE, check=True)

    @contextlib.contextmanager
    def _daemon(self, command: list[str], ready: str) -> Iterator[None]:
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        try:
            heard = b""
            while ready.encode() not in heard:
                assert select.select([process.stdout], [], [], DEADLINE)[0], heard
                data = os.read(process.stdout.fileno(), 65536)
                assert data, f"{command} ended: {heard!r}"
                heard += data
            yield
        finally:
            process.terminate()
            process.wait(DEADLINE)
            process.stdout.close()


def _free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
