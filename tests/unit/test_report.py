"""What guests may say of themselves, and all that they might send instead."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.guest.report import MAX_LINE, Decoder, Payload, Report

LINES = [
    *(b"READY=1", b"STOPPING=1", b"STATUS=up", b"STATUS=", b"EXIT_STATUS=3", b"ERRNO=2"),
    *(b"X_VMBUS_PAYLOAD=started", b"WATCHDOG=1", b"READY=0", b"=", b"", b"STATUS", b"\xff\0\r"),
    *(b"STATUS=" + b"x" * MAX_LINE, b"EXIT_STATUS=" + b"9" * 5000),
]


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (b"READY=1", Report(Payload.READY)),
        (b"READY=1\r", Report(Payload.READY)),
        (b"X_VMBUS_PAYLOAD=started", Report(Payload.STARTED)),
        (b"STOPPING=1", Report(Payload.FINISHED)),
        (b"EXIT_STATUS=0", Report(Payload.FINISHED, exit_status=0)),
        (b"EXIT_STATUS=255", Report(Payload.FINISHED, exit_status=255)),
        (b"STATUS=Booting (1/2)", Report(status="Booting (1/2)")),
        (b"STATUS=a=b", Report(status="a=b")),
        (b"STATUS=", Report(status="")),
        (b"STATUS=\x1b[31mred\0 \xff\xfe", Report(status="[31mred  \ufffd\ufffd")),
        (b"ERRNO=2", Report(error="error 2: No such file or directory")),
        (b"ERRNO=4095", Report(error="error 4095: Unknown error 4095")),
    ],
)
def test_line_that_is_understood(line: bytes, report: Report) -> None:
    """As in sd_notify(3), and one key of our own."""
    assert Decoder().feed(line + b"\n") == report


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"=", b"READY", b"READY=", b"READY=0", b"READY=2", b"READY=11", b" READY=1"),
        *(b"ready=1", b"READY=1 ", b"STOPPING=0", b"X_VMBUS_PAYLOAD=finished", b"WATCHDOG=1"),
        *(b"EXIT_STATUS=", b"EXIT_STATUS=-1", b"EXIT_STATUS=256", b"EXIT_STATUS=0x1"),
        *(b"EXIT_STATUS=1_0", b"EXIT_STATUS=\xd9\xa3", b"EXIT_STATUS=" + b"1" * 4000),
        *(b"ERRNO=", b"ERRNO=0", b"ERRNO=-2", b"ERRNO=4096", b"ERRNO=" + b"9" * 4000),
        *(b"\0READY=1", b"FDSTORE=1", b"X_SYSTEMD_UNIT_ACTIVE=multi-user.target"),
        b"STATUS=" + b"x" * MAX_LINE,
    ],
)
def test_line_that_says_nothing(line: bytes) -> None:
    """It does no harm to what comes after it, either."""
    assert Decoder().feed(line + b"\n") == Report()
    assert Decoder().feed(line + b"\nREADY=1\n") == Report(Payload.READY)


def test_status_is_one_line_of_bounded_length() -> None:
    status = Decoder().feed(b"STATUS=" + b"x" * 4000 + b"\n").status
    assert status == "x" * 500


def test_several_lines_at_once() -> None:
    """The last text counts, the first exit status, and each step that the payload has got to."""
    said = b"READY=1\nSTATUS=a\nEXIT_STATUS=4\nSTATUS=b\nEXIT_STATUS=5\nREADY=1\n"
    assert Decoder().feed(said) == Report(
        Payload.FINISHED, exit_status=4, status="b", passed=(Payload.READY,)
    )


def test_last_line_needs_no_end_of_its_own() -> None:
    decoder = Decoder()
    assert decoder.feed(b"READY=1") == Report()
    assert decoder.end() == Report(Payload.READY)
    assert decoder.end() == Report()


def test_line_without_end_takes_no_memory() -> None:
    decoder = Decoder()
    for _ in range(1000):
        assert decoder.feed(b"STATUS=" * 1000) == Report()
        assert len(decoder._line) <= MAX_LINE
    assert decoder.feed(b"\nREADY=1\n") == Report(Payload.READY)


@given(
    st.lists(st.one_of(st.sampled_from(LINES), st.binary(max_size=40))).map(b"\n".join),
    st.lists(st.integers(0, 10_000)),
)
def test_it_does_not_matter_where_the_bytes_are_cut(said: bytes, cuts: list[int]) -> None:
    """Whatever is said, and in however many pieces: never an error, always the same in the end."""
    whole, pieces = Decoder(), Decoder()
    expected = _merged([whole.feed(said), whole.end()])
    edges = [0, *sorted(min(cut, len(said)) for cut in cuts), len(said)]
    reports = [pieces.feed(said[a:b]) for a, b in pairwise(edges)]
    assert _merged([*reports, pieces.end()]) == expected


def _merged(reports: list[Report]) -> Report:
    """What they come to, one after the other."""
    payload, exit_status, status, error = Payload.NONE, None, None, None
    for report in reports:
        payload = payload.then(report.payload)
        exit_status = report.exit_status if exit_status is None else exit_status
        status = status if report.status is None else report.status
        error = error if report.error is None else report.error
    return Report(payload, exit_status, status, error)


@given(st.lists(st.sampled_from(Payload)))
def test_payload_goes_forward_only(reported: list[Payload]) -> None:
    payload = Payload.NONE
    order = list(Payload)
    for each in reported:
        before, payload = payload, payload.then(each)
        assert order.index(payload) == max(order.index(before), order.index(each))
