"""vmbus mock template

A stand-in for the service on `org.vmbus1`, for tests of its clients: the whole contract, with
lifecycles, errors and signals, but no virtual machine. What the contract says is read from the
interfaces' own XML files.

Parameters: "version" and "vmms", a list, the best first.

Controls, on `org.freedesktop.DBus.Mock` of `/org/vmbus1`:
Die(o vm, s reason, i status): a VM that runs dies by itself.
FailNextStart(s words): the next Start ends in StartFailed, with these last words of the VMM.
FailNext(s member, s error, s text): the next call of a method ends in this error.
SetPayloadState(o vm, s state): the guest reports how far it is.
SetPayloadExitStatus(o vm, i status): the guest reports that it has finished, and how.
SetStatusText(o vm, s text): the guest reports something for people.

A method that a test adds with AddMethod goes before the template's, and UpdateProperties works.
"""

import fcntl
import os
import re
import socket
import stat
import time
from pathlib import Path
from xml.etree import ElementTree

import dbus
from dbus.exceptions import DBusException
from dbus.lowlevel import (
    HANDLER_RESULT_HANDLED,
    HANDLER_RESULT_NOT_YET_HANDLED,
    MESSAGE_TYPE_METHOD_CALL,
    ErrorMessage,
    MethodReturnMessage,
)
from dbusmock import MOCK_IFACE
from dbusmock.mockobject import objects

BUS_NAME = "org.vmbus1"
MAIN_OBJ = "/org/vmbus1"
MAIN_IFACE = "org.vmbus1.Manager"
SYSTEM_BUS = True

VM = "org.vmbus1.VirtualMachine"
VM_ROOT = f"{MAIN_OBJ}/vm"
PEER = "org.freedesktop.DBus.Peer"
INTROSPECTABLE = dbus.INTROSPECTABLE_IFACE
PROPERTIES = dbus.PROPERTIES_IFACE
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"

ALIVE = ("starting", "running", "suspended", "stopping")
PAYLOAD_STATES = ("none", "starting", "started", "ready", "finished")
ORDERLY = ("shutdown", "reboot", "stopped")
REASONS = (
    *ORDERLY,
    "crash",
    "guest-panic",
    "watchdog",
    "killed",
    "start-failed",
    "hangup",
    "requester-gone",
    "host-shutdown",
    "signal",
    "unknown",
)
#: No process has a pid that high, whoever may think it should be killed.
FIRST_PID = 1 << 30
FIRST_CID = 2048
LATER = object()

_HERE = Path(__file__).resolve().parent
_EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"
_STANDARD = f"""<node>
<interface name="{INTROSPECTABLE}">
  <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
</interface>
<interface name="{PEER}">
  <method name="Ping"/>
  <method name="GetMachineId"><arg name="id" type="s" direction="out"/></method>
</interface>
<interface name="{PROPERTIES}">
  <method name="Get">
    <arg name="interface" type="s" direction="in"/>
    <arg name="property" type="s" direction="in"/>
    <arg name="value" type="v" direction="out"/>
  </method>
  <method name="GetAll">
    <arg name="interface" type="s" direction="in"/>
    <arg name="properties" type="a{{sv}}" direction="out"/>
  </method>
  <method name="Set">
    <arg name="interface" type="s" direction="in"/>
    <arg name="property" type="s" direction="in"/>
    <arg name="value" type="v" direction="in"/>
  </method>
  <signal name="PropertiesChanged">
    <arg name="interface" type="s"/>
    <arg name="changed" type="a{{sv}}"/>
    <arg name="invalidated" type="as"/>
  </signal>
</interface>
<interface name="{OBJECT_MANAGER}">
  <method name="GetManagedObjects">
    <arg name="objects" type="a{{oa{{sa{{sv}}}}}}" direction="out"/>
  </method>
  <signal name="InterfacesAdded">
    <arg name="object" type="o"/>
    <arg name="interfaces" type="a{{sa{{sv}}}}"/>
  </signal>
  <signal name="InterfacesRemoved">
    <arg name="object" type="o"/>
    <arg name="interfaces" type="as"/>
  </signal>
</interface>
<interface name="{MOCK_IFACE}">
  <method name="Die">
    <arg name="vm" type="o" direction="in"/>
    <arg name="reason" type="s" direction="in"/>
    <arg name="status" type="i" direction="in"/>
  </method>
  <method name="FailNextStart"><arg name="words" type="s" direction="in"/></method>
  <method name="FailNext">
    <arg name="member" type="s" direction="in"/>
    <arg name="error" type="s" direction="in"/>
    <arg name="text" type="s" direction="in"/>
  </method>
  <method name="SetPayloadState">
    <arg name="vm" type="o" direction="in"/>
    <arg name="state" type="s" direction="in"/>
  </method>
  <method name="SetPayloadExitStatus">
    <arg name="vm" type="o" direction="in"/>
    <arg name="status" type="i" direction="in"/>
  </method>
  <method name="SetStatusText">
    <arg name="vm" type="o" direction="in"/>
    <arg name="text" type="s" direction="in"/>
  </method>
</interface>
</node>"""


# The contract


def _contract():
    """The prose and the elements of all interfaces, from where they are installed."""
    beside = [
        _HERE.parent / "bus/interfaces",
        _HERE.parent / "dbus-1/interfaces",
        _HERE.parents[1] / "dbus-1/interfaces",
    ]
    texts = [
        file.read_text()
        for directory in beside
        for file in sorted(directory.glob("org.vmbus1.*.xml"))
    ]
    if not texts:
        raise ImportError(f"vmbus: its interfaces' files are in none of {beside}")
    found = {}
    for text in [*texts, _STANDARD]:
        for interface in ElementTree.fromstring(text).iterfind("interface"):
            found[interface.attrib["name"]] = interface
    return "\n".join(texts), found


def _types(method, direction):
    return "".join(
        arg.attrib["type"]
        for arg in method.iterfind("arg")
        if arg.attrib.get("direction", "in") == direction
    )


def _emits(element):
    return next((a.attrib["value"] for a in element.iterfind("annotation")), "true")


PROSE, INTERFACES = _contract()
METHODS = {
    (name, method.attrib["name"]): (_types(method, "in"), _types(method, "out"))
    for name, interface in INTERFACES.items()
    for method in interface.iterfind("method")
}
PROPERTY_TYPES = {
    name: {p.attrib["name"]: (p.attrib["type"], _emits(p)) for p in interface.iterfind("property")}
    for name, interface in INTERFACES.items()
}
_TYPED = {
    "b": dbus.Boolean,
    "i": dbus.Int32,
    "q": dbus.UInt16,
    "s": dbus.String,
    "t": dbus.UInt64,
    "u": dbus.UInt32,
    "as": lambda value: dbus.Array(value, signature="s"),
}


def _typed(interface, values):
    """Those of the values that are properties of an interface, each in its type."""
    types = PROPERTY_TYPES[interface]
    return {name: _TYPED[types[name][0]](values[name]) for name in types if name in values}


def _error(name, text):
    prefix = "org.vmbus1.Error." if name in _OWN_ERRORS else "org.freedesktop.DBus.Error."
    return DBusException(text, name=prefix + name)


_OWN_ERRORS = (
    "InvalidConfig",
    "InvalidState",
    "NoSuchVM",
    "NameExists",
    "StartFailed",
    "LimitExceeded",
    "NotSupported",
    "VMMUnavailable",
    "ControlFailed",
    "TimedOut",
)


# The config


class _Handle(int):
    """A descriptor that came with a call."""


def _plain(value, fds):
    """A value without its D-Bus clothes; descriptors in it are ours from now on."""
    if isinstance(value, dbus.types.UnixFd):
        fds.append(value.take())
        return _Handle(fds[-1])
    if isinstance(value, dict):
        return {str(key): _plain(item, fds) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, fds) for item in value]
    for kind in (dbus.Boolean, float, int, str):
        if isinstance(value, kind):
            return (bool if kind is dbus.Boolean else kind)(value)
    return value


def _string(pattern, length=None):
    def check(value, _):
        if type(value) is not str or not re.fullmatch(pattern, value):
            return "must be a string of the right form"
        too_long = length is not None and len(value.encode()) > length
        return f"must be at most {length} bytes long" if too_long else None

    return check


def _integer(least, most):
    def check(value, _):
        if type(value) is not int or not least <= value <= most:
            return f"must be an integer from {least} to {most}, not {value}"
        return None

    return check


def _flag(value, _):
    return None if type(value) is bool else "must be a boolean"


def _file(value, around):
    """A regular file or a block device; to be written where a disk says so."""
    writable = around.get("writable") is True
    try:
        if isinstance(value, _Handle):
            mode = fcntl.fcntl(value, fcntl.F_GETFL) & os.O_ACCMODE
            fits = mode == os.O_RDWR if writable else mode != os.O_WRONLY
        else:
            fits = type(value) is str and os.path.isabs(value)
        kind = os.stat(value).st_mode if fits else 0
    except (OSError, ValueError) as error:
        return str(error)
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        return "must be a file, given by its absolute path or open in the mode that is needed"
    return None


def _directory(value, _):
    found = type(value) is str and os.path.isabs(value) and os.path.isdir(value)
    return None if found else "must be the absolute path of a directory"


def _tap(value, _):
    """Any that could exist: making a real one takes root's rights."""
    named = type(value) is str and re.fullmatch(r"[^/\s]{1,15}", value)
    return None if named or isinstance(value, _Handle) else "must be a tap device or its name"


def _parts(most, required, **checks):
    def check(value, _):
        if not isinstance(value, list) or len(value) > most:
            return f"must be a list of at most {most}"
        return [
            f"[{number}]{problem}"
            for number, part in enumerate(value)
            for problem in _problems(part, checks, required, ".")
        ]

    return check


CONFIG = {
    "name": _string(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"),
    "vmm": _string("auto|crosvm|qemu"),
    "kernel": _file,
    "initrd": _file,
    "bios": _file,
    "params": _string(r"[^\x00-\x1f\x7f]*", 2047),
    "memory_mib": _integer(16, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20),
    "cpus": _integer(1, os.cpu_count() or 1),
    "disks": _parts(
        8,
        ("image",),
        image=_file,
        writable=_flag,
        id=_string("[A-Za-z0-9_.-]{1,20}"),
        direct=_flag,
    ),
    "net": _parts(
        4, ("tap",), tap=_tap, mac=_string("[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}")
    ),
    "shared_dirs": _parts(
        4,
        ("source", "tag"),
        source=_directory,
        tag=_string("[A-Za-z0-9_.-]{1,35}"),
        writable=_flag,
    ),
    "vsock": _flag,
    "protected": _flag,
    "balloon": _flag,
    "gdb_port": _integer(1024, 65535),
    "kill_on_disconnect": _flag,
    "ready_timeout_usec": _integer(0, (1 << 64) - 1),
    "collect": _string("manual|on-death"),
}


def _problems(config, checks, required=(), where=""):
    """Everything that is wrong with a config, or with a part of one."""
    found = [f"{where}{key}: is required" for key in required if key not in config]
    for key, value in config.items():
        # A key is known as soon as the contract tells of it.
        known = key in checks and f'"{key}"' in PROSE
        problem = checks[key](value, config) if known else "unknown key"
        if isinstance(problem, list):
            found += [f"{where}{key}{each}" for each in problem]
        elif problem:
            found.append(f"{where}{key}: {problem}")
    return found


def _config_problems(config):
    found = _problems(config, CONFIG)
    if "kernel" in config and "bios" in config:
        found.append("kernel, bios: only one of them can be given")
    elif "bios" not in config and "kernel" not in config:
        found.append("kernel: a kernel (or else a bios) is required")
    elif "bios" in config:
        found += [
            f"{key}: goes only with a kernel" for key in ("initrd", "params") if key in config
        ]
    tags = [part.get("tag") for part in config.get("shared_dirs", []) if isinstance(part, dict)]
    if len(tags) != len(set(map(str, tags))):
        found.append("shared_dirs: each must have a tag of its own")
    return found


# VMs


class Machine:
    """One VM. What is known of it by all is its properties, kept by python-dbusmock."""

    def __init__(self, service, number, config, requester):
        self.service = service
        self.path = f"{VM_ROOT}/{number}"
        self.cid = FIRST_CID + number - 1
        self.name = config.get("name", f"vm-{number}")
        self.config = config
        self.memory = self.left = config.get("memory_mib", 256) << 20
        self.streams = []
        self.log = os.memfd_create(f"console-{number}")
        self.waiting = []
        vmm = config.get("vmm", "auto")
        values = {name: _ZERO[kind] for name, (kind, _) in PROPERTY_TYPES[VM].items()}
        values.update(
            Id=number,
            Name=self.name,
            CID=self.cid,
            VMM=service.vmms[0] if vmm == "auto" else vmm,
            MemoryMiB=self.memory >> 20,
            CPUs=config.get("cpus", 1),
            State="not-started",
            PayloadState="none",
            PayloadExitStatus=-1,
            RequesterUid=requester[0],
            RequesterPid=requester[1],
            CreatedTimestamp=_now(),
        )
        service.mock.AddObject(self.path, VM, _typed(VM, values), [])
        self.object = objects[self.path]

    @property
    def state(self):
        return str(self.get("State"))

    def get(self, name):
        return self.object.props[VM][name]

    def change(self, **values):
        """Give properties new values, and tell everybody."""
        _change(self.object, VM, values)

    def must_be(self, *states):
        if self.state not in states:
            text = f"a VM that is {self.state} can't do that; it must be {' or '.join(states)}"
            raise _error("InvalidState", text)

    # Verbs

    def start(self, _):
        self.must_be("not-started")
        self.change(State="starting")
        self.change(Pid=FIRST_PID + int(self.get("Id")))
        words, self.service.start_fails = self.service.start_fails, None
        if words is not None:
            self.die("start-failed", 1, words)
            raise _error("StartFailed", f"{self.get('VMM')}: {words}")
        self.change(
            State="running",
            PayloadState="starting",
            StartedTimestamp=_now(),
            MemoryActual=self.memory,
        )

    def stop(self, _, timeout_usec):
        if self.state != "not-started" and self.state not in ALIVE:
            return
        self.must_be(*ALIVE)
        self.end("stopped")

    def end(self, reason):
        self.change(State="stopping")
        self.die(reason, 0)

    def kill(self, _):
        if self.state in ALIVE:
            self.die("killed", -9)

    def suspend(self, _):
        self.must_be("running")
        self.change(State="suspended")

    def resume(self, _):
        self.must_be("suspended")
        self.change(State="running")

    def set_memory_target(self, _, size):
        self.must_be("running", "suspended")
        if not self.config.get("balloon", True):
            raise _error("NotSupported", "this VM was created without a balloon")
        if not 16 << 20 <= size <= self.memory:
            raise _error("InvalidArgs", f"the guest can have {16 << 20} to {self.memory} bytes")
        self.left = size
        self.change(MemoryActual=self.get("MemoryActual"))

    def ask_memory(self):
        """The one property that a VMM is asked for; until then the last known is told."""
        if self.state in ALIVE and self.get("MemoryActual") != self.left:
            self.change(MemoryActual=self.left)

    def resize_disk(self, _, index, size):
        self.must_be("running", "suspended")
        disks = self.config.get("disks", [])
        if index >= len(disks):
            raise _error("InvalidArgs", f"there is no disk {index}; the VM has {len(disks)}")
        if not disks[index].get("writable"):
            raise _error("NotSupported", f"disk {index} is read-only")
        image = disks[index]["image"]
        if size % 512 or size <= os.stat(image).st_size:
            raise _error("InvalidArgs", "a disk can only grow, to a multiple of 512 bytes")
        os.truncate(image, size)

    def wait(self, call):
        if self.get("DeathReason"):
            return (self.get("DeathReason"), self.get("ExitStatus"))
        self.waiting.append(call)
        return LATER

    def remove(self, _):
        self.must_be("not-started", "dead", "failed")
        for call in self.waiting:
            call.fail(_error("NoSuchVM", f"VM {self.name} was removed without having been started"))
        self.close_streams()
        self.close_files()
        os.close(self.log)
        self.service.forget(self)

    def open_console(self, _):
        if self.state in ("dead", "failed"):
            raise _error("InvalidState", f"a VM that is {self.state} has no console")
        return self.stream()

    def open_log(self, _):
        return (_lent(os.open(f"/proc/self/fd/{self.log}", os.O_RDONLY | os.O_CLOEXEC)),)

    def connect_vsock(self, _, port):
        if not 1024 <= port < 0xFFFFFFFF:
            raise _error("InvalidArgs", "a port must be 1024 or above")
        if not self.config.get("vsock", True):
            raise _error("NotSupported", "this VM has no vsock")
        self.must_be("running")
        return self.stream()

    def stream(self):
        ours, theirs = socket.socketpair()
        self.streams.append(ours)
        return (_lent(theirs.detach()),)

    # The end

    def die(self, reason, status, words=None):
        """It is over: tell everybody, in the promised order."""
        if words is None:
            said = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            words = "" if reason in ORDERLY else said
        self.close_streams()
        self.change(
            State="dead" if self.get("StartedTimestamp") else "failed",
            DeathReason=reason,
            ExitStatus=status,
            DiedTimestamp=_now(),
            LastWords=words,
            Pid=0,
            MemoryActual=0,
        )
        self.object.EmitSignal(VM, "Died", "usi", [self.cid, reason, status])
        for call in self.waiting:
            call.reply((reason, status))
        self.waiting.clear()
        self.close_files()
        if self.config.get("collect") == "on-death":
            self.remove(None)

    def requester_left(self):
        if self.state in ALIVE:
            self.die("requester-gone", -9)
        elif self.state == "not-started":
            self.remove(None)

    def close_streams(self):
        while self.streams:
            self.streams.pop().close()

    def close_files(self):
        for disk in self.config.pop("disks", []):
            if isinstance(disk["image"], _Handle):
                os.close(disk["image"])


_ZERO = {"b": False, "i": 0, "s": "", "t": 0, "u": 0}


def _lent(fd):
    """A descriptor of ours to reply with, which is closed when that is sent."""
    lent = dbus.types.UnixFd(fd)
    os.close(fd)  # it has a duplicate
    return lent


def _now():
    return time.time_ns() // 1000


def _change(obj, interface, values):
    types = PROPERTY_TYPES[interface]
    values = _typed(interface, values)
    obj.props[interface].update(values)
    changed = {name: value for name, value in values.items() if types[name][1] == "true"}
    invalidated = [name for name in values if types[name][1] == "invalidates"]
    body = [interface, dbus.Dictionary(changed, signature="sv"), dbus.Array(invalidated, "s")]
    obj.EmitSignal(PROPERTIES, "PropertiesChanged", "sa{sv}as", body)


class Service:
    """The service: the manager, all VMs, and what a test has told it to do."""

    def __init__(self, mock, version, vmms):
        self.mock = mock
        self.vmms = vmms
        self.vms = {}
        self.last_id = 0
        self.start_fails = None
        self.failures = {}
        values = {"Version": version, "AvailableVMMs": vmms, "VMCount": 0}
        mock.props[MAIN_IFACE] = _typed(MAIN_IFACE, values)

    def create(self, call, config):
        fds = []
        try:
            config = _plain(config, fds)
            problems = _config_problems(config)
            if problems:
                raise _error("InvalidConfig", "; ".join(problems))
            vm = self._add(call, config)
            for disk in config.get("disks", []):
                if isinstance(disk["image"], _Handle):
                    disk["image"] = _Handle(os.dup(disk["image"]))
        finally:
            for fd in fds:
                os.close(fd)
        return (dbus.ObjectPath(vm.path),)

    def _add(self, call, config):
        if config.get("protected"):
            raise _error("NotSupported", "protected: this host can't keep a guest's memory")
        if config.get("vmm", "auto") not in ("auto", *self.vmms) or not self.vmms:
            raise _error("VMMUnavailable", f"{config.get('vmm', 'no VMM')} is not installed")
        names = {vm.name for vm in self.vms.values()}
        if config.get("name") in names:
            raise _error("NameExists", f"there is a VM with the name {config['name']} already")
        self.last_id += 1
        while "name" not in config and f"vm-{self.last_id}" in names:
            self.last_id += 1
        vm = Machine(self, self.last_id, config, call.requester())
        self.vms[vm.path] = vm
        if config.get("kill_on_disconnect"):
            call.when_left(vm.requester_left)
        added = [dbus.ObjectPath(vm.path), {VM: vm.object.props[VM]}]
        self.mock.EmitSignal(OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", added)
        _change(self.mock, MAIN_IFACE, {"VMCount": len(self.vms)})
        return vm

    def forget(self, vm):
        del self.vms[vm.path]
        self.mock.RemoveObject(vm.path)
        removed = [dbus.ObjectPath(vm.path), [VM]]
        self.mock.EmitSignal(OBJECT_MANAGER, "InterfacesRemoved", "oas", removed)
        _change(self.mock, MAIN_IFACE, {"VMCount": len(self.vms)})

    def get_vm(self, _, name):
        return self._find(f"with the name {name}", lambda vm: vm.name == name)

    def get_vm_by_cid(self, _, cid):
        return self._find(f"with the CID {cid}", lambda vm: vm.cid == cid)

    def _find(self, what, wanted):
        for vm in self.vms.values():
            if wanted(vm):
                return (dbus.ObjectPath(vm.path),)
        raise _error("NoSuchVM", f"there is no VM {what}")

    def list(self, _):
        names = ("Id", "Name", "State", "CID", "RequesterUid")
        rows = [(*map(vm.get, names), dbus.ObjectPath(vm.path)) for vm in self.vms.values()]
        return (dbus.Array(rows, signature="(ussuuo)"),)

    def stop_all(self, _, timeout_usec):
        for vm in list(self.vms.values()):
            if vm.state in ALIVE:
                vm.end("host-shutdown")

    # Controls

    def control(self, path):
        if path not in self.vms:
            raise _error("UnknownObject", f"there is no object {path}")
        return self.vms[path]

    def die(self, path, reason, status):
        if reason not in REASONS:
            raise _error("InvalidArgs", f"the reasons are {', '.join(REASONS)}")
        vm = self.control(path)
        vm.must_be(*ALIVE)
        vm.die(str(reason), int(status))

    def fail_next_start(self, words):
        self.start_fails = str(words)

    def fail_next(self, member, error, text):
        self.failures[str(member)] = DBusException(str(text), name=str(error))

    def set_payload_state(self, path, state):
        vm = self.control(path)
        vm.must_be(*ALIVE)
        now = str(vm.get("PayloadState"))
        if state not in PAYLOAD_STATES[PAYLOAD_STATES.index(now) + 1 :]:
            raise _error("InvalidArgs", f"from {now} it can't go to {state}")
        vm.change(PayloadState=str(state))

    def set_payload_exit_status(self, path, status):
        vm = self.control(path)
        vm.must_be(*ALIVE)
        if vm.get("PayloadExitStatus") != -1 or not 0 <= status <= 255:
            raise _error("InvalidArgs", "it is told once, and 0 to 255")
        finished = {} if vm.get("PayloadState") == "finished" else {"PayloadState": "finished"}
        vm.change(**finished, PayloadExitStatus=int(status))

    def set_status_text(self, path, text):
        vm = self.control(path)
        vm.must_be(*ALIVE)
        vm.change(StatusText=str(text))


# Calls


class Call:
    """One call of a method, to be answered once."""

    def __init__(self, service, connection, message):
        self.service = service
        self.connection = connection
        self.message = message
        self.path = str(message.get_path())
        self.gives = ""

    def reply(self, values):
        reply = MethodReturnMessage(self.message)
        reply.append(*values, signature=self.gives)
        self.send(reply)

    def fail(self, error):
        self.send(ErrorMessage(self.message, error.get_dbus_name(), error.get_dbus_message()))

    def send(self, reply):
        if not self.message.get_no_reply():
            self.connection.send_message(reply)

    def requester(self):
        """Uid and pid of the caller, as the bus vouches."""
        return [self._ask(f"GetConnectionUnix{what}") for what in ("User", "ProcessID")]

    def _ask(self, member):
        bus = (dbus.BUS_DAEMON_NAME, dbus.BUS_DAEMON_PATH, dbus.BUS_DAEMON_IFACE)
        return self.connection.call_blocking(*bus, member, "s", (self.message.get_sender(),))

    def when_left(self, callback):
        def changed(owner):
            if not owner:
                watch.cancel()
                callback()

        watch = self.connection.watch_name_owner(self.message.get_sender(), changed)

    # What every object has

    def interfaces(self):
        """The interfaces of the object, its own first; none where there is no object."""
        if self.path in self.service.vms:
            return (VM, INTROSPECTABLE, PEER, PROPERTIES)
        if self.path == MAIN_OBJ:
            return (MAIN_IFACE, OBJECT_MANAGER, MOCK_IFACE, INTROSPECTABLE, PEER, PROPERTIES)
        return (INTROSPECTABLE, PEER) if self.path in ("/", "/org", VM_ROOT) else ()

    def properties(self, interface):
        own = self.interfaces()[0]
        if interface and interface not in self.interfaces():
            raise _error("UnknownInterface", f"{self.path} has no interface {interface}")
        known = interface in ("", own) and own in (MAIN_IFACE, VM)
        return objects[self.path].props[own] if known else {}

    def get(self, interface, name):
        properties = self.properties(interface)
        if name not in properties:
            raise _error("UnknownProperty", f"{interface} has no property {name}")
        if name == "MemoryActual":
            self.service.vms[self.path].ask_memory()
        return (properties[name],)

    def get_all(self, interface):
        return (dbus.Dictionary(self.properties(interface), signature="sv"),)

    def set(self, interface, name, _):
        self.get(interface, name)
        raise _error("PropertyReadOnly", f"{name} can be read only")

    def managed_objects(self):
        found = {dbus.ObjectPath(path): {VM: objects[path].props[VM]} for path in self.service.vms}
        return (dbus.Dictionary(found, signature="oa{sa{sv}}"),)

    def introspect(self):
        own = [
            ElementTree.tostring(INTERFACES[name], encoding="unicode") for name in self.interfaces()
        ]
        paths = {VM_ROOT, *self.service.vms}
        inside = self.path.rstrip("/") + "/"
        below = {each[len(inside) :].split("/")[0] for each in paths if each.startswith(inside)}
        nodes = [f'<node name="{each}"/>\n' for each in sorted(below)]
        return (f"<node>\n{''.join(own)}{''.join(nodes)}</node>\n",)


_MANAGER = {
    "Create": Service.create,
    "GetVM": Service.get_vm,
    "GetVMByCID": Service.get_vm_by_cid,
    "List": Service.list,
    "StopAll": Service.stop_all,
}
_CONTROLS = {
    "Die": Service.die,
    "FailNextStart": Service.fail_next_start,
    "FailNext": Service.fail_next,
    "SetPayloadState": Service.set_payload_state,
    "SetPayloadExitStatus": Service.set_payload_exit_status,
    "SetStatusText": Service.set_status_text,
}
_VM = {
    "Start": Machine.start,
    "Stop": Machine.stop,
    "Kill": Machine.kill,
    "Suspend": Machine.suspend,
    "Resume": Machine.resume,
    "SetMemoryTarget": Machine.set_memory_target,
    "ResizeDisk": Machine.resize_disk,
    "Wait": Machine.wait,
    "Remove": Machine.remove,
    "OpenConsole": Machine.open_console,
    "OpenLog": Machine.open_log,
    "ConnectVsock": Machine.connect_vsock,
}
_EVERYWHERE = {
    (PROPERTIES, "Get"): Call.get,
    (PROPERTIES, "GetAll"): Call.get_all,
    (PROPERTIES, "Set"): Call.set,
    (INTROSPECTABLE, "Introspect"): Call.introspect,
    (OBJECT_MANAGER, "GetManagedObjects"): Call.managed_objects,
}


def _run(call, interface, member):
    """Do what a call asks for; gives the values of the reply."""
    takes, call.gives = METHODS[interface, member]
    # A test that tells the mock what to do may leave it to its library to guess the types.
    if call.message.get_signature() != takes and interface != MOCK_IFACE:
        raise _error("InvalidArgs", f"{member} takes arguments of type '{takes}'")
    try:
        args = call.message.get_args_list()
    except ValueError as error:
        raise _error("InvalidArgs", str(error)) from error
    if (interface, member) in _EVERYWHERE:
        return _EVERYWHERE[interface, member](call, *args)
    if interface == MOCK_IFACE:
        if len(args) != len(takes):
            raise _error("InvalidArgs", f"{member} takes {len(takes)} arguments")
        return _CONTROLS[member](call.service, *args)
    _log(objects[call.path], member, args)
    if member in call.service.failures:
        raise call.service.failures.pop(member)
    if interface == MAIN_IFACE:
        return _MANAGER[member](call.service, call, *args)
    return _VM[member](call.service.vms[call.path], call, *args)


def _log(obj, member, args):
    """Remember a call for GetCalls and those who listen for MethodCalled, without descriptors."""
    shown = dbus.Array([_shown(each) for each in args], signature="v")
    obj.log(f"{member} {[str(each) for each in shown]}")
    obj.call_log.append((int(time.time()), member, shown))
    obj.MethodCalled(member, shown)


def _shown(value):
    if isinstance(value, dbus.types.UnixFd):
        return dbus.String("a file", variant_level=1)
    if isinstance(value, dict):
        return dbus.Dictionary({k: _shown(each) for k, each in value.items()}, signature="sv")
    if isinstance(value, list):
        return dbus.Array([_shown(each) for each in value], signature=value.signature)
    return value


def _interface(call):
    """Which interface is meant; a call may leave it out."""
    present, member = call.interfaces(), call.message.get_member()
    wanted = call.message.get_interface()
    if not present:
        raise _error("UnknownObject", f"there is no object {call.path}")
    if wanted is not None and wanted not in present:
        raise _error("UnknownInterface", f"{call.path} has no interface {wanted}")
    for name in present if wanted is None else [wanted]:
        if (name, member) in METHODS:
            return str(name)
    raise _error("UnknownMethod", f"{call.path} has no method {member}")


def _is_dbusmocks(message):
    """Whether python-dbusmock is to answer: a control of its own, or a method that a test made."""
    path, interface, member = message.get_path(), message.get_interface(), message.get_member()
    if interface == MOCK_IFACE and (path != MAIN_OBJ or member not in _CONTROLS):
        return True
    methods = getattr(objects.get(path), "methods", {})
    return any(member in methods.get(name, {}) for name in ([interface] if interface else methods))


def load(mock, parameters):
    """Begin to be the service; once more after a Reset, as if it had just come."""
    parameters = parameters or {}
    vmms = [str(each) for each in parameters.get("vmms", ["crosvm", "qemu"])]
    service = Service(mock, str(parameters.get("version", "0.1.0")), vmms)

    def answer(connection, message):
        if message.get_type() != MESSAGE_TYPE_METHOD_CALL or _is_dbusmocks(message):
            return HANDLER_RESULT_NOT_YET_HANDLED
        call = Call(service, connection, message)
        try:
            values = _run(call, _interface(call), str(message.get_member()))
            if values is not LATER:
                call.reply(values or ())
        except DBusException as error:
            call.fail(error)
        except Exception as error:
            mock.log(f"internal error: {error!r}")
            call.fail(_error("Failed", f"internal error: {error!r}"))
        return HANDLER_RESULT_HANDLED

    before = getattr(mock, "vmbus_answer", None)
    if before is not None:
        mock.connection.remove_message_filter(before)
    mock.vmbus_answer = answer
    mock.connection.add_message_filter(answer)
