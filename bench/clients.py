"""Many clients at once, and what becomes of one that only asks now and then."""

from __future__ import annotations

import contextlib
import itertools
import pwd
import selectors
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from bench.aside import Aside
from bench.client import PROPERTIES, CallFailed, Client, Stalled, call_frame, get_frame
from bench.crowd import Crowd
from bench.plan import Plan
from bench.samples import Result, Samples, timed
from bench.stage import CALLER, LIST, MANAGED, Caller
from tests.rig import BUS, MANAGER, MANAGER_PATH, VM
from vmbus.bus import wire

_CLIENTS = 64
_CALLS = 1000
_VMS = 10
#: Seconds between the calls of the one that is watched.
_PAUSE = 0.005
_Frame = tuple[bytes, Sequence[int]]


def measure(plan: Plan, standin: Path) -> Iterator[Result]:
    """Have 64 clients make 1000 calls each, one behind the other, and time those of one more."""
    result = Result(f"A call, while {_CLIENTS} clients make {_CALLS} each", {})
    for column, library in plan.libraries.items():
        with (
            contextlib.ExitStack() as parts,
            plan.progress(f"{_CLIENTS} clients, {column}", 1) as tick,
        ):
            crowd = Crowd(plan, library, standin, parts)
            crowd.grow(_VMS)
            frame = get_frame(BUS, crowd.paths[0], VM, "State")
            call = partial(timed, partial(crowd.caller.client.call, frame))
            alone = Samples([_now_and_then(call) for _ in range(plan.rounds(500))])
            tick()
            calls = _CALLS // 10 if plan.quick else _CALLS
            busy = Aside(partial(_busy, crowd.stage.bus, crowd.paths, calls))
            busy.go()
            meanwhile = Samples()
            while not busy.is_done():
                meanwhile.values.append(_now_and_then(call))
            errors, stalls, took = busy.result()
            tick()
        result.columns[column] = meanwhile
        result.columns[f"{column}, alone"] = alone
        said = [f"{count} times {text}" for text, count in errors.most_common(5)]
        result.notes[column] = [f"{_CLIENTS * calls / took:.0f} calls a second", *said]
        if stalls:
            result.notes[column].append(f"{stalls} calls refused while polkitd stalled")
        result.check(column, "errors", errors.total(), 0)
        ratio = meanwhile.quantile(0.99) / alone.median
        result.check(column, "p99 by its median when alone", ratio, 20)
    yield result


def _now_and_then(call: partial[float]) -> float:
    time.sleep(_PAUSE)
    return call()


def _mixed(caller: Caller, path: str, calls: int) -> Generator[_Frame, bytes | None, None]:
    """Calls of every kind; each is given its reply, or None for an error."""
    reads = [
        get_frame(BUS, path, VM, "State"),
        call_frame(BUS, path, PROPERTIES, "GetAll", "s", VM),
        LIST,
        get_frame(BUS, MANAGER_PATH, MANAGER, "VMCount"),
        get_frame(BUS, path, VM, "Name"),
        call_frame(BUS, MANAGER_PATH, MANAGER, "GetVM", "s", f"vm-{path.rpartition('/')[2]}"),
        MANAGED,
        get_frame(BUS, path, VM, "Pid"),
    ]
    for _ in range(calls // (len(reads) + 2)):
        for frame in reads:
            yield frame, ()
        created = yield caller.creation
        if created is not None:
            (made,) = wire.decode(created).body
            yield call_frame(BUS, made, VM, "Remove"), ()


def _busy(bus: str, paths: Sequence[str], calls: int, channel: Connection) -> None:
    """All of them, in one process; sends the errors, polkitd's, and how long it took (s)."""
    uid = pwd.getpwnam(CALLER).pw_uid
    errors: Counter[str] = Counter()
    stalls = 0
    with selectors.DefaultSelector() as selector:
        for path in itertools.islice(itertools.cycle(paths), _CLIENTS):
            client = Client(bus, uid)
            work = _mixed(Caller(client, "crosvm"), path, calls)
            selector.register(client.socket, selectors.EVENT_READ, (client, work))
        channel.send("ready")
        channel.recv()
        before = time.perf_counter()
        for key in selector.get_map().values():
            client, work = key.data
            client.send(*next(work))
        while selector.get_map():
            for key, _ in selector.select():
                client, work = key.data
                reply: bytes | None = None
                try:
                    reply = client.reply()
                except Stalled:
                    stalls += 1
                except CallFailed as error:
                    errors[str(error)] += 1
                try:
                    client.send(*work.send(reply))
                except StopIteration:
                    selector.unregister(client.socket)
        channel.send((errors, stalls, time.perf_counter() - before))
