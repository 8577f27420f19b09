"""The config of a VM: every key, what it takes and what it refuses."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from vmbus.errors import InvalidConfig
from vmbus.files import FilePolicy, Handle
from vmbus.spec import (
    MAX_DISKS,
    MAX_NETS,
    MAX_PARAMS,
    MAX_SHARED_DIRS,
    VMConfig,
    host_cpus,
    host_memory_mib,
    parse_config,
)

pytestmark = pytest.mark.usefixtures("files_closed")

KEYS = (
    "name, vmm, kernel, initrd, bios, params, memory_mib, cpus, disks, net, shared_dirs, vsock, "
    "protected, balloon, gdb_port, kill_on_disconnect, ready_timeout_usec, collect"
)
DISK_KEYS = "writable, image, id, direct"


class Maker:
    """Makes configs, whose files lie in a directory and which are closed in the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configs: list[VMConfig] = []
        self.fds: list[int] = []
        for name in ("kernel", "initrd", "bios", "disk"):
            (directory / name).touch()

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def handle(self, name: str = "disk", flags: int = os.O_RDONLY) -> Handle:
        self.fds.append(os.open(self.directory / name, flags))
        return Handle(self.fds[-1])

    def raw(self, **changes: object) -> dict[str, object]:
        """A config that is right but for the changes; None takes a key away."""
        raw: dict[str, object] = {"kernel": self.path("kernel"), **changes}
        return {key: value for key, value in raw.items() if value is not None}

    def parse(self, **changes: object) -> VMConfig:
        config = parse_config(self.raw(**changes), FilePolicy(None))
        self.configs.append(config)
        return config

    def refuse(self, **changes: object) -> list[str]:
        """The problems of a config, every file that was opened for it being closed again."""
        files = FilePolicy(None)
        with pytest.raises(InvalidConfig) as refused:
            parse_config(self.raw(**changes), files)
        assert [file.fd for file in files.opened] == [-1] * len(files.opened)
        assert str(refused.value).startswith("; ".join(refused.value.problems[:40]))
        return list(refused.value.problems)

    def close(self) -> None:
        for config in self.configs:
            config.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def make(tmp_path: Path, files_closed: None) -> Iterator[Maker]:
    maker = Maker(tmp_path)
    yield maker
    maker.close()


# What is taken


def test_defaults(make: Maker) -> None:
    config = make.parse()
    assert config.model_dump(exclude={"kernel"}) == {
        "name": None,
        "vmm": "auto",
        "initrd": None,
        "bios": None,
        "params": "",
        "memory_mib": 256,
        "cpus": 1,
        "disks": [],
        "net": [],
        "shared_dirs": [],
        "vsock": None,
        "protected": False,
        "balloon": True,
        "gdb_port": None,
        "kill_on_disconnect": False,
        "ready_timeout_usec": 0,
        "collect": "manual",
    }
    assert config.kernel is not None
    assert config.kernel.name == make.path("kernel")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a"),
        ("name", "0"),
        ("name", "My_VM-2.old"),
        ("name", "x" * 63),
        ("name", "vm-7"),
        ("vmm", "auto"),
        ("vmm", "crosvm"),
        ("vmm", "qemu"),
        ("params", ""),
        ("params", "console=ttyS0 root=\"/dev/vda\" x='$(id)' a,b;c\\ -- --help"),
        ("params", "ümläut"),
        ("params", "x" * MAX_PARAMS),
        ("memory_mib", 16),
        ("memory_mib", host_memory_mib()),
        ("cpus", 1),
        ("cpus", host_cpus()),
        ("disks", []),
        ("net", []),
        ("shared_dirs", []),
        ("vsock", True),
        ("vsock", False),
        ("protected", True),
        ("balloon", False),
        ("gdb_port", 1024),
        ("gdb_port", 65535),
        ("ready_timeout_usec", 0),
        ("ready_timeout_usec", (1 << 64) - 1),
        ("collect", "manual"),
        ("collect", "on-death"),
    ],
)
def test_value_is_taken(make: Maker, key: str, value: object) -> None:
    assert getattr(make.parse(**{key: value}), key) == value


@pytest.mark.parametrize("key", ["kernel", "initrd"])
@pytest.mark.parametrize("way", ["path", "handle"])
def test_file_is_opened_read_only_and_closed_with_the_config(
    make: Maker, key: str, way: str
) -> None:
    source = make.path(key) if way == "path" else make.handle(key)
    config = make.parse(**{key: source})
    file = getattr(config, key)
    assert os.path.samestat(os.fstat(file.fd), os.stat(make.path(key)))
    assert not file.writable
    config.close()
    assert file.fd == -1


def test_bios_takes_the_place_of_a_kernel(make: Maker) -> None:
    config = make.parse(kernel=None, bios=make.path("bios"))
    assert config.kernel is None
    assert [file.name for file in config.files()] == [make.path("bios")]


def test_disks_keep_their_order_and_their_options(make: Maker) -> None:
    disks = [
        {"image": make.path("disk")},
        {"image": make.path("disk"), "writable": True, "direct": True, "id": "data.1_x-y"},
        {"image": make.handle(flags=os.O_RDWR), "writable": False, "id": "x" * 20},
        {"image": make.handle(flags=os.O_RDWR), "writable": True},
    ]
    config = make.parse(disks=disks)
    seen = [(d.writable, d.image.writable, d.direct, d.id) for d in config.disks]
    assert seen == [
        (False, False, False, None),
        (True, True, True, "data.1_x-y"),
        (False, True, False, "x" * 20),
        (True, True, False, None),
    ]


@pytest.mark.parametrize("order", [("image", "writable"), ("writable", "image")])
def test_order_of_a_disks_keys_does_not_matter(make: Maker, order: tuple[str, str]) -> None:
    values: dict[str, object] = {"image": make.path("disk"), "writable": True}
    config = make.parse(disks=[{key: values[key] for key in order}])
    mode = fcntl.fcntl(config.disks[0].image.fd, fcntl.F_GETFL) & os.O_ACCMODE
    assert mode == os.O_RDWR


def test_most_disks(make: Maker) -> None:
    assert len(make.parse(disks=[{"image": make.path("disk")}] * MAX_DISKS).disks) == MAX_DISKS


def test_one_descriptor_may_be_given_twice(make: Maker) -> None:
    handle = make.handle()
    first, second = make.parse(disks=[{"image": handle}, {"image": handle}]).disks
    assert len({handle.fd, first.image.fd, second.image.fd}) == 3


def test_config_is_frozen(make: Maker) -> None:
    config = make.parse()
    with pytest.raises(pydantic.ValidationError):
        config.memory_mib = 1


# What is refused


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("name", "", "should match pattern"),
        ("name", "a/b", "should match pattern"),
        ("name", "a\n", "should match pattern"),
        ("name", "a\nb", "should match pattern"),
        ("name", "x" * 64, "should match pattern"),
        ("name", "-rf", "should match pattern"),
        ("name", ".", "should match pattern"),
        ("name", "..", "should match pattern"),
        ("name", "_x", "should match pattern"),
        ("name", "a b", "should match pattern"),
        ("name", "a,b", "should match pattern"),
        ("name", "é", "should match pattern"),
        ("name", "a\0", "should match pattern"),
        ("name", 5, "should be a valid string, not 5"),
        ("name", ["a"], "should be a valid string"),
        ("vmm", "kvm", "should be 'auto', 'crosvm' or 'qemu', not 'kvm'"),
        ("vmm", "", "should be 'auto', 'crosvm' or 'qemu', not ''"),
        ("vmm", "QEMU", "should be 'auto', 'crosvm' or 'qemu', not 'QEMU'"),
        ("vmm", 1, "should be 'auto', 'crosvm' or 'qemu', not 1"),
        ("kernel", 7, "must be an open file (h) or a path (s)"),
        ("kernel", "vmlinuz", "the path vmlinuz must be absolute"),
        ("kernel", "/proc/none", "/proc/none: No such file or directory"),
        ("kernel", "/dev/null", "must be a regular file or a block device"),
        ("initrd", False, "must be an open file (h) or a path (s)"),
        ("initrd", "/", "must be a regular file or a block device"),
        ("params", 5, "should be a valid string, not 5"),
        ("params", "a\nb", "must not have control characters"),
        ("params", "a\tb", "must not have control characters"),
        ("params", "a\0b", "must not have control characters"),
        ("params", "a\x1b[31m", "must not have control characters"),
        ("params", "a\x7f", "must not have control characters"),
        ("params", "x" * (MAX_PARAMS + 1), f"must be at most {MAX_PARAMS} bytes long"),
        ("params", "ü" * (MAX_PARAMS // 2 + 1), f"must be at most {MAX_PARAMS} bytes long"),
        ("params", "x" * 100_000, f"must be at most {MAX_PARAMS} bytes long"),
        ("memory_mib", 0, "should be greater than or equal to 16, not 0"),
        ("memory_mib", 15, "should be greater than or equal to 16, not 15"),
        ("memory_mib", -1, "should be greater than or equal to 16, not -1"),
        ("memory_mib", 1 << 40, f"must be at most {host_memory_mib()}, the memory of this host"),
        ("memory_mib", host_memory_mib() + 1, f"must be at most {host_memory_mib()}"),
        ("memory_mib", "256", "should be a valid integer, not '256'"),
        ("memory_mib", 256.0, "should be a valid integer, not 256.0"),
        ("memory_mib", True, "should be a valid integer, not True"),
        ("cpus", 0, "should be greater than or equal to 1, not 0"),
        ("cpus", -(1 << 63), "should be greater than or equal to 1"),
        ("cpus", host_cpus() + 1, f"must be at most {host_cpus()}, the CPUs of this host"),
        ("cpus", (1 << 64) - 1, f"must be at most {host_cpus()}"),
        ("cpus", "1", "should be a valid integer, not '1'"),
        ("disks", {}, "should be a valid list"),
        ("disks", "/disk", "should be a valid list, not '/disk'"),
        ("net", {}, "should be a valid list"),
        ("shared_dirs", "/", "should be a valid list, not '/'"),
        ("vsock", 1, "should be a valid boolean, not 1"),
        ("protected", "yes", "should be a valid boolean, not 'yes'"),
        ("balloon", 0, "should be a valid boolean, not 0"),
        ("gdb_port", 1023, "should be greater than or equal to 1024, not 1023"),
        ("gdb_port", 65536, "should be less than or equal to 65535, not 65536"),
        ("gdb_port", True, "should be a valid integer, not True"),
        ("ready_timeout_usec", -1, "should be greater than or equal to 0, not -1"),
        ("ready_timeout_usec", 1.5, "should be a valid integer, not 1.5"),
        ("collect", "", "should be 'manual' or 'on-death', not ''"),
        ("collect", "always", "should be 'manual' or 'on-death', not 'always'"),
        ("collect", True, "should be 'manual' or 'on-death', not True"),
        ("colour", "red", f"unknown key; the keys are {KEYS}"),
        ("", 1, f"unknown key; the keys are {KEYS}"),
        ("Kernel", "/x", f"unknown key; the keys are {KEYS}"),
        ("close", 1, f"unknown key; the keys are {KEYS}"),
        ("__class__", 1, f"unknown key; the keys are {KEYS}"),
    ],
)
def test_value_is_refused(make: Maker, key: str, value: object, says: str) -> None:
    (problem,) = make.refuse(**{key: value})
    assert problem.startswith(f"{key}: ")
    assert says in problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"writable": 1}, "disks[1].writable: should be a valid boolean, not 1"),
        ({"writable": "yes"}, "disks[1].writable: should be a valid boolean, not 'yes'"),
        ({"direct": 0}, "disks[1].direct: should be a valid boolean, not 0"),
        ({"image": 1}, "disks[1].image: must be an open file (h) or a path (s)"),
        ({"image": "disk"}, "disks[1].image: the path disk must be absolute"),
        ({"image": None}, "disks[1].image: Field required"),
        ({"id": 5}, "disks[1].id: should be a valid string, not 5"),
        ({"id": "x" * 21}, "disks[1].id: String should match pattern"),
        ({"id": ""}, "disks[1].id: String should match pattern"),
        ({"id": "a,b"}, "disks[1].id: String should match pattern"),
        ({"id": "a\n"}, "disks[1].id: String should match pattern"),
        ({"size": 5}, f"disks[1].size: unknown key; the keys are {DISK_KEYS}"),
    ],
)
def test_disk_is_refused(make: Maker, change: dict[str, object], problem: str) -> None:
    bad: dict[str, object] = {"image": make.path("disk"), **change}
    bad = {key: value for key, value in bad.items() if value is not None}
    (said,) = make.refuse(disks=[{"image": make.path("disk")}, bad])
    assert said.startswith(problem)


def test_disk_that_is_no_dictionary_is_refused(make: Maker) -> None:
    (said,) = make.refuse(disks=[make.path("disk")])
    assert said.startswith("disks[0]: should be a valid dictionary")


@pytest.mark.parametrize("number", [MAX_DISKS + 1, 5000])
def test_too_many_disks_are_refused(make: Maker, number: int) -> None:
    (said,) = make.refuse(disks=[{"image": make.path("disk")}] * number)
    assert said.startswith(f"disks: List should have at most {MAX_DISKS} items")


# Network devices and shared directories


Opener = Callable[[Maker], Handle]


def _pipe(make: Maker) -> Handle:
    make.fds += os.pipe()
    return Handle(make.fds[-2])


def _socket(make: Maker) -> Handle:
    make.fds += [each.detach() for each in socket.socketpair()]
    return Handle(make.fds[-1])


def test_directory_is_shared_read_only_unless_said_otherwise(make: Maker) -> None:
    shared = [
        {"source": make.path("."), "tag": "one"},
        {"source": make.path("."), "tag": "Two_2.x-y", "writable": True},
    ]
    config = make.parse(shared_dirs=shared)
    assert [(each.source.name, each.tag, each.writable) for each in config.shared_dirs] == [
        (str(make.directory), "one", False),
        (str(make.directory), "Two_2.x-y", True),
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"source": None}, "source: Field required"),
        ({"source": "relative"}, "source: the path relative must be absolute"),
        ({"source": "/proc/none"}, "source: /proc/none: No such file or directory"),
        ({"source": "/etc/passwd"}, "source: /etc/passwd is not a directory"),
        ({"source": 5}, "source: must be a path (s)"),
        ({"tag": None}, "tag: Field required"),
        ({"tag": ""}, "tag: String should match pattern"),
        ({"tag": "a:b"}, "tag: String should match pattern"),
        ({"tag": "a,b"}, "tag: String should match pattern"),
        ({"tag": "x" * 36}, "tag: String should match pattern"),
        ({"writable": 1}, "writable: should be a valid boolean, not 1"),
        ({"cache": "no"}, "cache: unknown key; the keys are source, tag, writable"),
    ],
)
def test_shared_directory_is_refused(make: Maker, change: dict[str, object], problem: str) -> None:
    bad: dict[str, object] = {"source": "/", "tag": "tag", **change}
    bad = {key: value for key, value in bad.items() if value is not None}
    (said,) = make.refuse(shared_dirs=[bad])
    assert said.startswith(f"shared_dirs[0].{problem}")


def test_two_shared_directories_with_one_tag_are_refused(make: Maker) -> None:
    shared = [{"source": "/", "tag": "tag"}, {"source": "/etc", "tag": "tag"}]
    assert make.refuse(shared_dirs=shared) == ["shared_dirs: each must have a tag of its own"]


@pytest.mark.parametrize(
    ("net", "problem"),
    [
        ({}, "tap: Field required"),
        ({"tap": 5}, "tap: must be an open tap device (h) or the name of one (s)"),
        ({"tap": "none0"}, "tap: there is no network device none0"),
        ({"tap": "lo"}, "tap: lo is not a tap device"),
        ({"tap": "../net/lo"}, "tap: '../net/lo' is not the name of a network device"),
        ({"tap": ".."}, "tap: '..' is not the name of a network device"),
        ({"tap": ""}, "tap: '' is not the name of a network device"),
        ({"tap": "x" * 16}, f"tap: '{'x' * 16}' is not the name of a network device"),
    ],
)
def test_network_device_is_refused(make: Maker, net: dict[str, object], problem: str) -> None:
    (said,) = make.refuse(net=[net])
    assert said == f"net[0].{problem}"


@pytest.mark.parametrize("opener", [_pipe, _socket, lambda make: make.handle()])
def test_descriptor_that_is_no_tap_is_refused(make: Maker, opener: Opener) -> None:
    assert make.refuse(net=[{"tap": opener(make)}]) == ["net[0].tap: it must be an open tap device"]


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every descriptor is a tap0, as far as the kernel tells; gives its flags, to be changed."""
    answer = {"flags": 0x1002}

    def tell(fd: int, request: int, into: bytearray) -> int:
        assert request == 0x800454D2
        into[:18] = b"tap0".ljust(16, b"\0") + answer["flags"].to_bytes(2, "little")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", tell)
    return answer


@pytest.mark.parametrize(
    ("mac", "kept"), [(None, None), ("02:00:5e:10:00:0F", "02:00:5e:10:00:0f")]
)
def test_descriptor_of_a_tap_is_taken(
    make: Maker, taps: dict[str, int], mac: str | None, kept: str | None
) -> None:
    handle = make.handle()
    config = make.parse(net=[{"tap": handle, **({"mac": mac} if mac else {})}])
    (net,) = config.net
    assert (net.tap.name, net.mac) == ("tap0", kept)
    assert os.path.sameopenfile(net.tap.fd, handle.fd)
    assert net.tap.fd != handle.fd
    config.close()
    assert net.tap.fd == -1


def test_tun_device_is_refused(make: Maker, taps: dict[str, int]) -> None:
    taps["flags"] = 0x1001
    said = "net[0].tap: it must be a tap device, not a tun device"
    assert make.refuse(net=[{"tap": make.handle()}]) == [said]


@pytest.mark.parametrize(
    ("mac", "says"),
    [
        ("", "String should match pattern"),
        ("02:00:5e:10:00", "String should match pattern"),
        ("02-00-5e-10-00-00", "String should match pattern"),
        ("02:00:5e:10:00:0g", "String should match pattern"),
        ("02:00:5e:10:00:00\n", "String should match pattern"),
        ("02:00:5e:10:00:00,x=y", "String should match pattern"),
        ("01:00:5e:10:00:00", "must be a unicast address"),
        ("ff:ff:ff:ff:ff:ff", "must be a unicast address"),
        (5, "should be a valid string, not 5"),
    ],
)
def test_mac_is_refused(make: Maker, taps: dict[str, int], mac: object, says: str) -> None:
    (said,) = make.refuse(net=[{"tap": make.handle(), "mac": mac}])
    assert said.startswith("net[0].mac: ")
    assert says in said


@pytest.mark.parametrize(("key", "most"), [("net", MAX_NETS), ("shared_dirs", MAX_SHARED_DIRS)])
def test_too_many_devices_are_refused(
    make: Maker, taps: dict[str, int], key: str, most: int
) -> None:
    each: Callable[[int], dict[str, object]] = (
        (lambda number: {"tap": make.handle()})
        if key == "net"
        else (lambda number: {"source": "/", "tag": str(number)})
    )
    assert len(getattr(make.parse(**{key: [each(n) for n in range(most)]}), key)) == most
    (said,) = make.refuse(**{key: [each(n) for n in range(most + 1)]})
    assert said.startswith(f"{key}: List should have at most {most} items")


# What a disk image is


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QED\0", "QED"),
        (b"KDMV\1\0\0\0", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"composite_disk\x1d", "composite"),
        (b"\x3a\xff\x26\xed\1\0", "Android sparse"),
    ],
)
@pytest.mark.parametrize("way", ["path", "handle"])
def test_image_that_is_not_raw_is_refused(make: Maker, head: bytes, name: str, way: str) -> None:
    """A guest could else write a head that makes the VMM open other files of the host."""
    (make.directory / "disk").write_bytes(head + bytes(1000))
    image = make.path("disk") if way == "path" else make.handle()
    (said,) = make.refuse(disks=[{"image": image}])
    assert said.startswith(f"disks[0].image: the image is {name}, and only raw ones are taken")


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"\0QFI\xfb", b"qfi\xfb", b"QFI"])
def test_raw_image_is_taken_whatever_is_in_it(make: Maker, content: bytes) -> None:
    (make.directory / "disk").write_bytes(content)
    (disk,) = make.parse(disks=[{"image": make.path("disk")}]).disks
    assert disk.image.size == len(content)


def test_heads_matter_for_disks_only(make: Maker) -> None:
    (make.directory / "kernel").write_bytes(b"QFI\xfb")
    assert make.parse().kernel is not None


# Keys that only make sense together


def test_empty_config_is_refused(make: Maker) -> None:
    assert make.refuse(kernel=None) == ["kernel: a kernel (or else a bios) is required"]


def test_kernel_and_bios_exclude_each_other(make: Maker) -> None:
    assert make.refuse(bios=make.path("bios")) == ["kernel, bios: only one of them can be given"]


def test_what_goes_with_a_kernel_does_not_go_with_a_bios(make: Maker) -> None:
    bios, initrd = make.path("bios"), make.path("initrd")
    assert make.refuse(kernel=None, bios=bios, initrd=initrd, params="quiet") == [
        "initrd: goes only with a kernel, not with a bios",
        "params: goes only with a kernel, not with a bios",
    ]


NO_FILE = "it must be a regular file or a block device"


@pytest.mark.parametrize("key", ["kernel", "initrd", "bios"])
@pytest.mark.parametrize(
    ("opener", "says"),
    [
        pytest.param(_pipe, NO_FILE, id="pipe"),
        pytest.param(_socket, NO_FILE, id="socket"),
        pytest.param(lambda make: make.handle(".", os.O_DIRECTORY), NO_FILE, id="directory"),
        pytest.param(lambda make: make.handle(flags=os.O_PATH), "O_PATH only", id="O_PATH"),
        pytest.param(lambda make: make.handle(flags=os.O_WRONLY), "write-only", id="write-only"),
    ],
)
def test_descriptor_that_cannot_be_read_as_a_file_is_refused(
    make: Maker, key: str, opener: Opener, says: str
) -> None:
    kernel = make.path("kernel") if key == "initrd" else None
    (said,) = make.refuse(**{"kernel": kernel, key: opener(make)})
    assert said.startswith(f"{key}: ")
    assert says in said


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND])
def test_writable_disk_is_refused_when_its_descriptor_is_not(make: Maker, flags: int) -> None:
    (said,) = make.refuse(disks=[{"image": make.handle(flags=flags), "writable": True}])
    assert said.startswith("disks[0].image: the file is open ")
    assert said.endswith("a writable disk needs it open for reading and writing, not appending")


# All at once, and no more than that


def test_every_problem_is_named_at_once(make: Maker) -> None:
    problems = make.refuse(
        name="a/b",
        vmm="xen",
        kernel=5,
        bios="bios",
        initrd="/proc/none",
        params="\n",
        memory_mib=0,
        cpus="1",
        disks=[{"image": make.path("disk"), "id": ","}, {"direct": 1, "zero": 0}],
        collect="never",
        one=1,
        two=2,
    )
    assert [problem.partition(": ")[0] for problem in problems] == [
        "name",
        "vmm",
        "kernel",
        "initrd",
        "bios",
        "params",
        "memory_mib",
        "cpus",
        "disks[0].id",
        "disks[1].image",
        "disks[1].direct",
        "disks[1].zero",
        "collect",
        "one",
        "two",
        "kernel, bios",
    ]


def test_message_stays_short_whatever_is_wrong(make: Maker) -> None:
    """Thousands of unknown keys with long names, a long value, and a long path."""
    changes: dict[str, Any] = {f"{number}{'k' * 1000}": "v" * 1000 for number in range(5000)}
    changes |= {"name": "n" * 100_000, "kernel": "/" + "p" * 100_000, "vmm": "v" * 100_000}
    with pytest.raises(InvalidConfig) as refused:
        parse_config(changes, FilePolicy(None))
    assert len(refused.value.problems) == 5003
    assert str(refused.value).endswith("; and 4963 more problems")
    assert len(str(refused.value)) < 40 * 300


def test_refusal_closes_what_other_keys_had_opened(make: Maker) -> None:
    files = FilePolicy(None)
    raw = make.raw(
        initrd=make.handle("initrd"),
        disks=[{"image": make.handle()}, {"image": make.path("disk"), "writable": True}],
        cpus=0,
    )
    with pytest.raises(InvalidConfig):
        parse_config(raw, files)
    assert [file.fd for file in files.opened] == [-1] * 4


def test_failure_in_the_middle_closes_what_was_opened(make: Maker) -> None:
    """As here, a descriptor that doesn't exist."""
    files = FilePolicy(None)
    with pytest.raises(InvalidConfig, match="initrd: it can't be used: Bad file descriptor"):
        parse_config(make.raw(initrd=Handle(1 << 20)), files)
    assert [file.fd for file in files.opened] == [-1]


def test_file_outside_the_image_directories_is_a_problem_like_others(make: Maker) -> None:
    files = FilePolicy((make.directory / "images",))
    with pytest.raises(InvalidConfig) as refused:
        parse_config(make.raw(initrd=make.handle("initrd"), cpus=0), files)
    assert [problem.partition(": ")[0] for problem in refused.value.problems] == ["kernel", "cpus"]
    assert "is not below an image directory" in refused.value.problems[0]
