"""What vmbus promises, as a model: users, their VMs, and calls that can overtake each other.

Nothing of the service is used here. A world is a value; `outcomes` gives every world in which
things can have come to rest, since calls that are under way together, and VMs that end by
themselves, may take effect in more than one order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

DONE = "done"
_OWN = "org.vmbus1.Error."
_STANDARD = "org.freedesktop.DBus.Error."
INVALID_STATE = _OWN + "InvalidState"
INVALID_CONFIG = _OWN + "InvalidConfig"
NAME_EXISTS = _OWN + "NameExists"
NO_SUCH_VM = _OWN + "NoSuchVM"
START_FAILED = _OWN + "StartFailed"
LIMIT_EXCEEDED = _OWN + "LimitExceeded"
NOT_SUPPORTED = _OWN + "NotSupported"
CONTROL_FAILED = _OWN + "ControlFailed"
DENIED = _STANDARD + "AccessDenied"
INTERACTIVE = _STANDARD + "InteractiveAuthorizationRequired"
INVALID_ARGS = _STANDARD + "InvalidArgs"
UNKNOWN_OBJECT = _STANDARD + "UnknownObject"
NO_REPLY = _STANDARD + "NoReply"

ALIVE = frozenset({"starting", "running", "suspended", "stopping"})
OVER = frozenset({"dead", "failed"})
MEMORY_MIB = 32
LEAST_MEMORY, MEMORY = 16 << 20, MEMORY_MIB << 20
#: The administrator's rules let Alice and Bob create VMs, and Bob manage Alice's; Carol has what
#: everybody has.
ROOT, ALICE, BOB, CAROL = USERS = 0, 5, 6, 2
CREATORS = ROOT, ALICE, BOB
#: As the service is set.
VMS_OF_A_USER, VMS_IN_ALL = 4, 9
RUNNING_OF_A_USER, RUNNING_IN_ALL = 2, 5
#: Microseconds: who has less time is expected to be out of it in the end.
IN_A_HURRY = 1_000_000


@dataclass(frozen=True)
class End:
    """How a VMM ends."""

    reason: str
    status: int


@dataclass(frozen=True)
class Guest:
    """What a guest does, and how the stand-in is told to; None: it is no kernel."""

    name: str
    directives: Mapping[str, Any] | None = field(default_factory=dict, compare=False)
    #: Ends the VMM before it answers.
    fails: int | None = None
    hangs: bool = False
    #: Ends the VM as soon as it runs, or when its memory is to change.
    then: End | None = None
    on_adjust: End | None = None
    obeys_power_button: bool = True
    obeys_exit: bool = True
    suspends: bool = True


def _ending(name: str, reason: str, status: int, **how: Any) -> Guest:
    return Guest(name, {"then": how}, then=End(reason, status))


_IGNORE = {"ignore": True}
GUESTS = [
    Guest("steady"),
    Guest("deaf", {"on": {"Powerbtn": _IGNORE}}, obeys_power_button=False),
    Guest(
        "stubborn",
        {"on": {"Powerbtn": _IGNORE, "Exit": _IGNORE}},
        obeys_power_button=False,
        obeys_exit=False,
    ),
    Guest("hangs", {"boot": {"hang": True}}, hangs=True),
    Guest("refuses", {"on": {"SuspendVcpus": {"reply": {"Err": 5}}}}, suspends=False),
    Guest("no kernel", None, fails=1),
    Guest("faulty", {"boot": {"signal": 11}}, fails=-11),
    _ending("powers off", "shutdown", 0, exit=0),
    _ending("reboots", "reboot", 32, exit=32),
    _ending("panics", "guest-panic", 34, exit=34),
    _ending("crashes", "crash", 33, exit=33),
    _ending("hung", "watchdog", 36, exit=36),
    _ending("aborts", "crash", -6, signal=6),
    _ending("too large", "signal", -9, signal=9),
    Guest(
        "fragile",
        {"on": {"BalloonCommand.Adjust": {"exit": 34}}},
        on_adjust=End("guest-panic", 34),
    ),
]
#: What becomes of one that was not started when the service was.
LOST = Guest("lost", fails=127)


@dataclass(frozen=True)
class Config:
    """What Create is called with. `disk`: a writable disk's size, 0: there is none."""

    name: str = ""
    guest: Guest = GUESTS[0]
    kill_on_disconnect: bool = False
    collect: bool = False
    balloon: bool = True
    disk: int = 0
    valid: bool = True


@dataclass(frozen=True)
class VM:
    """One VM; `key` is the number of the call that made it. Kept when it doesn't exist any more."""

    key: int
    owner: int
    connection: int
    config: Config
    name: str
    exists: bool = True
    state: str = "not-started"
    ran: bool = False
    end: End | None = None
    #: The reasons of a Stop that came first, of Stops with little time, and of a Kill.
    asked_for: str = ""
    in_a_hurry_for: frozenset[str] = frozenset()
    killed_for: str = ""
    doomed: End | None = None
    memory: int = MEMORY
    disk: int = 0
    #: The service that opened its files is gone, and its disks can't grow any more.
    lost: bool = False

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    def ended(self, end: End) -> VM:
        """It is over, and perhaps gone with that."""
        if not self.ran and end.reason != self.killed_for:
            end = End("start-failed", end.status)
        state = "dead" if self.ran else "failed"
        return replace(self, state=state, end=end, exists=not self.config.collect)

    def by_itself(self) -> Iterator[VM]:
        """What it can become without another call."""
        guest = self.config.guest
        if not self.alive:
            return
        if self.killed_for:
            yield self.ended(End(self.killed_for, -9))
        if self.state == "starting":
            if guest.fails is not None:
                yield self.ended(End("start-failed", guest.fails))
            elif not guest.hangs:
                yield replace(self, state="running", ran=True)
            return
        if self.doomed is not None:
            yield self.ended(self.doomed)
        if guest.then is not None and self.state == "running":
            yield self.ended(guest.then)
        if self.state == "stopping":
            yield from self._stopping(guest)

    def stopped(self, reason: str, *, in_a_hurry: bool) -> VM:
        """Somebody wants it to end in good order, or else when the time is over."""
        forced = "killed" if reason == "stopped" else reason
        if self.state == "starting":
            return replace(self, killed_for=self.killed_for or forced)
        hurries = self.in_a_hurry_for | ({forced} if in_a_hurry else set())
        asked_for = self.asked_for or reason
        return replace(self, state="stopping", asked_for=asked_for, in_a_hurry_for=hurries)

    def _stopping(self, guest: Guest) -> Iterator[VM]:
        forced = {self.killed_for} if self.killed_for else self.in_a_hurry_for
        if guest.then is not None and guest.then.reason in ("shutdown", "reboot"):
            for reason in {self.asked_for, *forced}:
                yield self.ended(End(reason, guest.then.status))
        elif guest.then is not None:
            yield self.ended(guest.then)
        if guest.obeys_power_button:
            yield self.ended(End(self.asked_for, 0))
        for reason in self.in_a_hurry_for:
            yield self.ended(End(reason, -9))
        if guest.obeys_power_button or guest.obeys_exit:
            # The time was over, or Kill was asked, just as the VMM went by itself.
            for reason in forced:
                yield self.ended(End(reason, 0))


class Phase(enum.Enum):
    """How far a call is."""

    CALLED = "called"
    #: The VMM was asked for something.
    ASKING = "asking"
    #: Answered when the VM runs or won't, or when it is over.
    BEGINNING = "beginning"
    DYING = "dying"


@dataclass(frozen=True)
class Call:
    """A call under way. `vm`: the key of the VM that it is on, which existed when it was sent.

    vms: those that StopAll waits for.
    """

    number: int
    connection: int
    uid: int
    method: str
    vm: int = 0
    vms: frozenset[int] = frozenset()
    args: tuple[int, ...] = ()
    interactive: bool = False
    config: Config | None = None
    phase: Phase = Phase.CALLED


@dataclass(frozen=True)
class World:
    """All VMs there were, the calls under way, and the answers to those that are not."""

    vms: tuple[VM, ...] = ()
    calls: tuple[Call, ...] = ()
    answers: tuple[tuple[int, str, End | None], ...] = ()

    @property
    def existing(self) -> list[VM]:
        return [vm for vm in self.vms if vm.exists]

    def vm(self, key: int) -> VM:
        return next(vm for vm in self.vms if vm.key == key)

    def outcomes(self, *calls: Call) -> set[World]:
        """Every world in which these calls, made at once, and all else can have come to rest."""
        first = replace(self, calls=self.calls + calls)
        left, seen, found = [first], {first}, set()
        while left:
            now = left.pop()
            following = set(now._next())
            found |= set() if following else {now}
            left += following - seen
            seen |= following
        return found

    def heard(self) -> World:
        """All answers were."""
        return replace(self, answers=())

    # What happens to a VM without a call

    def left(self, connection: int) -> World:
        """A connection leaves the bus, and with it its calls."""
        vms = []
        for vm in self.vms:
            goes = vm.exists and vm.config.kill_on_disconnect and vm.connection == connection
            if goes and vm.alive:
                vm = replace(vm, killed_for=vm.killed_for or "requester-gone")
            elif goes and vm.state == "not-started":
                vm = replace(vm, exists=False)
            vms.append(vm)
        calls = tuple(call for call in self.calls if call.connection != connection)
        return replace(self, vms=tuple(vms), calls=calls)._answered()

    def served_anew(self) -> World:
        """The service is killed, and another takes its place."""
        vms = []
        for vm in self.vms:
            if vm.state == "not-started":
                vm = replace(vm, config=replace(vm.config, guest=LOST))
            vms.append(replace(vm, lost=True))
        answers = tuple((call.number, NO_REPLY, None) for call in self.calls)
        return replace(self, vms=tuple(vms), calls=(), answers=answers)

    def struck(self, key: int, signal: int) -> World:
        """Somebody on the host sends the VMM a signal."""
        reason = "crash" if signal == 6 else "signal"
        return self._with(self.vm(key).ended(End(reason, -signal)))

    def named(self, key: int, name: str) -> World:
        """A VM that was given no name has got one."""
        return self._with(replace(self.vm(key), name=name))

    # Small steps

    def _next(self) -> Iterator[World]:
        for vm in self.vms:
            for changed in vm.by_itself():
                yield self._with(changed)
        for call in self.calls:
            if call.phase is Phase.CALLED and not self._has_to_wait(call):
                if call.method == "StopAll":
                    yield self._stop_all(call)
                else:
                    yield from self._create(call) if call.config else self._take(call)
            elif call.phase is Phase.ASKING:
                yield from self._ask(call)

    def _has_to_wait(self, call: Call) -> bool:
        """Calls on one VM over one connection go in turn, but nobody waits for a dialog."""
        return any(
            before.phase is Phase.CALLED
            and not before.interactive
            and (before.connection, before.vm) == (call.connection, call.vm)
            and before.number < call.number
            and call.config is None
            for before in self.calls
        )

    def _with(self, vm: VM) -> World:
        vms = tuple(vm if each.key == vm.key else each for each in self.vms)
        return replace(self, vms=vms)._answered()

    def _answer(self, call: Call, outcome: str, end: End | None = None) -> World:
        calls = tuple(each for each in self.calls if each.number != call.number)
        return replace(self, calls=calls, answers=(*self.answers, (call.number, outcome, end)))

    def _on(self, call: Call, phase: Phase) -> World:
        moved = replace(call, phase=phase)
        calls = tuple(moved if each.number == call.number else each for each in self.calls)
        return replace(self, calls=calls)._answered()

    def _answered(self) -> World:
        """Answer all who waited for what has happened to a VM."""
        world = self
        for call in self.calls:
            if call.method == "StopAll":
                if call.phase is Phase.DYING and not any(self.vm(key).alive for key in call.vms):
                    world = world._answer(call, DONE)
                continue
            if not call.vm:
                continue
            vm = self.vm(call.vm)
            if call.phase is Phase.BEGINNING and vm.state != "starting":
                world = world._answer(call, DONE if vm.ran else START_FAILED)
            elif call.phase is Phase.DYING and vm.state in OVER:
                world = world._answer(call, DONE, vm.end if call.method == "Wait" else None)
            elif call.phase is Phase.DYING and not vm.exists:
                world = world._answer(call, NO_SUCH_VM)
        return world

    def _refusal(self, call: Call, owner: int | None) -> str:
        """Why the caller may not, if so. `owner`: whose VM it is about, None for a new one."""
        by_rule = {None: CREATORS, ALICE: (BOB,)}.get(owner, ())
        if call.uid in (ROOT, owner, *by_rule):
            return ""
        return DENIED if call.interactive else INTERACTIVE

    def _create(self, call: Call) -> Iterator[World]:
        config = call.config
        assert config is not None
        mine = [vm for vm in self.existing if vm.owner == call.uid]
        if refusal := self._refusal(call, None):
            yield self._answer(call, refusal)
        elif not config.valid:
            yield self._answer(call, INVALID_CONFIG)
        elif config.name and config.name in [vm.name for vm in self.existing]:
            yield self._answer(call, NAME_EXISTS)
        elif len(mine) >= VMS_OF_A_USER or len(self.existing) >= VMS_IN_ALL:
            yield self._answer(call, LIMIT_EXCEEDED)
        else:
            made = VM(call.number, call.uid, call.connection, config, config.name, disk=config.disk)
            yield replace(self, vms=(*self.vms, made))._answer(call, DONE)

    def _stop_all(self, call: Call) -> World:
        if call.uid != ROOT:
            return self._answer(call, DENIED if call.interactive else INTERACTIVE)
        hurry = 0 < call.args[0] < IN_A_HURRY
        vms = [vm.stopped("host-shutdown", in_a_hurry=hurry) if vm.alive else vm for vm in self.vms]
        waiting = replace(call, vms=frozenset(vm.key for vm in vms if vm.alive))
        return replace(self, vms=tuple(vms))._on(waiting, Phase.DYING)

    def _take(self, call: Call) -> Iterator[World]:
        vm = self.vm(call.vm)
        refusal = "" if call.method == "Wait" else self._refusal(call, vm.owner)
        if not vm.exists:
            # It went after the call was sent: before polkit had decided, or thereafter.
            yield self._answer(call, UNKNOWN_OBJECT)
            if refusal:
                yield self._answer(call, refusal)
        elif refusal:
            yield self._answer(call, refusal)
        else:
            yield getattr(self, f"_{call.method}")(call, vm)

    # One function a method: what it does at once

    def _Start(self, call: Call, vm: VM) -> World:
        running = [each.owner for each in self.vms if each.alive]
        if vm.state != "not-started":
            return self._answer(call, INVALID_STATE)
        if running.count(vm.owner) >= RUNNING_OF_A_USER or len(running) >= RUNNING_IN_ALL:
            return self._answer(call, LIMIT_EXCEEDED)
        return self._with(replace(vm, state="starting"))._on(call, Phase.BEGINNING)

    def _Kill(self, call: Call, vm: VM) -> World:
        if not vm.alive:
            return self._answer(call, DONE)
        killed = replace(vm, killed_for=vm.killed_for or "killed")
        return self._with(killed)._on(call, Phase.DYING)

    def _Stop(self, call: Call, vm: VM) -> World:
        if vm.state == "not-started":
            return self._answer(call, INVALID_STATE)
        if vm.state in OVER:
            return self._answer(call, DONE)
        stopped = vm.stopped("stopped", in_a_hurry=0 < call.args[0] < IN_A_HURRY)
        return self._with(stopped)._on(call, Phase.DYING)

    def _Wait(self, call: Call, vm: VM) -> World:
        return self._on(call, Phase.DYING)

    def _Remove(self, call: Call, vm: VM) -> World:
        if vm.alive:
            return self._answer(call, INVALID_STATE)
        return self._answer(call, DONE)._with(replace(vm, exists=False))

    def _OpenConsole(self, call: Call, vm: VM) -> World:
        return self._answer(call, INVALID_STATE if vm.state in OVER else DONE)

    def _OpenLog(self, call: Call, vm: VM) -> World:
        return self._answer(call, DONE)

    def _ConnectVsock(self, call: Call, vm: VM) -> World:
        return self._answer(call, INVALID_ARGS if call.args[0] < 1024 else NOT_SUPPORTED)

    def _Suspend(self, call: Call, vm: VM) -> World:
        if not (vm.ran and vm.alive):
            return self._answer(call, INVALID_STATE)
        return self._on(call, Phase.ASKING)

    _Resume = _Suspend

    def _SetMemoryTarget(self, call: Call, vm: VM) -> World:
        if vm.state not in ("running", "suspended"):
            return self._answer(call, INVALID_STATE)
        if not vm.config.balloon:
            return self._answer(call, NOT_SUPPORTED)
        if not LEAST_MEMORY <= call.args[0] <= MEMORY:
            return self._answer(call, INVALID_ARGS)
        doomed = replace(vm, doomed=vm.doomed or vm.config.guest.on_adjust)
        return self._with(doomed)._on(call, Phase.ASKING)

    def _ResizeDisk(self, call: Call, vm: VM) -> World:
        index, size = call.args
        if vm.state not in ("running", "suspended"):
            return self._answer(call, INVALID_STATE)
        if index >= (1 if vm.disk else 0) or size % 512:
            return self._answer(call, INVALID_ARGS)
        return self._on(call, Phase.ASKING)

    def _ask(self, call: Call) -> Iterator[World]:
        """The VMM's turn has come: what was asked of it is done, or comes too late."""
        vm = self.vm(call.vm)
        changed = {
            "Suspend": replace(vm, state="suspended"),
            "Resume": replace(vm, state="running"),
            "SetMemoryTarget": replace(vm, memory=call.args[0] if call.args else 0),
            "ResizeDisk": replace(vm, disk=max(vm.disk, call.args[-1] if call.args else 0)),
        }[call.method]
        from_states = {"Suspend": ["running"], "Resume": ["suspended"]}
        if vm.state in from_states.get(call.method, ["running", "suspended"]):
            yield self._asked(call, vm, changed)
            return
        yield self._answer(call, INVALID_STATE)
        if vm.state in OVER:
            # It went with the request in its hands.
            yield self._answer(call, CONTROL_FAILED)
            yield self._with(replace(vm, disk=changed.disk))._answer(call, CONTROL_FAILED)

    def _asked(self, call: Call, vm: VM, changed: VM) -> World:
        if call.method == "ResizeDisk" and vm.lost:
            return self._answer(call, NOT_SUPPORTED)
        if call.method == "ResizeDisk" and changed == vm:
            return self._answer(call, INVALID_ARGS)
        if call.method == "Suspend" and not vm.config.guest.suspends:
            return self._answer(call, CONTROL_FAILED)
        return self._with(changed)._answer(call, DONE)
