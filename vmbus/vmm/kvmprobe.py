"""Finds out whether /dev/kvm can really run an ordinary 64-bit guest.

A /dev/kvm that opens may still be useless: some hosts run guests that were not built for them in an
instruction emulator, a thousand times too slowly and without all instructions. So this program runs
a tiny guest that does what a kernel does at boot, from 32-bit protected mode on: it enters long
mode, takes a breakpoint, an invalid instruction and a page fault, switches page tables, and must do
some million instructions in time.

On other machines than x86-64 it only creates a VM with one vCPU (and initialises that on aarch64).

Run as `kvmprobe.py [DEADLINE [DEVICE]]` it prints nothing and exits with 0 if KVM is usable; else
it prints one line on stderr that says why not and exits with 1. DEADLINE is in
seconds (default: 1). A guest may keep its thread inside the kernel for ever, so this must be a
process of its own; if nothing else ends it, SIGALRM does, a second after the deadline.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import struct
import sys
import threading

# The guest's only memory begins at BASE of its physical addresses, and so does its program.
BASE, SIZE = 0x100000, 0x10000
PORT = 0xE9
# What the guest writes to PORT, a byte a stage, and what it has not managed while that is missing.
STAGES = {
    b"P": "start in protected mode",
    b"L": "enter long mode",
    b"B": "return from a breakpoint",
    b"U": "return from an invalid instruction",
    b"F": "switch page tables in a page fault",
    b"C": "execute cpuid",
    b"M": "run a loop over memory",
}
EXPECTED = b"".join(STAGES)

_LONG, _ON_BP, _ON_UD, _ON_PF = BASE + 0x100, BASE + 0x200, BASE + 0x210, BASE + 0x220
_GDT, _GDTR, _IDT, _IDTR = BASE + 0x300, BASE + 0x320, BASE + 0x400, BASE + 0x4F0
_MAGIC, _SUM, _STACK_TOP = BASE + 0x500, BASE + 0x508, BASE + 0x7000
_PML4_A, _PDPT_A, _PD, _PML4_B, _PDPT_B = range(BASE + 0x1000, BASE + 0x6000, 0x1000)
_WINDOW = 0x40000000  # where the second page tables, and only they, show the first 2 MiB again
_MAGIC_VALUE = 0x5AFEC0DE
_ROUNDS = 4_000_000  # some milliseconds on hardware, many seconds in an emulator


def _u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def _code() -> dict[int, bytes]:
    say = b"\xe6" + bytes([PORT])  # out PORT, al
    start = [
        b"\x0f\x01\x15" + _u32(_GDTR),  # lgdt [GDTR]
        b"\xea" + _u32(BASE + 0x0E) + b"\x08\x00",  # ljmp 0x08:(next instruction)
        b"\x66\xb8\x10\x00\x8e\xd8\x8e\xc0\x8e\xd0",  # mov ax, 0x10; mov ds, ax; (es, ss too)
        b"\xb0P" + say,  # mov al, 'P'
        b"\x0f\x20\xe0\x83\xc8\x20\x0f\x22\xe0",  # mov eax, cr4; or eax, PAE; mov cr4, eax
        b"\xb8" + _u32(_PML4_A) + b"\x0f\x22\xd8",  # mov eax, PML4_A; mov cr3, eax
        b"\xb9" + _u32(0xC0000080) + b"\x0f\x32",  # mov ecx, EFER; rdmsr
        b"\x0f\xba\xe8\x08\x0f\x30",  # bts eax, LME; wrmsr
        b"\x0f\x20\xc0\x0f\xba\xe8\x1f\x0f\x22\xc0",  # mov eax, cr0; bts eax, PG; mov cr0, eax
        b"\xea" + _u32(_LONG) + b"\x18\x00",  # ljmp 0x18:LONG
    ]
    long = [
        b"\xbc" + _u32(_STACK_TOP) + b"\x0f\x01\x1c\x25" + _u32(_IDTR),  # mov esp, ...; lidt [IDTR]
        b"\xb0L" + say + b"\xcc" + say,  # mov al, 'L'; ...; int3 (its handler sets al)
        b"\x0f\x0b" + say,  # ud2 (its handler sets al)
        b"\x8b\x0c\x25" + _u32(_WINDOW + _MAGIC),  # mov ecx, [WINDOW + MAGIC] (page fault)
        b"\x81\xf9" + _u32(_MAGIC_VALUE) + b"\x75\x34" + say,  # cmp ecx, MAGIC_VALUE; jne end
        b"\xb8" + _u32(0x80000001) + b"\x0f\xa2",  # mov eax, 0x80000001; cpuid
        b"\x0f\xba\xe2\x1d\x73\x25\xb0C" + say,  # bt edx, LM; jnc end; mov al, 'C'
        b"\xb9" + _u32(_ROUNDS),  # mov ecx, ROUNDS
        b"\x01\x0c\x25" + _u32(_SUM),  # add [SUM], ecx
        b"\xff\xc9\x75\xf5",  # dec ecx; jnz (the addition)
        b"\x81\x3c\x25" + _u32(_SUM) + _u32(_ROUNDS * (_ROUNDS + 1) // 2),  # cmp [SUM], ...
        b"\x75\x04\xb0M" + say,  # jne end; mov al, 'M'
        b"\xf4\xeb\xfd",  # end: hlt; jmp end
    ]
    return {
        BASE: b"".join(start),
        _LONG: b"".join(long),
        _ON_BP: b"\xb0B\x48\xcf",  # mov al, 'B'; iretq
        _ON_UD: b"\xb0U\x48\x83\x04\x24\x02\x48\xcf",  # mov al, 'U'; add qword [rsp], 2; iretq
        # mov eax, PML4_B; mov cr3, rax; mov al, 'F'; add rsp, 8 (the error code); iretq
        _ON_PF: b"\xb8" + _u32(_PML4_B) + b"\x0f\x22\xd8\xb0F\x48\x83\xc4\x08\x48\xcf",
    }


def guest_image() -> bytes:
    """The guest's memory; to be entered at BASE, in flat 32-bit protected mode without paging."""
    gates = [bytes(16)] * 15
    for vector, address in ((3, _ON_BP), (6, _ON_UD), (14, _ON_PF)):
        gates[vector] = struct.pack("<HHHHQ", address & 0xFFFF, 0x18, 0x8E00, address >> 16, 0)
    tables = {
        _GDT: struct.pack("<4Q", 0, 0xCF9B000000FFFF, 0xCF93000000FFFF, 0xAF9B000000FFFF),
        _GDTR: struct.pack("<HQ", 4 * 8 - 1, _GDT),
        _IDT: b"".join(gates),
        _IDTR: struct.pack("<HQ", 15 * 16 - 1, _IDT),
        _MAGIC: _u32(_MAGIC_VALUE),
        _PML4_A: struct.pack("<Q", _PDPT_A | 3),  # 3: present and writable
        _PDPT_A: struct.pack("<Q", _PD | 3),
        _PD: struct.pack("<Q", 0x83),  # the first 2 MiB, as one page
        _PML4_B: struct.pack("<Q", _PDPT_B | 3),
        _PDPT_B: struct.pack("<QQ", _PD | 3, _PD | 3),
    }
    image = bytearray(SIZE)
    for address, content in (_code() | tables).items():
        image[address - BASE : address - BASE + len(content)] = content
    return bytes(image)


def _io(number: int, size: int = 0, access: int = 0) -> int:
    return access << 30 | size << 16 | 0xAE << 8 | number


_GET_API_VERSION, _CREATE_VM, _CHECK_EXTENSION = _io(0x00), _io(0x01), _io(0x03)
_GET_VCPU_MMAP_SIZE, _GET_SUPPORTED_CPUID = _io(0x04), _io(0x05, 8, 3)
_CREATE_VCPU, _SET_USER_MEMORY_REGION = _io(0x41), _io(0x46, 32, 1)
_SET_TSS_ADDR, _SET_IDENTITY_MAP_ADDR = _io(0x47), _io(0x48, 8, 1)
_RUN, _SET_REGS, _SET_CPUID2 = _io(0x80), _io(0x82, 144, 1), _io(0x90, 8, 1)
_GET_SREGS, _SET_SREGS = _io(0x83, 312, 2), _io(0x84, 312, 1)
_ARM_PREFERRED_TARGET, _ARM_VCPU_INIT = _io(0xAF, 32, 2), _io(0xAE, 32, 1)
_CAP_ARM_VM_IPA_SIZE, _EXIT_IO, _EXIT_INTERNAL_ERROR, _EMULATION_FAILED = 165, 2, 17, 1
_EXITS = {5: " (halt)", 8: " (shutdown)", 9: " (entry failed)", 17: " (internal error)"}


def _ioctl(fd: int, request: int, arg: int | bytearray, doing: str) -> int:
    while True:
        try:
            return fcntl.ioctl(fd, request, arg)
        except InterruptedError:
            continue
        except OSError as error:
            raise OSError(f"KVM cannot {doing}: {error.strerror}") from None


def _open(device: str) -> int:
    try:
        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise OSError(f"{device} does not exist") from None
    except OSError as error:
        raise OSError(f"{device}: {error.strerror}") from None
    if _ioctl(kvm, _GET_API_VERSION, 0, "tell its version") != 12:
        raise OSError(f"{device} does not speak version 12 of the KVM interface")
    return kvm


def _create_x86(kvm: int, memory: mmap.mmap) -> int:
    vm = _ioctl(kvm, _CREATE_VM, 0, "create a VM")
    # Some Intel CPUs need these pages for a guest without paging. fcntl takes no more than an int.
    page = bytearray(struct.pack("=Q", 0x7FFFC000))
    _ioctl(vm, _SET_IDENTITY_MAP_ADDR, page, "reserve a page of a guest's memory")
    _ioctl(vm, _SET_TSS_ADDR, 0x7FFFD000, "reserve pages of a guest's memory")
    where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = bytearray(struct.pack("=IIQQQ", 0, 0, BASE, SIZE, where))
    _ioctl(vm, _SET_USER_MEMORY_REGION, region, "give a guest memory")
    return _ioctl(vm, _CREATE_VCPU, 0, "create a vCPU")


def _set_registers_x86(kvm: int, vcpu: int) -> None:
    cpuid, sregs = bytearray(struct.pack("=I", 256) + bytes(4 + 256 * 40)), bytearray(312)
    _ioctl(kvm, _GET_SUPPORTED_CPUID, cpuid, "tell which CPU features it has")
    _ioctl(vcpu, _SET_CPUID2, cpuid, "set a guest's CPU features")
    _ioctl(vcpu, _GET_SREGS, sregs, "read a guest's registers")
    for index in range(6):  # cs, ds, es, fs, gs, ss: flat
        selector, kind = (0x08, 0xB) if index == 0 else (0x10, 0x3)
        segment = (0, 0xFFFFFFFF, selector, kind, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        struct.pack_into("=QIH10B", sregs, 24 * index, *segment)
    struct.pack_into("=Q", sregs, 24 * 8 + 16 * 2, 0x11)  # cr0: PE, ET
    _ioctl(vcpu, _SET_SREGS, sregs, "set a guest's registers")
    regs = bytearray(struct.pack("=18Q", *[0] * 16, BASE, 2))  # rip, rflags
    _ioctl(vcpu, _SET_REGS, regs, "set a guest's registers")


def _run_x86(vcpu: int, state: mmap.mmap, output: bytearray) -> str:
    """Lets the guest add to output until it ends, and tells how it ended."""
    while True:
        _ioctl(vcpu, _RUN, 0, "run a guest")
        (number,) = struct.unpack_from("=I", state, 8)
        _, size, port, count, offset = struct.unpack_from("=BBHIQ", state, 32)
        if number != _EXIT_IO or port != PORT:
            break
        output += state[offset : offset + size * count]
    if number == _EXIT_INTERNAL_ERROR and state[32] == _EMULATION_FAILED:
        return "KVM emulates this guest, and does not know an instruction"
    return f"it stopped with exit reason {number}{_EXITS.get(number, '')}"


def _missing(output: bytearray) -> str:
    return next((what for byte, what in STAGES.items() if byte not in output), "stop")


def _check_x86(kvm: int, output: bytearray) -> None:
    memory = mmap.mmap(-1, SIZE)
    memory[:] = guest_image()
    vcpu = _create_x86(kvm, memory)
    _set_registers_x86(kvm, vcpu)
    size = _ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0, "tell the size of a vCPU's state")
    end = _run_x86(vcpu, mmap.mmap(vcpu, size), output)
    if output != EXPECTED:
        raise OSError(f"a guest could not {_missing(output)}: {end}")


def _check_other(kvm: int, arm: bool) -> None:
    kind = _ioctl(kvm, _CHECK_EXTENSION, _CAP_ARM_VM_IPA_SIZE, "tell its limits") if arm else 0
    vm = _ioctl(kvm, _CREATE_VM, kind, "create a VM")
    vcpu = _ioctl(vm, _CREATE_VCPU, 0, "create a vCPU")
    if arm:
        init = bytearray(32)
        _ioctl(vm, _ARM_PREFERRED_TARGET, init, "tell which vCPU it likes")
        _ioctl(vcpu, _ARM_VCPU_INIT, init, "initialise a vCPU")


def _check(device: str, output: bytearray, verdict: list[str]) -> None:
    try:
        kvm, machine = _open(device), os.uname().machine
        if machine == "x86_64":
            _check_x86(kvm, output)
        else:
            _check_other(kvm, machine == "aarch64")
        verdict[0] = ""
    except OSError as error:
        verdict[0] = str(error)


def main() -> None:
    """Runs the probe and ends the process, even while the guest still runs."""
    deadline = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    signal.setitimer(signal.ITIMER_REAL, deadline + 1)
    device = sys.argv[2] if len(sys.argv) > 2 else "/dev/kvm"
    output, verdict = bytearray(), ["the probe failed"]
    thread = threading.Thread(target=_check, args=(device, output, verdict), daemon=True)
    thread.start()
    thread.join(deadline)
    if thread.is_alive():
        verdict[0] = f"a guest did not {_missing(output)} in {deadline:g} s"
    if verdict[0]:
        print(verdict[0], file=sys.stderr, flush=True)
    os._exit(bool(verdict[0]))


if __name__ == "__main__":
    main()
