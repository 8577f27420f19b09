"""A bus whose answers to GetConnectionCredentials have a security label, as on a host with an LSM.

It stands between one program and a real bus, and passes every message and descriptor on as it is,
in both directions, but for those answers: there LinuxSecurityLabel is added, by a table in a file
of JSON, {unique name: label in hexadecimal}. Who isn't in the table has no such key. A label of the
host's own is hidden.

Arguments: the descriptor of a listening socket, the path of the bus, the path of the table. It has
to run as the user that the program runs as, since that is who the bus takes it for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator

from vmbus.bus.layout import FIXED_HEADER, REPLY_SERIAL, UNIX_FDS
from vmbus.bus.unmarshal import header_fields

CALL, RETURN = 1, 2
SERIAL, MEMBER = 0, 3
LABEL = b"LinuxSecurityLabel\0"


def authenticate(program: socket.socket, bus: socket.socket) -> None:
    """Pass on the lines before the first message. All of them but the last have one answer."""
    while (line := read_line(program)) != b"BEGIN\r\n":
        bus.sendall(line)
        program.sendall(read_line(bus))
    bus.sendall(line)


def read_line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\r\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionResetError
        line += byte
    return line


def messages(sock: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
    """Each message, and the descriptors that belong to it."""
    data, fds = bytearray(), []
    while True:
        more, more_fds, _, _ = socket.recv_fds(sock, 1 << 16, 253)
        if not more:
            return
        data += more
        fds += more_fds
        while len(data) >= FIXED_HEADER and len(data) >= (size := size_of(data)):
            message = bytes(data[:size])
            del data[:size]
            count = header_fields(message).get(UNIX_FDS, 0)
            yield message, fds[:count]
            del fds[:count]


def order_of(message: bytes | bytearray) -> str:
    return "<" if message[0] == ord("l") else ">"


def size_of(head: bytearray) -> int:
    body, _, fields = struct.unpack_from(order_of(head) + "III", head, 4)
    return int(FIXED_HEADER + fields + -fields % 8 + body)


def pass_on(message: bytes, fds: list[int], sock: socket.socket) -> None:
    sent = socket.send_fds(sock, [message], fds) if fds else 0
    for fd in fds:
        os.close(fd)
    sock.sendall(message[sent:])


class Pair:
    """One program's connection, and its counterpart on the bus."""

    def __init__(self, program: socket.socket, bus_path: str, table: str) -> None:
        self.program = program
        self.table = table
        self.bus = socket.socket(socket.AF_UNIX)
        self.bus.connect(bus_path)
        #: Whose credentials are asked for, by the call's serial.
        self.asked: dict[int, str] = {}

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            authenticate(self.program, self.bus)
            threading.Thread(target=self.to_program, daemon=True).start()
            for message, fds in messages(self.program):
                self.note(message)
                pass_on(message, fds, self.bus)
        self.hang_up()

    def to_program(self) -> None:
        with contextlib.suppress(OSError):
            for message, fds in messages(self.bus):
                pass_on(self.labelled(message), fds, self.program)
        self.hang_up()

    def hang_up(self) -> None:
        for sock in (self.program, self.bus):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def note(self, message: bytes) -> None:
        fields = header_fields(message)
        if message[1] == CALL and fields.get(MEMBER) == "GetConnectionCredentials":
            (size,) = struct.unpack_from(order_of(message) + "I", message, 4)
            self.asked[fields[SERIAL]] = message[-size + 4 : -1].decode()

    def labelled(self, message: bytes) -> bytes:
        name = self.asked.pop(header_fields(message).get(REPLY_SERIAL, 0), None)
        if name is None or message[1] != RETURN:
            return message
        with open(self.table) as file:
            label = json.load(file).get(name)
        message = message.replace(LABEL, LABEL.replace(b"Linux", b"Hosts"))
        return message if label is None else with_label(message, bytes.fromhex(label))


def with_label(message: bytes, label: bytes) -> bytes:
    """The same a{sv}, with one entry more."""
    number = struct.Struct(order_of(message) + "I")
    (size,) = number.unpack_from(message, 4)
    head, body = bytearray(message[:-size]), bytearray(message[-size:])
    body += bytes(-len(body) % 8)
    body += number.pack(len(LABEL) - 1) + LABEL + b"\2ay\0"
    body += bytes(-len(body) % 4)
    body += number.pack(len(label)) + label
    number.pack_into(body, 0, len(body) - 8)  # the entries begin on a boundary of 8
    number.pack_into(head, 4, len(body))
    return bytes(head + body)


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    while True:
        pair = Pair(listener.accept()[0], sys.argv[2], sys.argv[3])
        threading.Thread(target=pair.serve, daemon=True).start()


if __name__ == "__main__":
    main()
