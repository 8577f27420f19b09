"""A service with more and more VMs, in a stand-in for crosvm that takes nearly nothing itself."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from bench.aside import Aside
from bench.client import Client, Stalled, get_frame, patiently
from bench.floors import Spawner
from bench.plan import Plan
from bench.samples import Result, Samples, alternate, timed
from bench.stage import LIST, MANAGED, Caller, Stage
from tests.rig import BUS, MANAGER, MANAGER_PATH, VM

SIZES = (1, 10, 100, 1000, 3000)
#: With so many the goals are about.
_CROWD = 1000
_LISTENERS = 10
_IDLE = 10.0
#: Seconds without a signal after which none is on its way.
_SILENCE = 1.0
_SOURCE = Path(__file__).with_name("standin.c")

CURVES = {
    "memory": "Resident memory, MiB",
    "create": "Create, ms",
    "start": "Start, ms",
    "get": "Get, ms",
    "managed": "GetManagedObjects, ms",
    "death": "kill -9 until Died, ms",
    "restart": "Restart until all are listed, ms",
}
Curve = dict[str, list[tuple[int, float]]]


class Crowd:
    """A vmbusd and its VMs."""

    def __init__(
        self, plan: Plan, library: str, standin: Path, parts: contextlib.ExitStack
    ) -> None:
        self.plan = plan
        self.stage = Stage(library, {"kvm": "on", "crosvm": str(standin)})
        parts.callback(self.stage.close)
        self.caller = Caller(self.stage.client(), "crosvm")
        parts.callback(self.caller.close)
        self.caller.listen()
        self.paths: list[str] = []
        #: Whether VMs outlive the service; None before it was tried.
        self.adopts: bool | None = None

    def grow(self, size: int) -> None:
        while len(self.paths) < size:
            path = patiently(self.caller.create)
            patiently(partial(self.caller.vm, path, "Start"))
            self.paths.append(path)

    def pids(self) -> list[int]:
        return [self.caller.get(path, "Pid") for path in self.paths]

    def one_more(self) -> tuple[float, float, float]:
        """Create, Start and death of one more, in milliseconds."""
        before = time.perf_counter()
        path = self.caller.create()
        created = time.perf_counter()
        self.caller.vm(path, "Start")
        started = time.perf_counter()
        pid = self.caller.get(path, "Pid")
        killed = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        died = self.caller.client.until("Died", path).at
        self.caller.vm(path, "Remove")
        return (created - before) * 1e3, (started - created) * 1e3, (died - killed) * 1e3

    def start(self) -> float:
        """Start of one more, in milliseconds."""
        return self.one_more()[1]

    def get(self) -> float:
        """One property of the last VM, in milliseconds."""
        frame = get_frame(BUS, self.paths[-1], VM, "State")
        return timed(partial(self.caller.client.call, frame))

    def restart(self) -> float | None:
        """Kill the service; how long a new one takes to list all VMs. None: it lists none."""
        pids = self.pids()
        self.stage.kill()
        before = time.perf_counter()
        self.stage.start()
        (listed,) = self.caller.client.ask(LIST)
        took = (time.perf_counter() - before) * 1e3
        if len(listed) == len(self.paths):
            return took
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        size = len(self.paths)
        self.paths.clear()
        self.grow(size)
        return None


def build_standin(directory: Path) -> Path:
    """Compile the stand-in."""
    program = directory / "standin"
    command = ["cc", "-O2", "-static", "-Wall", "-Wextra", "-o", str(program)]
    subprocess.run([*command, str(_SOURCE)], check=True)
    return program


def measure(plan: Plan, standin: Path, curves: dict[str, Curve]) -> Iterator[Result]:
    """Grow a crowd for each library, fill in the curves, and see what the goals are about."""
    results: dict[str, Result] = {}
    for column, library in plan.libraries.items():
        with contextlib.ExitStack() as parts:
            crowd = Crowd(plan, library, standin, parts)
            curve = curves[column] = {name: [] for name in CURVES}
            sizes = SIZES[:3] if plan.quick else SIZES
            full = min(_CROWD, sizes[-1])
            with plan.progress(f"{sizes[-1]} VMs, {column}", len(sizes)) as tick:
                tick()
                for size in sizes:
                    crowd.grow(size)
                    costs = _point(crowd, curve)
                    if size == full:
                        alone = Crowd(plan, library, standin, parts)
                        alone.grow(1)
                        _check_full(crowd, alone, column, costs, results)
                    tick()
    yield from results.values()


def _point(crowd: Crowd, curve: Curve) -> dict[str, Samples]:
    """What things cost with as many VMs as there are."""
    found = {name: Samples() for name in CURVES}
    found["memory"].values.append(crowd.stage.resident())
    for _ in range(crowd.plan.rounds(40)):
        with contextlib.suppress(Stalled):
            for name, value in zip(("create", "start", "death"), crowd.one_more(), strict=True):
                found[name].values.append(value)
    call = crowd.caller.client.call
    found["get"].values = [crowd.get() for _ in range(crowd.plan.rounds(500))]
    call(MANAGED)
    found["managed"].values = [timed(partial(call, MANAGED)) for _ in range(20)]
    if crowd.adopts is not False:
        took = crowd.restart()
        crowd.adopts = took is not None
        found["restart"].values = [] if took is None else [took]
    for name, samples in found.items():
        if samples.values:
            curve[name].append((len(crowd.paths), samples.median))
    return found


def _check_full(
    crowd: Crowd, alone: Crowd, column: str, full: dict[str, Samples], results: dict[str, Result]
) -> None:
    """Whether a full crowd costs what it may; some of it in turn with a service that has one VM."""
    size = len(crowd.paths)

    def note(title: str, samples: Samples, unit: str = "ms") -> Result:
        result = results.setdefault(title, Result(title, {}, unit))
        result.columns[column] = samples
        return result

    allowed = 60 + size * 16 / 1024
    result = note(f"{size} VMs: memory", full["memory"], "MiB")
    result.check(column, "resident", full["memory"].median, allowed, "MiB")
    both = {"alone": alone, "full": crowd}
    for name, one, rounds in (("Get", Crowd.get, 500), ("Start", Crowd.start, 40)):
        functions = {key: partial(one, each) for key, each in both.items()}
        found = alternate(functions, crowd.plan.rounds(rounds), lambda: None)
        result = note(f"{size} VMs: {name}", found["full"])
        ratio = found["full"] / found["alone"]
        result.check(column, "ratio to the same with 1 VM", ratio, 1.2)
    result.notes[column] = [_spawning(crowd)]
    result = note(f"{size} VMs: GetManagedObjects", full["managed"])
    result.check(column, "median from the second call on", full["managed"].median, 15, "ms")
    calls = _calls_while_idle(crowd.stage.pid)
    result = note(f"{size} VMs, idle for {_IDLE:g} s: system calls", Samples([calls]), "")
    result.check(column, "system calls", calls, 0)
    _check_deaths(
        crowd, column, note(f"{size} VMs killed at once, {_LISTENERS} listeners", Samples())
    )


def _spawning(crowd: Crowd) -> str:
    """What the descriptors of a full crowd alone cost each process that is spawned among them."""
    count = len(os.listdir(f"/proc/{crowd.stage.pid}/fd"))
    with contextlib.closing(Spawner(count)) as among:
        took = alternate({"among": among}, crowd.plan.rounds(40), lambda: None)["among"]
    with contextlib.closing(Spawner(0)) as alone:
        bare = alternate({"bare": alone}, crowd.plan.rounds(40), lambda: None)["bare"]
    return (
        f"by itself a shell takes {bare.median:.2f} ms until it runs, "
        f"and {took.median:.2f} ms where its parent has {count} descriptors open"
    )


def _calls_while_idle(pid: int) -> float:
    """How many system calls the service makes while nobody asks it for anything."""
    time.sleep(_SILENCE)
    strace = subprocess.Popen(
        ["strace", "-f", "-c", "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    time.sleep(_IDLE)
    strace.send_signal(signal.SIGINT)
    _, table = strace.communicate()
    assert "attached" in table, table
    total = re.search(r"^100\.00 .* (\d+) +(?:\d+ +)?total$", table, re.MULTILINE)
    return float(total[1]) if total else 0.0


def _check_deaths(crowd: Crowd, column: str, result: Result) -> None:
    """Kill every VM at once. Who listens hears of each once, and others are served meanwhile."""
    size = len(crowd.paths)
    pids = crowd.pids()
    listeners = Aside(partial(_listen, crowd.stage.bus, size))
    other = Aside(partial(_keep_asking, crowd.stage.bus))
    other.go()
    before = time.perf_counter()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    heard: list[tuple[list[str], float]] = listeners.result()
    other.go()
    waits: list[float] = other.result()
    wrong = sum(sorted(paths) != sorted(crowd.paths) for paths, _ in heard)
    last = max(at for _, at in heard) - before
    result.columns[column] = Samples([(at - before) * 1e3 for _, at in heard])
    result.check(column, "listeners that did not hear of each exactly once", wrong, 0)
    result.check(column, "all heard within", last, 1.5, "s")
    result.check(column, "longest wait of another client", max(waits), 50, "ms")
    for path in crowd.paths:
        patiently(partial(crowd.caller.vm, path, "Remove"))
    crowd.paths.clear()
    crowd.caller.client.arrivals.clear()


def _listen(bus: str, size: int, channel: Connection) -> None:
    """Listen as several clients; for each, which VMs died, and when the last was heard of."""
    clients = [Client(bus) for _ in range(_LISTENERS)]
    for client in clients:
        client.listen(f"type='signal',interface='{VM}',member='Died'")
        # What the bus said to it of itself.
        client.arrivals.clear()
    last = dict.fromkeys(clients, 0.0)
    by_socket = {client.socket: client for client in clients}
    channel.send("ready")
    timeout = 30.0
    while ready := select.select(list(by_socket), [], [], timeout)[0]:
        for sock in ready:
            client = by_socket[sock]
            client.read()
            last[client] = time.perf_counter()
        if all(len(client.arrivals) >= size for client in clients):
            timeout = _SILENCE
    heard = [
        ([each.message.path for each in client.signals(0)], last[client]) for client in clients
    ]
    channel.send(heard)


def _keep_asking(bus: str, channel: Connection) -> None:
    """Ask for one property over and over until told to stop; how long each answer took, in ms."""
    client = Client(bus)
    frame = get_frame(BUS, MANAGER_PATH, MANAGER, "VMCount")
    channel.send("ready")
    channel.recv()
    waits = []
    while not channel.poll():
        waits.append(timed(partial(client.call, frame)))
    channel.recv()
    channel.send(waits)
