"""vmbus beside libvirt-dbus: single calls, the state of many VMs, lives and deaths of one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

from bench import libvirt as peer
from bench.client import GET_ID, PROPERTIES, Stalled, call_frame, get_frame, patiently
from bench.floors import spawn_and_kill
from bench.libvirt import Libvirt
from bench.plan import Plan
from bench.samples import FLOOR, PEER, Result, Samples, alternate, shuffled, timed
from bench.stage import MANAGED, Caller, Stage
from tests.rig import BUS, VM

_PARAMS = "console=ttyS0"
_MANY = 100


class Pair:
    """A vmbusd for each D-Bus library, and libvirt on the bus of the first, all with QEMU."""

    def __init__(self, plan: Plan, parts: contextlib.ExitStack) -> None:
        self.plan = plan
        self.stages: dict[str, Stage] = {}
        self.callers: dict[str, Caller] = {}
        for column, library in plan.libraries.items():
            policies = [] if self.stages else [peer.POLICY]
            stage = Stage(library, {"kvm": "off"}, policies)
            parts.callback(stage.close)
            self.stages[column] = stage
            self.callers[column] = caller = Caller(stage.client(), "qemu", _PARAMS)
            parts.callback(caller.close)
            caller.listen()
        first = next(iter(self.stages.values()))
        self.client = first.client()
        self.libvirt = Libvirt(first.rig)
        parts.callback(self.libvirt.close)
        self.libvirt.listen()
        # Its first domain is when it finds out what QEMU can do.
        self.libvirt.destroy(self.libvirt.create("first"))


def measure(plan: Plan) -> Iterator[Result]:
    """All that is measured with this pair."""
    with contextlib.ExitStack() as parts:
        pair = Pair(plan, parts)
        if plan.wants("calls"):
            yield from _calls(pair)
        if plan.wants("many"):
            yield _state_of_many(pair)
        if plan.wants("lives"):
            yield from _lives(pair)
        if plan.wants("create"):
            yield _create(pair)
        if plan.wants("start"):
            yield from _service_start(pair)


def _calls(pair: Pair) -> Iterator[Result]:
    """One property, and all of them, of a VM that is suspended, so that it takes no time."""
    domain = pair.libvirt.create("calls", _PARAMS)
    pair.libvirt.suspend(domain)
    one: dict[str, Callable[[], object]] = {}
    every: dict[str, Callable[[], object]] = {}
    with contextlib.ExitStack() as vms:
        vms.callback(pair.libvirt.destroy, domain)
        client = pair.libvirt.client
        one[PEER] = partial(client.call, get_frame(peer.BUS, domain, peer.DOMAIN, "Active"))
        every[PEER] = partial(client.call, _get_all(peer.BUS, domain, peer.DOMAIN))
        for column, caller in pair.callers.items():
            path = patiently(caller.create)
            vms.callback(_end, caller, path)
            patiently(partial(caller.vm, path, "Start"))
            patiently(partial(caller.vm, path, "Suspend"))
            one[column] = partial(caller.client.call, get_frame(BUS, path, VM, "State"))
            every[column] = partial(caller.client.call, _get_all(BUS, path, VM))
        floor = partial(pair.client.call, GET_ID)
        rounds = pair.plan.rounds(1000)
        for title, calls, limit in (("Get", one, 0.8), ("GetAll of a VM", every, 0.2)):
            functions = {name: partial(timed, each) for name, each in calls.items()}
            functions[FLOOR] = partial(timed, floor)
            with pair.plan.progress(title, rounds) as tick:
                result = Result(title, alternate(functions, rounds, tick))
            for column in pair.callers:
                result.check_ratio(column, limit)
            yield result


def _get_all(bus: str, path: str, interface: str) -> bytes:
    return call_frame(bus, path, PROPERTIES, "GetAll", "s", interface)


def _state_of_many(pair: Pair) -> Result:
    """One GetManagedObjects, against ListDomains and the properties of each; none of them runs."""
    defined = [pair.libvirt.define(f"many-{number}") for number in range(_MANY)]
    created = {
        column: [patiently(caller.create) for _ in range(_MANY)]
        for column, caller in pair.callers.items()
    }
    client = pair.libvirt.client
    listing = call_frame(peer.BUS, peer.PATH, peer.CONNECT, "ListDomains", "u", 0)

    def ask_each() -> None:
        (domains,) = client.ask(listing)
        assert len(domains) == _MANY
        for domain in domains:
            client.call(_get_all(peer.BUS, domain, peer.DOMAIN))

    functions = {PEER: partial(timed, ask_each)}
    for column, caller in pair.callers.items():
        functions[column] = partial(timed, partial(caller.client.call, MANAGED))
    rounds = pair.plan.rounds(30)
    title = f"State of {_MANY} VMs"
    with pair.plan.progress(title, rounds) as tick:
        result = Result(title, alternate(functions, rounds, tick))
    for column, caller in pair.callers.items():
        result.check_ratio(column, 0.05)
        for path in created[column]:
            patiently(partial(caller.vm, path, "Remove"))
    for domain in defined:
        client.call(call_frame(peer.BUS, domain, peer.DOMAIN, "Undefine", "u", 0))
    return result


def _lives(pair: Pair) -> Iterator[Result]:
    """From the first call until a VM runs, and from its VMM's kill -9 until that is heard."""
    births: dict[str, Samples] = {}
    deaths: dict[str, Samples] = {}
    lives = {PEER: partial(_domain_life, pair.libvirt)}
    lives |= {column: partial(_vm_life, each) for column, each in pair.callers.items()}
    lives[FLOOR] = partial(spawn_and_kill, _PARAMS)
    rounds = pair.plan.rounds(60)
    with pair.plan.progress("Lives and deaths", rounds) as tick:
        for number in range(rounds + 1):
            for name in shuffled(lives, number):
                with contextlib.suppress(Stalled):
                    birth, death = lives[name]()
                    if number:
                        births.setdefault(name, Samples()).values.append(birth)
                        deaths.setdefault(name, Samples()).values.append(death)
            tick()
    running = Result("Create and Start until it runs", births)
    dying = Result("kill -9 of the VMM until the event", deaths)
    for column in pair.callers:
        running.check_ratio(column, 0.4)
        running.check_over_floor(column, 10)
        dying.check_ratio(column, 0.03)
        dying.check_over_floor(column, 2)
    yield running
    yield dying


def _domain_life(libvirt: Libvirt) -> tuple[float, float]:
    before = time.perf_counter()
    domain = libvirt.create("life", _PARAMS)
    running = time.perf_counter()
    pid = libvirt.pid("life")
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    return (running - before) * 1e3, (libvirt.died(domain) - killed) * 1e3


def _vm_life(caller: Caller) -> tuple[float, float]:
    before = time.perf_counter()
    path = caller.create()
    caller.vm(path, "Start")
    running = time.perf_counter()
    pid = caller.get(path, "Pid")
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    died = caller.client.until("Died", path).at
    caller.vm(path, "Remove")
    return (running - before) * 1e3, (died - killed) * 1e3


def _end(caller: Caller, path: str) -> None:
    patiently(partial(caller.vm, path, "Kill"))
    patiently(partial(caller.vm, path, "Remove"))


def _create(pair: Pair) -> Result:
    """Create alone: the files checked, polkit asked, the object exported."""

    def one(caller: Caller) -> float:
        before = time.perf_counter()
        path = caller.create()
        took = (time.perf_counter() - before) * 1e3
        caller.vm(path, "Remove")
        return took

    rounds = pair.plan.rounds(200)
    functions = {column: partial(one, caller) for column, caller in pair.callers.items()}
    with pair.plan.progress("Create", rounds) as tick:
        result = Result("Create, polkit included", alternate(functions, rounds, tick))
    for column in functions:
        result.check(column, "median", result.columns[column].median, 5, "ms")
    return result


def _service_start(pair: Pair) -> Iterator[Result]:
    """From the exec of vmbusd until it owns its name."""
    computing = Result("Start of the service: CPU time", {name: Samples() for name in pair.stages})

    def one(column: str) -> float:
        stage = pair.stages[column]
        stage.stop()
        took = stage.start()
        computing.columns[column].values.append(stage.busy())
        return took

    rounds = pair.plan.rounds(10)
    functions = {column: partial(one, column) for column in pair.stages}
    with pair.plan.progress("Start of the service", rounds) as tick:
        result = Result("Start of the service", alternate(functions, rounds, tick))
    for column in functions:
        result.check(column, "median", result.columns[column].median, 300, "ms")
    yield result
    yield computing
