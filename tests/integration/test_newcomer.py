"""What a newcomer does, who has no rights, no KVM, a wheel, a guest, and the guide for clients."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import DEADLINE, ROOT, end_group

USER = "nobody"
GUIDE = ROOT / "docs" / "clients.md"
#: Hides KVM, where there is one that everybody may use, and gives up all rights.
_BECOME = f"""
[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
exec setpriv --reuid={USER} --regid=nogroup --clear-groups bash -euc "$0"
"""
#: Once more as the guide has it, so that a test can see that it does.
INSTALL = """\
python3 -m venv --system-site-packages venv
. venv/bin/activate
pip install "$VMBUS[mock]"
"""


def _wheel(directory: Path) -> Path:
    """The wheel, as pip builds it from the project."""
    command = ["wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", str(directory)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, str(ROOT)],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = directory.glob("vmbus-*.whl")
    return wheel


def _lend_dependencies(home: Path) -> None:
    """Have a user's Python find what else is installed with this one, so that nobody downloads."""
    major, minor = sys.version_info[:2]
    lent = home / ".local" / "lib" / f"python{major}.{minor}" / "site-packages"
    lent.mkdir(parents=True)
    for place in (Path(each) for each in sys.path if each.endswith("/site-packages")):
        for entry in place.iterdir():
            if not entry.name.startswith("vmbus") and entry.suffix != ".pth":
                with contextlib.suppress(FileExistsError):
                    (lent / entry.name).symlink_to(entry)


class Newcomer:
    """A user who may write in one directory, and who has what the guide says there must be."""

    def __init__(self, home: Path, guest: tuple[Path, Path]) -> None:
        self.home = home
        wheel = _wheel(home)
        for file in guest:
            shutil.copy(file, home)
        _lend_dependencies(home)
        for path in (home, *home.iterdir()):
            shutil.chown(path, USER, "nogroup")
        self._environment = {
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
            "VMBUS": str(wheel),
        }

    def types(self, script: str, *, deadline: float = DEADLINE) -> str:
        """What these commands print on either stream; none may fail."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-euc", _BECOME, script],
                env=self._environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(deadline)
            finally:
                end_group(process)
            output.seek(0)
            said = output.read()
        assert status == 0, said
        return said


@pytest.fixture(scope="module")
def newcomer(guest_files: tuple[Path, Path]) -> Iterator[Newcomer]:
    """One who has installed vmbus, and has the example of a tool with its tests."""
    with tempfile.TemporaryDirectory(prefix="vmbus-") as home:
        for name in ("supervise.py", "test_supervise.py"):
            shutil.copy(ROOT / "examples" / name, home)
        found = Newcomer(Path(home), guest_files)
        found.types(INSTALL, deadline=3 * DEADLINE)
        yield found


def _blocks(section: str) -> list[str]:
    """The commands in a section of the guide."""
    (text,) = re.findall(rf"^## {section}\n(.*?)^## ", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_a_client_is_written_tested_and_run_from_the_guide_alone(newcomer: Newcomer) -> None:
    """By a user without rights, with no KVM: every line of the guide's first section, in order."""
    install, *others = _blocks("From nothing")
    assert install == INSTALL
    said = [newcomer.types(f". venv/bin/activate\n{each}", deadline=60) for each in others]
    assert re.search(r"\b3 passed in ", said[1]), said[1]
    assert "KVM is not usable" in said[2]
    assert "status 3" in said[2].splitlines(), said[2]


def test_an_example_is_tested_with_what_the_wheel_brings(newcomer: Newcomer) -> None:
    """The mock and its fixtures come with it; the project's tree is not needed."""
    said = newcomer.types("venv/bin/python3 -m pytest test_supervise.py")
    assert re.search(r"\b2 passed in ", said), said
    for module in ("vmbus", "vmbus.testing"):
        place = newcomer.types(f"venv/bin/python3 -c 'import {module} as m; print(m.__file__)'")
        assert place.startswith(f"{newcomer.home}/venv/"), place
    template = Path(newcomer.types("venv/bin/python3 -m vmbus.testing").strip())
    assert template.read_bytes() == (ROOT / "data" / "dbusmock" / "vmbus.py").read_bytes()


#: What a type checker is to find right; and wrong, where a comment says so.
TYPED = """\
import asyncio
import socket
from pathlib import Path
from typing import BinaryIO, assert_type

from vmbus import errors
from vmbus.client import VM, About, Death, Died, Disk, Snapshot, VMBus
from vmbus.testing import Mock


async def main() -> None:
    disk: Disk = {"image": Path("root.img"), "writable": True}
    async with VMBus.system(interactive=True) as bus:
        assert_type(await bus.about(), About)
        with open("vmlinuz", "rb") as kernel:
            vm = await bus.create(kernel=kernel, memory_mib=512, disks=[disk])
        assert_type(vm, VM)
        await bus.create(kernel=3, initrd="initrd", bios=Path("bios"))
        await bus.create(kernel="vmlinuz", memory_mib="512")  # type: ignore[arg-type]
        await bus.create(kernel="vmlinuz", colour="red")  # type: ignore[call-arg]
        await bus.create(kernel="vmlinuz", disks=[{"file": "x"}])  # type: ignore[typeddict-item]
        await vm.start(1)  # type: ignore[call-arg]
        assert_type(await vm.wait(), Death)
        assert_type(await vm.properties(), Snapshot)
        assert_type((await vm.properties()).payload_exit_status, int)
        assert_type(await vm.open_console(), socket.socket)
        assert_type(await vm.open_log(), BinaryIO)
        assert_type(await bus.vms(), list[Snapshot])
        try:
            await vm.stop(timeout=2.5)
        except errors.InvalidState as error:
            assert_type(error.dbus_name, str)
        async for death in bus.deaths():
            assert_type(death, Died)
            assert_type(death.reason, str)
            death.because  # type: ignore[attr-defined]


def control(mock: Mock) -> None:
    mock.Die("/org/vmbus1/vm/1", "crash", 1)
    mock.Die("/org/vmbus1/vm/1", "crash")  # type: ignore[call-arg]


asyncio.run(main())
"""


def test_a_users_program_is_checked_against_the_types(newcomer: Newcomer) -> None:
    """Strictly, from outside of the project: right uses pass, and each wrong one is found."""
    (newcomer.home / "typed.py").write_text(TYPED)
    files = "typed.py supervise.py test_supervise.py"
    said = newcomer.types(f"venv/bin/python3 -m mypy --strict {files}", deadline=120)
    assert said == "Success: no issues found in 3 source files\n"
