"""The KVM probe: its guest program is right, as an emulated CPU proves, and it tells what fails.

None of this needs a /dev/kvm: QEMU stands for the CPU, and made-up answers stand for the kernel.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmbus.vmm import kvmprobe

QEMU = "qemu-system-x86_64"
NOBODY = 65534
DEADLINE = 30.0


def _rom() -> bytes:
    """A BIOS that does what a boot loader does: enters flat protected mode and jumps to BASE."""
    rom = bytearray(0x10000)
    gdt = b"".join(entry.to_bytes(8, "little") for entry in (0, 0xCF9B000000FFFF, 0xCF93000000FFFF))
    rom[0:0x18] = gdt
    rom[0x20:0x26] = b"\x17\x00\x00\x00\xff\xff"  # the GDT's limit and address
    code = b"".join(
        [
            b"\xfa",  # cli
            b"\x2e\x66\x0f\x01\x16\x20\x00",  # lgdt cs:[0x20]
            b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0",  # mov eax, cr0; or al, 1; mov cr0, eax
            b"\x66\xea" + kvmprobe.BASE.to_bytes(4, "little") + b"\x08\x00",  # ljmp 8:BASE
        ]
    )
    rom[0x100 : 0x100 + len(code)] = code
    rom[0xFFF0:0xFFF3] = b"\xe9\x0d\x01"  # jmp 0x100
    return bytes(rom)


def _run(tmp_path: Path, image: bytes) -> bytes:
    """What the image writes under QEMU's own CPU until its `end: hlt`, or a triple fault."""
    (tmp_path / "rom").write_bytes(_rom())
    (tmp_path / "image").write_bytes(image)
    command = [QEMU, "-M", "pc,accel=tcg", "-cpu", "qemu64", "-m", "16", "-nodefaults"]
    command += ["-display", "none", "-no-reboot", "-bios", "rom"]
    command += ["-device", f"loader,file=image,addr={kvmprobe.BASE:#x},force-raw=on"]
    command += ["-device", f"isa-debugcon,iobase={kvmprobe.PORT:#x},chardev=out"]
    command += ["-chardev", "stdio,id=out,signal=off", "-device", "isa-debug-exit,iobase=0xf4"]
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=tmp_path, stdout=pipe, timeout=60, check=False).stdout


def _with_exit(image: bytes) -> bytes:
    # end: out 0xf4, al instead of hlt; jmp end
    assert image.count(b"\xf4\xeb\xfd") == 1
    return image.replace(b"\xf4\xeb\xfd", b"\xe6\xf4\xf4")


def test_guest_program_succeeds_on_a_healthy_cpu(tmp_path: Path) -> None:
    assert _run(tmp_path, _with_exit(kvmprobe.guest_image())) == kvmprobe.EXPECTED


@pytest.mark.parametrize(
    ("address", "content", "output"),
    [
        (kvmprobe._ON_BP, b"\xb0b", b"PLbUFCM"),  # another answer from the breakpoint's handler
        (kvmprobe._PDPT_B, bytes(16), b"PLBU"),  # the new page tables map nothing
        (kvmprobe._MAGIC, bytes(4), b"PLBU"),  # the newly mapped page is the wrong one
        (kvmprobe._SUM, b"\1", b"PLBUFC"),  # the loop's sum is wrong
        (kvmprobe._IDTR, bytes(2), b"PL"),  # no exception can be taken
        (kvmprobe._PML4_A, bytes(8), b"P"),  # paging can't be switched on
    ],
)
def test_guest_program_notices_what_is_wrong(
    tmp_path: Path, address: int, content: bytes, output: bytes
) -> None:
    image = bytearray(kvmprobe.guest_image())
    image[address - kvmprobe.BASE : address - kvmprobe.BASE + len(content)] = content
    assert _run(tmp_path, _with_exit(bytes(image))) == output


def _run_probe(program: Sequence[str], user: int | None = None) -> tuple[int, str]:
    """Exit status and stderr of a probe; it never prints on stdout."""
    done = subprocess.run(
        [sys.executable, *program],
        cwd=Path(kvmprobe.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        user=user,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def _probe(*arguments: str, user: int | None = None) -> tuple[int, str]:
    """As vmbusd runs it."""
    return _run_probe(["-I", "-S", kvmprobe.__file__, *arguments], user)


def test_device_missing(tmp_path: Path) -> None:
    assert _probe("20", f"{tmp_path}/kvm") == (1, f"{tmp_path}/kvm does not exist\n")


def test_device_not_permitted() -> None:
    """For root everything is permitted, so it asks as somebody else."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        device = Path(directory, "kvm")
        device.touch(mode=0)
        user = NOBODY if os.geteuid() == 0 else None
        assert _probe("20", str(device), user=user) == (1, f"{device}: Permission denied\n")


def test_device_of_another_kind() -> None:
    said = "KVM cannot tell its version: Inappropriate ioctl for device\n"
    assert _probe("20", "/dev/null") == (1, said)


@pytest.mark.parametrize("stage", range(len(kvmprobe.EXPECTED)))
def test_missing_stage_is_named(stage: int) -> None:
    names = list(kvmprobe.STAGES.values())
    assert kvmprobe._missing(bytearray(kvmprobe.EXPECTED[:stage])) == names[stage]


# With a check that ends, or doesn't, in place of the one that asks KVM


def _probe_with(check: str, rest: str = "", deadline: str = "0.1") -> tuple[int, str]:
    program = f"""
import os, signal, threading
from vmbus.vmm import kvmprobe
def check(kvm, output):
    {check}
kvmprobe._open = lambda device: os.open("/dev/null", os.O_RDWR)
kvmprobe._check_x86 = check
kvmprobe._check_other = lambda kvm, arm: check(kvm, bytearray())
kvmprobe.os.uname = lambda: os.uname_result(("Linux", "", "", "", "x86_64"))
{rest}
kvmprobe.main()
"""
    return _run_probe(["-c", program, deadline])


LATE = "20"


def test_usable_kvm_is_told_by_silence() -> None:
    assert _probe_with("pass", deadline=LATE) == (0, "")


def test_failure_is_told_in_one_line() -> None:
    said = "a guest could not execute cpuid: it stopped"
    assert _probe_with(f"raise OSError({said!r})", deadline=LATE) == (1, f"{said}\n")


def test_unforeseen_failure_is_a_failure() -> None:
    status, said = _probe_with("raise ZeroDivisionError", deadline=LATE)
    assert status == 1
    assert said.endswith("the probe failed\n")


FOR_EVER = "threading.Event().wait()"


@pytest.mark.parametrize(
    ("output", "stage"), [(b"", "start in protected mode"), (b"PL", "return from a breakpoint")]
)
def test_endless_guest_is_given_up(output: bytes, stage: str) -> None:
    said = f"a guest did not {stage} in 0.1 s\n"
    assert _probe_with(f"output += {output!r}; {FOR_EVER}") == (1, said)


def test_alarm_ends_what_nothing_else_ends() -> None:
    """Here it is the wait for the deadline that never ends."""
    stuck = "threading.Thread.join = lambda self, timeout: signal.pause()"
    assert _probe_with(FOR_EVER, stuck) == (-signal.SIGALRM, "")


# With a made-up KVM_RUN


def _exit(number: int, detail: bytes = b"") -> bytes:
    return struct.pack("=8xI20x", number) + detail


def _out(text: bytes, port: int = kvmprobe.PORT) -> bytes:
    """The guest wrote bytes to a port, which KVM shows at offset 100."""
    detail = struct.pack("=BBHIQ", 1, 1, port, len(text), 100)
    return _exit(kvmprobe._EXIT_IO, detail).ljust(100, b"\0") + text


EMULATION = _exit(kvmprobe._EXIT_INTERNAL_ERROR, struct.pack("=I", kvmprobe._EMULATION_FAILED))


@pytest.mark.parametrize(
    ("exits", "output", "end"),
    [
        ([_out(b"P"), _out(b"LB"), _exit(5)], b"PLB", "it stopped with exit reason 5 (halt)"),
        ([_exit(8)], b"", "it stopped with exit reason 8 (shutdown)"),
        ([_out(b"P"), _exit(9)], b"P", "it stopped with exit reason 9 (entry failed)"),
        ([_exit(17)], b"", "it stopped with exit reason 17 (internal error)"),
        ([EMULATION], b"", "KVM emulates this guest, and does not know an instruction"),
        ([_exit(6)], b"", "it stopped with exit reason 6"),
        ([_out(b"P", port=0x80)], b"", "it stopped with exit reason 2"),
    ],
)
def test_what_a_guest_says_and_how_it_ends_is_understood(
    monkeypatch: pytest.MonkeyPatch, exits: list[bytes], output: bytes, end: str
) -> None:
    coming = iter(exits)
    with mmap.mmap(-1, 4096) as state:

        def run(vcpu: int, request: int, argument: int, doing: str) -> int:
            assert (vcpu, request, argument) == (5, kvmprobe._RUN, 0)
            state[:] = next(coming).ljust(4096, b"\0")
            return 0

        monkeypatch.setattr(kvmprobe, "_ioctl", run)
        said = bytearray()
        assert kvmprobe._run_x86(5, state, said) == end
    assert said == output
    assert next(coming, None) is None
