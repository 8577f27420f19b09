"""Files by descriptor and by path: what is taken, what is refused, and that nothing stays open."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.taps import open_tap
from vmbus.files import FilePolicy, Handle, OpenFile

pytestmark = pytest.mark.usefixtures("files_closed")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image directory with one image."""
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "disk").write_bytes(b"image")
    return directory


@pytest.fixture
def policy(images: Path) -> Iterator[FilePolicy]:
    policy = FilePolicy((images,))
    yield policy
    policy.close_all()


def _refusal(policy: FilePolicy, source: object, *, writable: bool = False) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        policy.open(source, writable=writable)
    assert policy.opened == []
    return str(refused.value)


def _mode(file: OpenFile) -> int:
    return fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_ACCMODE


# By descriptor


@pytest.mark.parametrize(
    ("flags", "writable", "knows_writable"),
    [
        (os.O_RDONLY, False, False),
        (os.O_RDWR, False, True),
        (os.O_RDWR, True, True),
        (os.O_RDWR | os.O_APPEND, False, True),
    ],
)
def test_descriptor_is_taken_as_it_is(
    tmp_path: Path, flags: int, writable: bool, knows_writable: bool
) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    fd = os.open(tmp_path / "file", flags)
    policy = FilePolicy(())
    try:
        file = policy.open(Handle(fd), writable=writable)
        assert os.path.sameopenfile(file.fd, fd)
        assert (file.size, file.writable) == (5, knows_writable)
    finally:
        os.close(fd)
        policy.close_all()


def test_descriptor_is_duplicated_and_not_inheritable(tmp_path: Path) -> None:
    policy = FilePolicy(())
    with (tmp_path / "file").open("wb+") as given:
        file = policy.open(Handle(given.fileno()), writable=False)
        assert file.fd != given.fileno()
        assert not os.get_inheritable(file.fd)
    # The caller's is closed by now, ours isn't.
    assert os.fstat(file.fd).st_size == 0
    policy.close_all()


@pytest.mark.parametrize(
    ("flags", "writable", "says"),
    [
        (os.O_WRONLY, False, "write-only; open it for reading"),
        (os.O_PATH, False, "O_PATH only; open it for reading"),
        (os.O_PATH, True, "O_PATH only; open it for reading"),
        (
            os.O_RDONLY,
            True,
            "open read-only; a writable disk needs it open for reading and writing",
        ),
        (os.O_WRONLY, True, "open write-only; a writable disk needs"),
        (os.O_RDWR | os.O_APPEND, True, "open read and write, appending; a writable disk needs"),
        (os.O_WRONLY | os.O_APPEND, True, "open write-only, appending; a writable disk needs"),
    ],
)
def test_descriptor_in_the_wrong_mode_is_refused(
    policy: FilePolicy, images: Path, flags: int, writable: bool, says: str
) -> None:
    fd = os.open(images / "disk", flags)
    try:
        assert says in _refusal(policy, Handle(fd), writable=writable)
    finally:
        os.close(fd)


def _pipe() -> list[int]:
    return list(os.pipe())


def _socketpair() -> list[int]:
    return [each.detach() for each in socket.socketpair()]


def _directory() -> list[int]:
    return [os.open("/", os.O_RDONLY)]


def _character_device() -> list[int]:
    return [os.open("/dev/zero", os.O_RDWR)]


def _event() -> list[int]:
    return [os.eventfd(0)]


@pytest.mark.parametrize(
    "make", [_pipe, _socketpair, _directory, _character_device, _event], ids=lambda f: f.__name__
)
def test_descriptor_of_something_else_is_refused(policy: FilePolicy, make: object) -> None:
    assert callable(make)
    fds = make()
    try:
        said = _refusal(policy, Handle(fds[0]))
    finally:
        for fd in fds:
            os.close(fd)
    assert said == "it must be a regular file or a block device"


# By path


@pytest.mark.parametrize("writable", [False, True])
def test_path_below_an_image_directory_is_opened_in_the_mode_needed(
    policy: FilePolicy, images: Path, writable: bool
) -> None:
    file = policy.open(f"{images}/disk", writable=writable)
    assert _mode(file) == (os.O_RDWR if writable else os.O_RDONLY)
    assert (file.writable, file.size, os.pread(file.fd, 9, 0)) == (writable, 5, b"image")
    assert not os.get_inheritable(file.fd)


def test_path_may_go_through_links_that_stay_inside(policy: FilePolicy, images: Path) -> None:
    (images / "deep").mkdir()
    (images / "deep" / "link").symlink_to("../disk")
    (images / "absolute").symlink_to(images / "deep")
    file = policy.open(f"{images}/absolute/link", writable=False)
    assert os.path.samestat(os.fstat(file.fd), (images / "disk").stat())


def test_image_directory_may_itself_be_a_link(tmp_path: Path, images: Path) -> None:
    (tmp_path / "link").symlink_to(images)
    policy = FilePolicy((tmp_path / "none", tmp_path / "link"))
    for path in (f"{tmp_path}/link/disk", f"{images}/disk"):
        policy.open(path, writable=False)
    assert len(policy.opened) == 2
    policy.close_all()


def test_dots_that_stay_inside_do_no_harm(policy: FilePolicy, images: Path) -> None:
    (images / "deep").mkdir()
    policy.open(f"{images}/deep/.././/disk", writable=False)
    assert len(policy.opened) == 1


def test_without_image_directories_any_path_will_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    policy = FilePolicy(None)
    policy.open(f"{tmp_path}/file", writable=True)
    assert len(policy.opened) == 1
    policy.close_all()


@pytest.mark.parametrize("path", ["disk", "./disk", "", "images/disk", "~/disk", "fd:3"])
@pytest.mark.parametrize("anywhere", [False, True])
def test_relative_path_is_refused(images: Path, path: str, anywhere: bool) -> None:
    policy = FilePolicy(None if anywhere else (images,))
    assert _refusal(policy, path) == f"the path {path} must be absolute"


def test_path_with_a_nul_is_refused(policy: FilePolicy, images: Path) -> None:
    assert "must be absolute" in _refusal(policy, f"{images}/disk\0.img")


@pytest.mark.parametrize(
    "path",
    [
        "{images}/../secret",
        "{images}/./../images/../secret",
        "{images}/none/../../secret",
        "/{images}/disk",  # two slashes in front may mean another place than one
        "{images}-too/disk",
        "{images}/link",
        "{images}/way/secret",
        "{images}/way/images/../secret",
        "{images}/passwd",
        "/etc/passwd",
        "/proc/self/fd/0",
        "/",
    ],
)
def test_path_that_leads_outside_is_refused(
    policy: FilePolicy, tmp_path: Path, images: Path, path: str
) -> None:
    (tmp_path / "secret").touch()
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too" / "disk").touch()
    (images / "link").symlink_to("../secret")
    (images / "way").symlink_to("..")
    (images / "passwd").symlink_to("/etc/passwd")
    path = path.format(images=images)
    said = f"{path} is not below an image directory ({images}); pass an open file instead"
    assert _refusal(policy, path) == said


@pytest.mark.parametrize("directory", ["{tmp}", "{tmp}/closed", "{images}/way", "{images}/way/way"])
def test_refusal_does_not_tell_what_exists_outside(
    policy: FilePolicy, tmp_path: Path, images: Path, directory: str
) -> None:
    """What exists, what doesn't, and what is of another kind are refused in the same words."""
    (tmp_path / "a-file").touch()
    (tmp_path / "a-folder").mkdir()
    os.mkfifo(tmp_path / "a-pipe")
    (tmp_path / "way").symlink_to(".")
    (images / "way").symlink_to("..")
    base = directory.format(tmp=tmp_path, images=images)
    names = ("a-file", "nothing", "a-folder", "a-pipe", "a-file/below", "nothing/below")
    said = {_refusal(policy, f"{base}/{name}").replace(name, "NAME") for name in names}
    assert said == {
        f"{base}/NAME is not below an image directory ({images}); pass an open file instead"
    }


def test_link_to_outside_does_not_tell_whether_its_target_exists(
    policy: FilePolicy, tmp_path: Path, images: Path
) -> None:
    (tmp_path / "secret").touch()
    (images / "link").symlink_to(tmp_path / "secret")
    there = _refusal(policy, f"{images}/link")
    (tmp_path / "secret").unlink()
    assert _refusal(policy, f"{images}/link") == there


def test_where_no_image_directory_is_set_every_path_is_refused(images: Path) -> None:
    assert "(none is set)" in _refusal(FilePolicy(()), f"{images}/disk")


def test_missing_file_inside_is_said_to_be_missing(policy: FilePolicy, images: Path) -> None:
    assert _refusal(policy, f"{images}/none") == f"{images}/none: No such file or directory"


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "device"])
def test_path_of_something_else_is_refused(policy: FilePolicy, images: Path, kind: str) -> None:
    """At once, too: to open a pipe that nobody writes to would take for ever."""
    path = images / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    else:
        path, policy = Path("/dev/null"), FilePolicy(None)
    assert _refusal(policy, str(path)) == "it must be a regular file or a block device"


def test_program_that_runs_can_be_read_and_not_written(policy: FilePolicy, images: Path) -> None:
    """A file which the kernel lets nobody write to, root included."""
    (images / "program").symlink_to("/proc/self/exe")
    policy.image_directories = None
    policy.open(f"{images}/program", writable=False)
    policy.close_all()
    policy.opened.clear()
    assert re.search(
        ": Text file busy for writing$", _refusal(policy, f"{images}/program", writable=True)
    )


def test_long_path_is_shortened_in_the_refusal(policy: FilePolicy, images: Path) -> None:
    long = "x/" * 50_000
    for path in (long, f"/{long}", f"{images}/{long}"):
        assert len(_refusal(policy, path)) < 500 + len(str(images))


@pytest.mark.parametrize("source", [None, 3, True, b"/etc/passwd", ["/x"], {"fd": 3}, 1.5])
def test_neither_descriptor_nor_path_is_refused(policy: FilePolicy, source: object) -> None:
    assert _refusal(policy, source) == "must be an open file (h) or a path (s)"


# Closing


def test_close_is_done_once(policy: FilePolicy, images: Path) -> None:
    """A number that was closed may be another file's by the next close."""
    file = policy.open(f"{images}/disk", writable=False)
    number = file.fd
    file.close()
    with open("/dev/null") as other:
        os.dup2(other.fileno(), number)
    file.close()
    policy.close_all()
    os.close(number)  # still open: neither has closed it


# From one service to the next


def test_file_that_was_lost_is_known_by_all_but_its_descriptor(
    policy: FilePolicy, images: Path
) -> None:
    file = policy.open(f"{images}/disk", writable=True)
    file.check_open()
    facts = file.facts()
    assert facts == {"name": f"{images}/disk", "writable": True, "size": 5, "held": True}
    lost = OpenFile.lost(facts)
    assert (lost.fd, lost.facts()) == (-1, facts)
    lost.close()
    says = rf"^{images}/disk is not open any more, since the service was restarted$"
    with pytest.raises(ValueError, match=says):
        lost.check_open()


def test_file_that_was_closed_was_held_all_the_same(policy: FilePolicy, images: Path) -> None:
    """A VM that runs has closed its files, and is written down after that."""
    file = policy.open(f"{images}/disk", writable=False)
    file.close()
    assert OpenFile.lost(file.facts()).held


def test_name_of_a_tap_is_no_file_that_can_be_lost() -> None:
    OpenFile.lost(OpenFile(-1, "tap0", writable=True, size=0).facts()).check_open()


VMBUS, ALICE, BOB = 64001, 64002, 64003


@pytest.mark.parametrize(
    ("service", "caller", "owner", "says"),
    [
        (VMBUS, 0, VMBUS, ""),
        (VMBUS, VMBUS, VMBUS, ""),
        (VMBUS, ALICE, VMBUS, f"is uid {VMBUS}; pass an open tap device"),
        (VMBUS, ALICE, BOB, f"is uid {BOB}; pass an open tap device"),
        (VMBUS, ALICE, ALICE, "the service may not open"),
        (VMBUS, 0, ALICE, "the service may not open"),
        (VMBUS, 0, None, "the service may not open"),
    ],
)
def test_tap_that_is_named_is_the_callers_and_the_services_to_open(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    service: int,
    caller: int,
    owner: int | None,
    says: str,
) -> None:
    """The service opens it with its own rights, which are not lent to others; root may name any."""
    name = f"vmbus{os.getpid()}"
    policy = FilePolicy((images,), caller)
    with open_tap(name, owner=owner):
        monkeypatch.setattr(os, "getuid", lambda: service)
        if says:
            with pytest.raises(ValueError, match=says):
                policy.open_tap(name)
        else:
            assert policy.open_tap(name).name == name
