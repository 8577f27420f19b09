"""The crosvm stand-in, tried as a process: what it accepts, refuses, answers and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import end_group

CROSVM = Path(__file__).parents[1] / "fakes" / "crosvm"
DEADLINE = 10.0
LOG_LINE = re.compile(
    r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}\+00:00 (INFO |WARN |ERROR) [a-z_:]+\] .+"
)
EMPTY_GUEST = "#!vmbus-test-guest\n{}"


class Vm:
    """One run of the stand-in, with its control socket where there is one."""

    def __init__(self, process: subprocess.Popen[bytes], address: str | None) -> None:
        self.process, self.address = process, address
        self.clients: list[socket.socket] = []

    def connect(self) -> socket.socket:
        assert self.address is not None
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.settimeout(DEADLINE)
        self.clients.append(client)
        client.connect(self.address)
        return client

    def ask(self, request: object, client: socket.socket | None = None) -> Any:
        client = client or self.connect()
        client.send(json.dumps(request).encode())
        return json.loads(client.recv(1 << 16))

    def ready(self) -> None:
        assert "VcpuPidTidResponse" in self.ask("VcpuPidTid")

    def wait(self) -> int:
        return self.process.wait(DEADLINE)

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return read_until(self.process.stderr.fileno(), None).decode()

    def ended(self) -> tuple[int, str]:
        words = self.stderr()
        return self.wait(), words.splitlines()[-1] if words else ""

    def close(self) -> None:
        for client in self.clients:
            client.close()
        end_group(self.process)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


def read_until(fd: int, wanted: bytes | None) -> bytes:
    """Reads until `wanted` came, or with None until the end."""
    data, deadline = b"", time.monotonic() + DEADLINE
    while wanted is None or wanted not in data:
        left = deadline - time.monotonic()
        assert left > 0 and select.select([fd], [], [], left)[0], f"only got {data[-2000:]!r}"
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            assert wanted is None, f"ended after {data[-2000:]!r}"
            break
        data += chunk
    return data


class Rig:
    """Starts stand-ins in one directory and sees to their end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.vms: list[Vm] = []
        self.listeners: list[socket.socket] = []

    def file(self, name: str, content: str | bytes = b"") -> Path:
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def guest(self, **directives: Any) -> str:
        content = "#!vmbus-test-guest\n" + json.dumps(directives)
        return str(self.file(f"guest{len(list(self.directory.iterdir()))}", content))

    def listener(self, kind: int = socket.SOCK_SEQPACKET, listen: bool = True) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(self.directory / f"control{len(self.listeners)}"))
        if listen:
            listener.listen()
        self.listeners.append(listener)
        return listener

    def spawn(
        self,
        *args: str,
        fds: tuple[int, ...] = (),
        address: str | None = None,
        top: tuple[str, ...] = ("--extended-status",),
        **streams: Any,
    ) -> Vm:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **streams}
        process = subprocess.Popen(
            [str(CROSVM), *top, *args],
            pass_fds=fds,
            start_new_session=True,
            stderr=subprocess.PIPE,
            **streams,
        )
        self.vms.append(Vm(process, address))
        return self.vms[-1]

    def run(self, *options: str, fds: tuple[int, ...] = (), **how: Any) -> Vm:
        return self.spawn("run", "--disable-sandbox", *options, fds=fds, **how)

    def start(self, *options: str, fds: tuple[int, ...] = (), **how: Any) -> Vm:
        """Runs with a listening control socket handed over; with no options, an empty guest."""
        listener = self.listener()
        fd = listener.fileno()
        control = ("--socket", f"/proc/self/fd/{fd}")
        options = options or (self.guest(),)
        return self.run(*control, *options, fds=(fd, *fds), address=listener.getsockname(), **how)

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        for vm in self.vms:
            vm.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@contextlib.contextmanager
def opened(path: Path | str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# --- the command line ---

ACCEPTED = [
    "--mem size=512 --cpus num-cores=4",
    "--mem=size=512 --cpus=num-cores=4",
    "--params a=b --params=c,d[0]",
    "--initrd {file}",
    "--block path={file}",
    "--block path={file},ro=true,id=12345678901234567890,sparse=false,direct=true,bootindex=0",
    '--block path="{file}",ro=false,lock=false',
    "--pmem path={file} --pmem path={file},ro=true",
    "--serial type=sink --serial type=syslog,num=2 --serial type=stdout,num=3",
    "--serial type=file,hardware=virtio-console,num=9,path={file},input={file},console=true",
    "--serial type=file,hardware=serial,num=4,path={file},earlycon=true,name=LABEL",
    "--serial type=sink,hardware=debugcon",
    "--vsock cid=3,device={file}",
    "--net tap-name=tap0,mac=52:54:00:12:34:56,vq-pairs=2,vhost-net",
    "--shared-dir {dir}:tag:type=fs:cache=auto",
    "--no-balloon --no-usb --no-rng --hugepages --lock-guest-memory --suspended",
    "--balloon-page-reporting --init-mem 64 --mem size=128",
    "--protected-vm",
    "--protected-vm-with-firmware {file}",
    "--protected-vm-without-firmware",
    "--name vm-1 --gdb 1234 --cpu-affinity 0,1-3 --core-scheduling=false",
    "--gdb=1234 --cpus num-cores=1",
    "--smbios uuid=01234567-89ab-cdef-0123-456789abcdef --vfio {file},iommu=viommu --gpu x=y",
    "--pivot-root {dir}",
]

REFUSED = [
    "--cfg {file}",
    "--cid 3",
    "--disk {file}",
    "--rwdisk {file}",
    "-m 512",
    "-c 2",
    "--extended-status",
    "--unknown",
    "--mem 512",
    "--mem size=0",
    "--mem size=-1",
    "--mem size=1G",
    "--mem size=512 --mem size=512",
    "--mem size=512,size=512",
    "--mem size=512,",
    "--mem",
    "--cpus 4",
    "--cpus num-cores=",
    "--socket /a --socket /b",
    "--block {file}",
    "--block ro=true",
    "--block path={file},ro",
    "--block path={file},ro=yes",
    "--block path={file},id=123456789012345678901",
    "--block path={file},bootindex=first",
    "--block path={file},block-size=512",
    "--block path=/a[0]",
    '--block path="/a',
    "--pmem path={file},id=x",
    "--serial hardware=serial",
    "--serial type=pty",
    "--serial type=sink,hardware=uart",
    "--serial type=sink,num=0",
    "--serial type=sink,num=5",
    "--serial type=sink,num=one",
    "--serial type=sink,console=1",
    "--serial type=sink,stdin=true",
    "--serial type=sink,path={file}",
    "--serial type=stdout,input={file}",
    "--serial type=file",
    "--serial type=unix",
    "--serial type=sink --serial type=stdout",
    "--serial type=sink,console=true --serial type=sink,num=2,console=true",
    "--serial type=sink,hardware=virtio-console,earlycon=true",
    "--vsock 3",
    "--vsock device={file}",
    "--net mac=52:54:00:12:34:56",
    "--net tap-name=tap0,tap-fd=3",
    "--net tap-name=a-name-that-is-too-long",
    "--net tap-name=tap0,mac=52:54:00",
    "--net tap-name=tap0,vhost-net=true",
    "--shared-dir {dir}",
    "--shared-dir {dir}:tag",
    "--shared-dir {dir}::type=fs",
    "--shared-dir {dir}:tag:type=fs,cache=auto",
    "--shared-dir {dir}:tag:type=fs:ro=true",
    "--vhost-user type=fs",
    "--vhost-user type=floppy,socket=/a",
    "--no-balloon=true",
    "--init-mem size=64",
    "--protected-vm --protected-vm-without-firmware",
    "--gdb 1234 --cpus num-cores=2",
    "--gdb 70000",
    "--core-scheduling=no",
    "--smbios uuid=1",
    "--vfio {file},iommu",
    "--bios {file}",
    "{file}",
    "--name",
]


def words(rig: Rig, line: str) -> list[str]:
    file = rig.file("some", bytes(512))
    return [word.format(file=file, dir=rig.directory) for word in line.split()]


@pytest.mark.parametrize("line", ACCEPTED)
def test_accepts_what_is_documented(rig: Rig, line: str) -> None:
    vm = rig.start(*words(rig, line), rig.guest())
    vm.ready()
    assert vm.ask("Exit") == "Ok"
    code, last = vm.ended()
    assert code == 0 and LOG_LINE.fullmatch(last) and last.endswith("] exiting with success")


@pytest.mark.parametrize("line", REFUSED)
def test_refuses_everything_else(rig: Rig, line: str) -> None:
    options = words(rig, line)
    kernel = [] if options[-1:] == ["--name"] or options == ["--mem"] else [rig.guest()]
    code, last = rig.run(*kernel, *options).ended()
    assert code == 35 and last.endswith("] invalid argument")


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("stop", "/x"),
        ("--cfg", "x", "run", "k"),
        ("run",),
        ("run", "--no-syslog", "k"),
        ("run", ""),
        ("--extended-status=true", "run", "k"),
        ("--log-level", "loud", "run", "k"),
    ],
)
def test_refuses_a_bad_frame(rig: Rig, args: tuple[str, ...]) -> None:
    vm = rig.spawn(*args, top=())
    assert "invalid argument" in vm.stderr()
    assert vm.wait() == 35


def test_the_value_of_an_option_may_look_like_an_option(rig: Rig) -> None:
    vm = rig.start("--params", "--cfg", rig.guest())
    vm.ready()


def test_quoting_protects_separators(rig: Rig) -> None:
    disk = rig.file('a,b]"c', bytes(512))
    quoted = str(disk).replace('"', '\\"')
    vm = rig.start("--block", f'path="{quoted}",ro=true', rig.guest())
    vm.ready()


def test_log_level_hides_lines(rig: Rig) -> None:
    top = ("--extended-status", "--log-level=error", "--no-syslog")
    vm = rig.run(rig.guest(boot={"exit": 32}), top=top)
    assert vm.stderr() == ""
    assert vm.wait() == 32


# --- files, descriptors, devices ---


@pytest.mark.parametrize(
    "option",
    [
        "--initrd {}",
        "--bios {}",
        "--block path={}",
        "--pmem path={}",
        "--serial type=file,path={}/x",
        "--serial type=unix,path={}",
        "--serial type=unix-stream,path={}",
        "--vsock cid=3,device={}",
        "--shared-dir {}:tag:type=fs",
        "--vhost-user type=fs,socket={}",
        "--protected-vm-with-firmware {}",
        "--vfio {}",
        "{}",
    ],
)
def test_a_missing_path_is_an_error_that_names_it(rig: Rig, option: str) -> None:
    missing = str(rig.directory / "missing")
    options = option.format(missing).split()
    kernel = [] if missing in (options[0], options[-1]) and len(options) < 2 else [rig.guest()]
    vm = rig.run(*options, *([] if options[0] == "--bios" else kernel))
    code, last = vm.ended()
    assert code == 1 and missing in last and "] exiting with error 1: " in last


@pytest.mark.parametrize("option", ["--block path={},ro=true", "--initrd {}", "--net tap-fd={}"])
def test_a_descriptor_that_is_not_inherited_is_an_error(rig: Rig, option: str) -> None:
    with opened(rig.file("some", b"x"), os.O_RDONLY) as fd:
        name = str(fd) if "tap" in option else f"/proc/self/fd/{fd}"
        code, last = rig.run(*option.format(name).split(), rig.guest()).ended()
        assert code == 1 and "Bad file descriptor" in last
        vm = rig.start(*option.format(name).split(), rig.guest(), fds=(fd,))
        vm.ready()


def test_the_kernel_may_be_a_descriptor(rig: Rig) -> None:
    with opened(rig.guest(boot={"exit": 34}), os.O_RDONLY) as fd:
        assert rig.run(f"/proc/self/fd/{fd}", fds=(fd,)).wait() == 34
        assert rig.run("--bios", f"/proc/self/fd/{fd}", fds=(fd,)).wait() == 34


def test_a_writable_disk_needs_a_writable_descriptor(rig: Rig) -> None:
    with opened(rig.file("disk", bytes(512)), os.O_RDONLY) as fd:
        option = f"path=/proc/self/fd/{fd}"
        code, last = rig.run("--block", option, rig.guest(), fds=(fd,)).ended()
        assert code == 1 and option[5:] in last


def test_a_disk_must_be_a_file_or_block_device(rig: Rig) -> None:
    code, last = rig.run("--block", "path=/dev/null", rig.guest()).ended()
    assert code == 1 and "/dev/null" in last


@pytest.mark.parametrize(
    ("held", "options", "works"),
    [
        (fcntl.LOCK_EX, "", False),
        (fcntl.LOCK_EX, ",ro=true", False),
        (fcntl.LOCK_SH, "", False),
        (fcntl.LOCK_SH, ",ro=true", True),
        (fcntl.LOCK_EX, ",lock=false", True),
    ],
)
def test_disks_are_locked(rig: Rig, held: int, options: str, works: bool) -> None:
    disk = rig.file("disk", bytes(512))
    with opened(disk, os.O_RDWR) as fd:
        fcntl.flock(fd, held)
        vm = rig.start("--block", f"path={disk}{options}", rig.guest())
        if works:
            vm.ready()
        else:
            code, last = vm.ended()
            assert code == 1 and "lock" in last and str(disk) in last


def test_a_descriptor_shares_its_lock(rig: Rig) -> None:
    disk = rig.file("disk", bytes(512))
    with opened(disk, os.O_RDWR) as other:
        with opened(disk, os.O_RDWR) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            vm = rig.start("--block", f"path=/proc/self/fd/{fd}", rig.guest(), fds=(fd,))
            vm.ready()
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        vm.ask("Exit")
        assert vm.wait() == 0
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_vsock_needs_its_device(rig: Rig) -> None:
    missing = str(rig.directory / "missing")
    code, last = rig.run("--vsock", f"cid=3,device={missing}", rig.guest()).ended()
    assert code == 1 and missing in last


def test_the_sandbox_needs_its_root(rig: Rig) -> None:
    missing = str(rig.directory / "missing")
    vm = rig.spawn("run", "--pivot-root", missing, rig.guest())
    code, last = vm.ended()
    assert code == 1 and missing in last


def test_vhost_user_takes_a_socket(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    listener = rig.listener(socket.SOCK_STREAM)
    with ours, theirs:
        fd = theirs.fileno()
        by_fd, by_path = f"type=fs,socket=/proc/self/fd/{fd}", listener.getsockname()
        options = ("--vhost-user", by_fd, "--vhost-user", f"type=vsock,socket={by_path}")
        rig.start(*options, rig.guest(), fds=(fd,)).ready()


# --- the guest file ---


@pytest.mark.parametrize("content", [b"\x7fELF...", bytes(0x202) + b"HdrS"])
def test_a_real_kernel_runs_until_told(rig: Rig, content: bytes) -> None:
    vm = rig.start(str(rig.file("kernel", content)))
    vm.ready()
    assert vm.ask("Powerbtn") == "Ok"
    assert vm.wait() == 0


@pytest.mark.parametrize("content", ["", "#!/bin/sh\n", "#!vmbus-test-guest {}"])
def test_anything_else_is_no_kernel(rig: Rig, content: str) -> None:
    vm = rig.run(str(rig.file("kernel", content)))
    *_, error, last = vm.stderr().splitlines()
    assert vm.wait() == 1
    assert "ERROR crosvm] failed to load kernel: invalid magic number" in error
    assert last.endswith("] exiting with error 1: failed to load kernel: invalid magic number")


@pytest.mark.parametrize(
    "directives",
    [
        "[]",
        "{",
        '{"consol": ""}',
        '{"echo": 1}',
        '{"boot": {"exit": true}}',
        '{"boot": {"after": 1}}',
        '{"then": {"exit": 1, "signal": 9}}',
        '{"then": {"after": 1}}',
        '{"on": {"Explode": {}}}',
        '{"on": {"Exit": {"silent": true, "close": true}}}',
        '{"on": {"Exit": {"garbage": true, "exit": 0}}}',
        '{"on": {"Exit": []}}',
    ],
)
def test_a_wrong_directive_is_an_error(rig: Rig, directives: str) -> None:
    kernel = rig.file("kernel", "#!vmbus-test-guest\n" + directives)
    code, last = rig.run(str(kernel)).ended()
    assert code == 1 and "test guest" in last


# --- ends ---

ENDS = [
    (0, "exiting with success"),
    (1, "exiting with error 1: "),
    (32, "exiting with reset"),
    (33, "exiting with crash"),
    (34, "exiting with guest panic"),
    (36, "exiting with watchdog reset"),
    (77, "exiting with error 77: "),
]


@pytest.mark.parametrize("when", ["boot", "then"])
@pytest.mark.parametrize(("status", "line"), ENDS)
def test_ends_with_a_status(rig: Rig, when: str, status: int, line: str) -> None:
    vm = rig.run(rig.guest(**{when: {"exit": status}}))
    code, last = vm.ended()
    assert code == status and line in last and LOG_LINE.fullmatch(last)


@pytest.mark.parametrize("status", [0, 32, 33, 34, 36])
def test_without_extended_status_a_vm_ends_with_0(rig: Rig, status: int) -> None:
    code, last = rig.run(rig.guest(then={"exit": status}), top=()).ended()
    assert code == 0 and last.endswith("exiting with success")


@pytest.mark.parametrize("when", ["boot", "then"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_dies_by_a_signal(rig: Rig, when: str, number: signal.Signals) -> None:
    assert rig.run(rig.guest(**{when: {"signal": number}})).wait() == -number


@pytest.mark.parametrize("when", ["boot", "then"])
def test_ends_with_an_error(rig: Rig, when: str) -> None:
    vm = rig.run(rig.guest(**{when: {"error": "it broke"}}))
    *_, error, last = vm.stderr().splitlines()
    assert error.endswith("] it broke") and last.endswith("exiting with error 1: it broke")
    assert vm.wait() == 1


@pytest.mark.parametrize("how", [{"kill_group": True}, {"kill_group": True, "exit": 32}])
def test_kills_its_whole_group(rig: Rig, how: dict[str, Any]) -> None:
    vm = rig.run(rig.guest(stderr_child=600, then=how))
    code, last = vm.ended()  # the end of stderr shows that the child died as well
    assert code == -signal.SIGKILL
    assert last.endswith("exiting with reset" if "exit" in how else "exiting with success")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_termination_signals_are_not_handled(rig: Rig, number: signal.Signals) -> None:
    path = rig.directory / "socket"
    with opened_pipe() as (source, sink):
        guest = rig.guest(console="up")
        serial = f"type=file,path=/proc/self/fd/{sink},console=true"
        vm = rig.run("--socket", str(path), "--serial", serial, guest, fds=(sink,))
        read_until(source, b"up")
        vm.process.send_signal(number)
        assert vm.wait() == -number
    assert path.is_socket() and vm.stderr() == ""


def test_then_waits_for_the_first_reply_and_its_delay(rig: Rig) -> None:
    vm = rig.start(rig.guest(then={"exit": 33, "after": 0.05}))
    vm.ready()
    replied = time.monotonic()
    assert vm.wait() == 33
    assert time.monotonic() - replied >= 0.04


def test_it_stays_in_the_session_it_was_given(rig: Rig) -> None:
    vm = rig.start()
    vm.ready()
    assert os.getpgid(vm.process.pid) == os.getsid(vm.process.pid) == vm.process.pid


# --- boot and stderr ---


def test_boot_says_its_words_first(rig: Rig) -> None:
    vm = rig.run(rig.guest(stderr_text="raw one\n", boot={"stderr": "raw two\n", "exit": 33}))
    assert vm.stderr().startswith("raw one\nraw two\n[")


def test_boot_may_hang_with_the_socket_open(rig: Rig) -> None:
    vm = rig.start(rig.guest(boot={"stderr": "hung\n", "hang": True}))
    assert vm.process.stderr is not None
    client = vm.connect()
    client.send(b'"VcpuPidTid"')
    read_until(vm.process.stderr.fileno(), b"hung")
    client.settimeout(0.05)
    with pytest.raises(TimeoutError):
        client.recv(1)
    assert vm.process.poll() is None


def test_boot_may_be_slow(rig: Rig) -> None:
    begun = time.monotonic()
    rig.start(rig.guest(boot={"delay": 0.1})).ready()
    assert time.monotonic() - begun >= 0.1


def test_floods_stderr(rig: Rig) -> None:
    vm = rig.run(rig.guest(stderr_flood=200_000, boot={"exit": 0}))
    flood, last = vm.stderr().rsplit("[", 1)
    assert len(flood) == 200_000 and last.endswith("exiting with success\n")


def test_an_unread_flood_holds_up_the_boot(rig: Rig) -> None:
    vm = rig.start(rig.guest(stderr_flood=1_000_000))
    client = vm.connect()
    client.send(b'"VcpuPidTid"')
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)
    assert vm.process.stderr is not None
    read_until(vm.process.stderr.fileno(), b" 100 bytes left]")
    client.settimeout(DEADLINE)
    assert b"VcpuPidTidResponse" in client.recv(1 << 16)


def test_a_child_holds_stderr_open(rig: Rig) -> None:
    vm = rig.run(rig.guest(stderr_child=600, boot={"exit": 0}))
    assert vm.wait() == 0
    assert vm.process.stderr is not None
    fd = vm.process.stderr.fileno()
    read_until(fd, b"exiting with success\n")
    assert not select.select([fd], [], [], 0.05)[0]
    os.killpg(vm.process.pid, signal.SIGKILL)
    assert read_until(fd, None) == b""


# --- the console ---


@contextlib.contextmanager
def opened_pipe() -> Iterator[tuple[int, int]]:
    source, sink = os.pipe()
    try:
        yield source, sink
    finally:
        os.close(source)
        os.close(sink)


def test_the_console_defaults_to_stdout_and_stdin(rig: Rig) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    vm = rig.run(rig.guest(console="hello\n", echo=True), **pipes)
    assert vm.process.stdout is not None and vm.process.stdin is not None
    read_until(vm.process.stdout.fileno(), b"hello\n")
    os.write(vm.process.stdin.fileno(), b"typed")
    read_until(vm.process.stdout.fileno(), b"typed")


@pytest.mark.parametrize("serial", ["type=sink", "type=sink,num=2,console=true"])
def test_no_default_console_beside_com1_or_another_console(rig: Rig, serial: str) -> None:
    guest = rig.guest(console="hello\n", then={"exit": 0})
    vm = rig.run("--serial", serial, guest, stdout=subprocess.PIPE)
    assert vm.process.stdout is not None
    assert read_until(vm.process.stdout.fileno(), None) == b""
    assert vm.wait() == 0


def test_a_console_of_descriptors(rig: Rig) -> None:
    with opened_pipe() as (out, sink), opened_pipe() as (source, typed):
        serial = f"type=file,path=/proc/self/fd/{sink},input=/proc/self/fd/{source},console=true"
        guest = rig.guest(console="hello\n", echo=True)
        rig.start("--serial", serial, guest, fds=(sink, source)).ready()
        read_until(out, b"hello\n")
        os.write(typed, b"typed")
        read_until(out, b"typed")


def test_a_console_of_files(rig: Rig) -> None:
    out, typed = rig.directory / "out", rig.file("in", "typed")
    serial = f"type=file,hardware=virtio-console,path={out},input={typed},console=true"
    vm = rig.start("--serial", serial, rig.guest(console="hello\n", echo=True))
    for _ in range(5):  # files are always ready, so each turn of its loop reads or writes
        vm.ready()
    assert out.read_text() == "hello\ntyped"


def test_a_console_on_a_stream_socket(rig: Rig) -> None:
    listener = rig.listener(socket.SOCK_STREAM)
    listener.settimeout(DEADLINE)
    serial = f"type=unix-stream,path={listener.getsockname()},console=true"
    rig.start("--serial", serial, rig.guest(console="hello\n", echo=True))
    with listener.accept()[0] as peer:
        read_until(peer.fileno(), b"hello\n")
        peer.send(b"typed")
        read_until(peer.fileno(), b"typed")


def test_a_console_on_a_datagram_socket(rig: Rig) -> None:
    receiver = rig.listener(socket.SOCK_DGRAM, listen=False)
    serial = f"type=unix,path={receiver.getsockname()},console=true"
    rig.start("--serial", serial, rig.guest(console="hello\n"))
    read_until(receiver.fileno(), b"hello\n")


@pytest.mark.parametrize("kind", ["unix", "unix-stream"])
def test_socket_consoles_take_no_descriptor(rig: Rig, kind: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        serial = f"type={kind},path=/proc/self/fd/{fd}"
        assert rig.run("--serial", serial, rig.guest(), fds=(fd,)).wait() == 1


def test_a_syslog_console_is_logged(rig: Rig) -> None:
    guest = rig.guest(console="hello\n", then={"exit": 0})
    vm = rig.run("--serial", "type=syslog,console=true", guest)
    assert "INFO  serial] hello\n" in vm.stderr()


def test_a_console_that_nobody_reads_holds_up_nothing_else(rig: Rig) -> None:
    with opened_pipe() as (source, sink):
        serial = f"type=file,path=/proc/self/fd/{sink},console=true"
        vm = rig.start("--serial", serial, rig.guest(flood_console=True), fds=(sink,))
        read_until(source, b" %057d\n" % 5000)
        assert fcntl.fcntl(sink, fcntl.F_GETFL) & os.O_NONBLOCK == 0
        for _ in range(20):
            vm.ready()
        assert vm.ask("Exit") == "Ok"
        assert vm.wait() == 0


def test_a_flooding_guest_ends_as_well(rig: Rig) -> None:
    assert rig.run(rig.guest(flood_console=True, then={"exit": 32, "after": 0.01})).wait() == 32


NOTIFY = "hardware=virtio-console,num=1,name=org.vmbus.notify"


def test_a_guest_notifies_by_a_port_that_is_named_so(rig: Rig) -> None:
    with opened_pipe() as (out, sink), opened_pipe() as (source, typed):
        console = f"type=file,path={os.devnull},input=/proc/self/fd/{source},console=true"
        port = f"type=file,path=/proc/self/fd/{sink},{NOTIFY}"
        guest = rig.guest(notify="READY=1\n", relay=True)
        rig.start("--serial", console, "--serial", port, guest, fds=(sink, source)).ready()
        read_until(out, b"READY=1\n")
        os.write(typed, b"STATUS=typed\n")
        read_until(out, b"STATUS=typed\n")


def test_a_guest_cannot_notify_where_nothing_is_named_so(rig: Rig) -> None:
    other = f"type=file,path={os.devnull},hardware=virtio-console,num=1,name=other"
    assert rig.run("--serial", other, rig.guest(notify="READY=1\n")).ended()[0] == 1


def test_a_flood_of_notices_holds_up_nothing_else(rig: Rig) -> None:
    with opened_pipe() as (source, sink):
        port = f"type=file,path=/proc/self/fd/{sink},{NOTIFY}"
        vm = rig.start("--serial", port, rig.guest(flood_notify=True), fds=(sink,))
        read_until(source, b"=%057d\n" % 5000)
        vm.ready()
        assert vm.ask("Exit") == "Ok"
        assert vm.wait() == 0


# --- the control socket ---


def test_it_binds_a_path_itself(rig: Rig) -> None:
    path = rig.directory / "socket"
    with opened_pipe() as (source, sink):
        serial = f"type=file,path=/proc/self/fd/{sink},console=true"
        guest = rig.guest(console="up")
        vm = rig.run("--socket", str(path), "--serial", serial, guest, fds=(sink,))
        vm.address = str(path)
        read_until(source, b"up")
    assert vm.ask("Exit") == "Ok"
    assert vm.wait() == 0
    assert not path.exists()


def test_an_existing_socket_path_is_an_error(rig: Rig) -> None:
    path = rig.file("socket")
    code, last = rig.run("--socket", str(path), rig.guest()).ended()
    assert code == 1 and str(path) in last and path.exists()


def plain_file(rig: Rig) -> int:
    with opened(rig.file("plain"), os.O_RDWR) as fd:
        return os.dup(fd)


@pytest.mark.parametrize(
    "make",
    [
        plain_file,
        lambda rig: os.dup(rig.listener(listen=False).fileno()),
        lambda rig: os.dup(rig.listener(socket.SOCK_STREAM).fileno()),
    ],
    ids=["file", "not-listening", "stream"],
)
def test_the_control_descriptor_must_be_a_listening_seqpacket_socket(
    rig: Rig, make: Callable[[Rig], int]
) -> None:
    fd = make(rig)
    try:
        options = ("--socket", f"/proc/self/fd/{fd}", rig.guest())
        code, last = rig.run(*options, fds=(fd,)).ended()
        assert code == 1 and f"/proc/self/fd/{fd}" in last
        code, last = rig.run(*options).ended()
        assert code == 1 and "Bad file descriptor" in last
    finally:
        os.close(fd)


def test_one_thread_per_cpu(rig: Rig) -> None:
    vm = rig.start("--cpus", "num-cores=3", rig.guest())
    pid = vm.process.pid
    threads = {str(cpu): [pid, pid] for cpu in range(3)}
    assert vm.ask("VcpuPidTid") == {"VcpuPidTidResponse": {"pid_tid_map": threads}}


def test_the_power_button_waits_for_a_resume(rig: Rig) -> None:
    vm = rig.start()
    assert vm.ask("SuspendVcpus") == vm.ask("Powerbtn") == vm.ask("Sleepbtn") == "Ok"
    with pytest.raises(subprocess.TimeoutExpired):
        vm.process.wait(0.1)
    assert vm.ask("ResumeVcpus") == "Ok"
    assert vm.wait() == 0


def test_exit_ends_a_suspended_vm(rig: Rig) -> None:
    vm = rig.start("--suspended", rig.guest())
    assert vm.ask("Exit") == "Ok"
    assert vm.wait() == 0


def test_a_vm_started_suspended_needs_resume_vm(rig: Rig) -> None:
    with opened_pipe() as (source, sink):
        serial = f"type=file,path=/proc/self/fd/{sink},console=true"
        guest = rig.guest(console="up", then={"exit": 32})
        vm = rig.start("--suspended", "--serial", serial, guest, fds=(sink,))
        vm.ready()
        assert vm.ask("ResumeVcpus") == {"Err": 22}
        assert not select.select([source], [], [], 0.05)[0]
        assert vm.ask("ResumeVm") == "Ok"
        read_until(source, b"up")
        assert vm.wait() == 32


def balloon(size: int) -> dict[str, Any]:
    return {"BalloonCommand": {"Adjust": {"num_bytes": size, "wait_for_success": False}}}


STATS = {"BalloonCommand": "Stats"}
MIB = 1 << 20


def test_balloon(rig: Rig) -> None:
    vm = rig.start("--mem", "size=100", "--init-mem", "60", rig.guest())
    stats = {"stats": {"free_memory": 60 * MIB}, "balloon_actual": 40 * MIB}
    assert vm.ask(STATS) == {"BalloonStats": stats}
    assert vm.ask(balloon(10 * MIB)) == "Ok"
    assert vm.ask(STATS)["BalloonStats"]["balloon_actual"] == 10 * MIB


def test_no_balloon_device_and_no_balloon_driver(rig: Rig) -> None:
    no_device = rig.start("--no-balloon", rig.guest())
    no_driver = rig.start(rig.guest(no_balloon_driver=True))
    for request in (STATS, balloon(1)):
        assert no_device.ask(request) == {"Err": 95}
        assert no_driver.ask(request) == {"Err": 107}


def resize(index: int, size: int) -> dict[str, Any]:
    return {"DiskCommand": {"disk_index": index, "command": {"Resize": {"new_size": size}}}}


def test_disk_resize(rig: Rig) -> None:
    first, second = rig.file("first", bytes(512)), rig.file("second", bytes(512))
    disks = ("--block", f"path={first}", "--block", f"path={second},ro=true")
    vm = rig.start(*disks, rig.guest())
    assert vm.ask(resize(0, 4096)) == "Ok" and first.stat().st_size == 4096
    assert vm.ask(resize(1, 4096)) == {"Err": 30} and second.stat().st_size == 512
    assert "ErrString" in vm.ask(resize(2, 4096))
    assert "Err" in vm.ask(resize(0, (1 << 64) - 1)) and first.stat().st_size == 4096


def test_snapshot(rig: Rig) -> None:
    vm = rig.start()
    path = rig.directory / "snapshot"
    request = {
        "Snapshot": {
            "Take": {"snapshot_path": str(path), "compress_memory": False, "encrypt": False}
        }
    }
    assert vm.ask(request) == "Ok" and path.exists()
    assert "ErrString" in vm.ask(request)


def test_usb(rig: Rig) -> None:
    vm = rig.start()
    client = vm.connect()
    attach = b'{"UsbCommand":{"AttachDevice":{"file":0}}}'
    with opened("/dev/null", os.O_RDWR) as fd:
        for port in (1, 2):
            socket.send_fds(client, [attach], [fd])
            assert json.loads(client.recv(1000)) == {"UsbResponse": {"Ok": {"port": port}}}
    detach = {"UsbCommand": {"DetachDevice": {"port": 1}}}
    assert vm.ask(detach, client) == {"UsbResponse": {"Ok": {"port": 1}}}
    assert vm.ask(detach, client) == {"UsbResponse": "NoSuchPort"}
    client.send(attach)  # without a descriptor it can't be decoded: no reply
    assert "VcpuPidTidResponse" in vm.ask("VcpuPidTid", client)


@pytest.mark.parametrize("option", ["--no-usb", "--protected-vm"])
def test_usb_may_be_off(rig: Rig, option: str) -> None:
    request = {"UsbCommand": {"DetachDevice": {"port": 1}}}
    assert rig.start(option, rig.guest()).ask(request) == {"Err": 19}


def test_tap_hot_plug(rig: Rig) -> None:
    vm = rig.start()
    add, remove = (
        {"HotPlugNetCommand": {part: arg}} for part, arg in [("AddTap", "tap0"), ("RemoveTap", 1)]
    )
    assert vm.ask(add) == {"PciHotPlugResponse": {"bus": 1}}
    assert vm.ask(remove) == "Ok"
    assert "ErrString" in vm.ask(remove)


@pytest.mark.parametrize(
    "packet",
    [
        b"{",
        b"\xff",
        b'"VcpuPidTid"\n',
        b'"VcpuPidTid"\0',
        b'"Unknown"',
        b'{"Exit":null}',
        b'["Exit"]',
        b'"BalloonCommand"',
        b'{"BalloonCommand":{"Adjust":{"num_bytes":1}}}',
        b'{"BalloonCommand":{"Adjust":{"num_bytes":-1,"wait_for_success":false}}}',
        b'{"BalloonCommand":{"Adjust":{"num_bytes":true,"wait_for_success":false}}}',
        b'{"BalloonCommand":{"Adjust":{"num_bytes":1,"wait_for_success":false,"x":1}}}',
        b'{"BalloonCommand":"Stats","Exit":null}',
        b'{"Snapshot":{"Restore":{}}}',
        b"[" * 60000,
    ],
)
def test_what_cannot_be_decoded_gets_no_reply(rig: Rig, packet: bytes) -> None:
    client = rig.start().connect()
    client.send(packet)
    client.send(b'"SuspendVm"')
    client.send(b'"VcpuPidTid"')
    assert client.recv(1 << 16) == b'"Ok"'
    assert b"VcpuPidTidResponse" in client.recv(1 << 16)


def test_serves_many_connections(rig: Rig) -> None:
    vm = rig.start()
    clients = [vm.connect() for _ in range(20)]
    for client in clients:
        client.send(b'"SuspendVcpus"')
    for client in reversed(clients):
        assert client.recv(100) == b'"Ok"'
    clients[0].close()
    assert vm.ask("ResumeVcpus", clients[1]) == "Ok"


# --- answers told by the guest ---


def test_other_replies(rig: Rig) -> None:
    vm = rig.start(rig.guest(on={"Powerbtn": {"reply": {"Err": 95}}, "Exit": {"ignore": True}}))
    assert vm.ask("Powerbtn") == {"Err": 95}
    assert vm.ask("Exit") == "Ok"
    vm.ready()


def test_silence_close_and_garbage(rig: Rig) -> None:
    on = {"SuspendVm": {"silent": True}, "ResumeVm": {"close": True}, "Exit": {"garbage": True}}
    vm = rig.start(rig.guest(on=on))
    client = vm.connect()
    client.send(b'"SuspendVm"')
    client.send(b'"Exit"')
    with pytest.raises(ValueError):
        json.loads(client.recv(100))
    client.send(b'"ResumeVm"')
    assert client.recv(100) == b""
    vm.ready()


def test_one_part_of_a_variant_and_the_star(rig: Rig) -> None:
    on = {"BalloonCommand.Stats": {"reply": 1}, "BalloonCommand": {"reply": 2}, "*": {"reply": 3}}
    vm = rig.start(rig.guest(on=on))
    assert [vm.ask(STATS), vm.ask(balloon(1)), vm.ask("Sleepbtn")] == [1, 2, 3]


def test_the_first_answers_only_and_late_ones(rig: Rig) -> None:
    on = {"Sleepbtn": {"reply": None, "times": 2}, "VcpuPidTid": {"delay": 0.1}}
    vm = rig.start(rig.guest(on=on))
    assert [vm.ask("Sleepbtn") for _ in range(3)] == [None, None, "Ok"]
    asked = time.monotonic()
    vm.ready()
    assert time.monotonic() - asked >= 0.1


@pytest.mark.parametrize(
    ("how", "code"),
    [({"exit": 32}, 32), ({"signal": 9, "after": 0.02}, -9), ({"error": "x"}, 1)],
)
def test_a_request_may_end_it(rig: Rig, how: dict[str, Any], code: int) -> None:
    vm = rig.start(rig.guest(on={"Powerbtn": how}))
    assert vm.ask("Powerbtn") == "Ok"
    assert vm.wait() == code


def test_a_request_may_end_it_without_a_reply(rig: Rig) -> None:
    vm = rig.start(rig.guest(on={"VcpuPidTid": {"signal": 6, "silent": True}}))
    client = vm.connect()
    client.send(b'"VcpuPidTid"')
    assert client.recv(100) == b""
    assert vm.wait() == -signal.SIGABRT
