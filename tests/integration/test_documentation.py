"""What the documentation shows is true: every command runs, every file is taken, every link leads.

tests/pages.py says how a block of code is told to be one or the other. Those of one section are
one story, on a bus of their own. Where the story starts a service itself, that boots a real guest;
others find one that runs, whose VMs are stand-ins. tests/system/test_documentation.py runs what is
for root.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import PAGES, Block, all_blocks, is_as_shown, printed
from tests.polkit import polkit
from tests.rig import CROSVM, DEADLINE, ROOT, Rig, Service, end_group, guest, running
from tests.vmbusmock import data_directory
from vmbus.cli.main import cli
from vmbus.reasons import Reason
from vmbus.settings import load_settings

#: Stories without a service that was there before: their own, or a mock.
_OWN_SERVICE = re.compile(r"^vmbusd |-m dbusmock ", re.MULTILINE)
_MARK = "\x01"


def _stories() -> dict[str, list[Block]]:
    """What is run here, by page and section."""
    found: dict[str, list[Block]] = {}
    for block in all_blocks():
        if (block.prompt == "$" or block.is_local) and not block.proof:
            name = f"{block.page.relative_to(ROOT)}: {block.section}"
            found.setdefault(name, []).append(block)
    return found


STORIES = _stories()


class Story:
    """A directory that looks like the project's own, and a bus, for the blocks of a section."""

    def __init__(
        self, rig: Rig, told: list[Block], directory: Path, guest_files: tuple[Path, Path]
    ) -> None:
        self._rig = rig
        self._told = told
        self._directory = directory / "vmbus"
        self._data = data_directory(directory / "share")
        self._log = directory / "output"
        serves = not any(_OWN_SERVICE.search(block.commands) for block in told)
        self._lay_out(*guest_files, real=not serves)
        if serves:
            Service(self._rig, {"crosvm": str(CROSVM), "kvm": "on"})

    def _lay_out(self, kernel: Path, initrd: Path, *, real: bool) -> None:
        self._directory.mkdir()
        for entry in ROOT.iterdir():
            if entry.name != "build" and not entry.name.startswith("."):
                (self._directory / entry.name).symlink_to(entry)
        (self._directory / "build").mkdir()
        (self._directory / "build" / "guest").symlink_to(kernel.parent)
        if real:
            (self._directory / "vmlinuz").symlink_to(kernel)
        else:
            made = guest(self._directory, console="hello\n", then={"exit": 0, "after": 0.2})
            made.rename(self._directory / "vmlinuz")
        (self._directory / "initrd").symlink_to(initrd)
        (self._directory / "root.img").write_bytes(bytes(1 << 20))
        # The loop's scope is what newer versions of pytest-asyncio take unasked.
        lines = ["filterwarnings = error", "asyncio_default_fixture_loop_scope = function"]
        (self._directory / "pytest.ini").write_text("\n".join(["[pytest]", *lines]))

    @property
    def _environment(self) -> dict[str, str]:
        scripts = Path(sys.executable).parent
        return {
            **self._rig.environment,
            # The same for those who ask the system's service.
            "DBUS_SYSTEM_BUS_ADDRESS": self._rig.address,
            "DESTDIR": str(self._directory / "installed"),
            "LC_ALL": "C.UTF-8",
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "XDG_DATA_DIRS": str(self._data),
        }

    def _command(self, number: int, block: Block) -> str:
        if block.is_local:
            return f"cat >{block.file} <<'END OF FILE'\n{block.text}END OF FILE\n"
        if block.language != "python":
            return block.commands
        tests = re.search(r"^(async )?def test_", block.text, re.MULTILINE)
        file = self._directory / f"{'test_' if tests else ''}block{number}.py"
        file.write_text(block.text)
        pytest = "-m pytest -q -p no:cacheprovider -c pytest.ini"
        return f"python3 {pytest if tests else '-W error'} {file.name}\n"

    def play(self) -> list[str]:
        """Run all of it; what each block has printed."""
        told = [self._command(number, block) for number, block in enumerate(self._told)]
        script = "".join(f"printf '\\001'\n{each}" for each in told)
        # Into a file, since programs of it may outlive it.
        with self._log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euc", script],
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(3 * DEADLINE)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_group(process)
        said = self._log.read_text("utf-8", "replace").split(_MARK)[1:]
        last = self._told[len(said) - 1]
        assert status == 0, f"{last}: status {status}, having said: {said[-1]}"
        return said

    def close(self) -> None:
        """End the VMs of its own service."""
        for pid, _ in running(self._rig.directory / "vmbus"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", STORIES)
def test_what_a_page_shows_is_what_happens(
    name: str, tmp_path: Path, guest_files: tuple[Path, Path]
) -> None:
    """All commands and programs of a section succeed, and print what the page says they do."""
    with (
        contextlib.closing(Rig(system=False)) as rig,
        contextlib.closing(Story(rig, STORIES[name], tmp_path, guest_files)) as story,
    ):
        for block, said in zip(STORIES[name], story.play(), strict=True):
            shown = printed(block)
            assert shown is None or is_as_shown(said, shown), f"{block} prints:\n{said}"


def _settings(block: Block, directory: Path) -> None:
    file = directory / "vmbusd.toml"
    file.write_text(block.text)
    load_settings(file)


def _unit(block: Block, directory: Path) -> None:
    """A drop-in, for one of the project's units."""
    place = Path(block.file)
    unit = place.parent.name.removesuffix(".d")
    (directory / unit).write_bytes((ROOT / "data" / "systemd" / unit).read_bytes())
    (directory / place.parent.name).mkdir()
    (directory / place.parent.name / place.name).write_text(block.text)
    verify = ["systemd-analyze", "verify", "--man=no", str(directory / unit)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    about = [line for line in done.stderr.splitlines() if place.name in line]
    assert about == []


def _rules(block: Block, directory: Path) -> None:
    """What they do is in test_authority.py; here the real polkitd takes them."""
    with contextlib.closing(Rig(system=True)) as rig, polkit(rig) as polkitd:
        polkitd.rules(block.text)


#: Who reads a file, by its name.
READERS = {
    "/etc/vmbus/vmbusd.toml": _settings,
    "/etc/polkit-1/rules.d/*.rules": _rules,
    "/etc/systemd/system/*.d/*.conf": _unit,
}
FILES = [block for block in all_blocks() if block.file and not block.is_local]


@pytest.mark.parametrize("block", FILES, ids=str)
def test_a_file_that_is_shown_is_taken_by_who_reads_it(block: Block, tmp_path: Path) -> None:
    """Settings, rules of polkit's and units have no mistake that their reader knows of."""
    (reader,) = (each for name, each in READERS.items() if Path(block.file).match(name))
    reader(block, tmp_path)


def _lines(text: str) -> set[str]:
    """What a shell sees of it."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines())
    return {" ".join(line.split()) for line in lines} - {""}


@pytest.mark.parametrize("block", [each for each in all_blocks() if each.proof], ids=str)
def test_what_is_run_elsewhere_is_there(block: Block) -> None:
    """All lines of a block stand in the file that is said to test it."""
    assert _lines(block.commands) <= _lines((ROOT / block.proof).read_text())


def test_no_block_is_of_a_kind_that_nobody_tests() -> None:
    """Each is run, read, run elsewhere, or a drawing, which has no commands."""
    for block in all_blocks():
        drawing = block.language == "text" and not re.search(r"^[$#] ", block.text, re.MULTILINE)
        assert block.prompt or block.file or block.proof or drawing, block


# In the text


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _named_commands() -> list[str]:
    pattern = re.compile(r"`vmbusctl ([^`]*)`")
    return sorted({each for page in PAGES for each in pattern.findall(_prose(page))})


@pytest.mark.parametrize("arguments", _named_commands())
def test_a_command_that_is_named_exists(arguments: str) -> None:
    """Each vmbusctl that the text names has a command of that name, with those options."""
    words = [word.partition("=")[0] for word in shlex.split(arguments)]
    options = {option for each in cli.params for option in each.opts} | {"--help"}
    names = [word for word in words if not word.startswith("-")]
    if names:
        command = cli.commands[names[0]]
        options |= {
            option for each in command.params for option in (*each.opts, *each.secondary_opts)
        }
    assert {word for word in words if word.startswith("-")} <= options


def test_a_target_of_make_that_is_named_exists() -> None:
    """Each `make` that the text names is one of the front door's."""
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)`", _prose(page))}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named and named <= targets


def _named_tests() -> list[str]:
    found = (re.findall(r"`(test_\w+\.py(?:::\w+)?)`", _prose(page)) for page in PAGES)
    return sorted(set(itertools.chain.from_iterable(found)))


@pytest.mark.parametrize("named", _named_tests())
def test_a_test_that_is_named_exists(named: str) -> None:
    """What is said to be shown by a test has that test."""
    file, _, function = named.partition("::")
    places = list((ROOT / "tests").rglob(file))
    assert places
    assert any(f"def {function}(" in place.read_text() for place in places) or not function


@functools.cache
def _texts() -> list[str]:
    """Every string in the code, each in one piece."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "vmbus").rglob("*.py")]
    nodes = itertools.chain.from_iterable(map(ast.walk, trees))
    return [
        each.value
        for each in nodes
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]


def test_an_error_that_is_explained_is_one_that_is_said() -> None:
    """Each line in the administrator's table of errors is made of texts that the code has."""
    page = (ROOT / "docs" / "administration.md").read_text()
    _, _, table = page.partition("| what is said |")
    lines = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert lines
    for line in lines:
        for piece in filter(None, map(str.strip, line.split("…"))):
            assert any(piece in text for text in _texts()), piece


def test_every_reason_to_die_is_explained() -> None:
    """docs/vmms.md says of each how it comes about."""
    page = (ROOT / "docs" / "vmms.md").read_text()
    _, _, table = page.partition("## Reasons")
    table, _, _ = table.partition("\n## ")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == set(Reason)


@functools.cache
def _anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as hosts of repositories call them."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading).lower() for heading in headings)
    return {each.strip().replace(" ", "-") for each in words}


def _links() -> Iterator[tuple[Path, str]]:
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
            if "://" not in target:
                yield page, target


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    """Files that a page links to exist, and so do the headings."""
    for origin, target in _links():
        if origin == page:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file), target


def test_every_page_can_be_found() -> None:
    """docs/README.md, which says what to read in which order, leaves none out."""
    linked = {target for page, target in _links() if page == ROOT / "docs" / "README.md"}
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or page.name in linked, page
