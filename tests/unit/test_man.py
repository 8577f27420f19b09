"""Manual pages and reference: they say all that contract, commands and settings have."""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.contract import documented
from tests.rig import ROOT
from vmbus import errors
from vmbus.cli import exits
from vmbus.cli.main import cli
from vmbus.daemon import main
from vmbus.settings import LimitSettings, Settings

GENERATE = ROOT / "tools" / "generate"
PAGES = ["org.vmbus1.5", "vmbusctl.1", "vmbusd.toml.5", "vmbusd.8"]


def generated(name: str) -> str:
    done = subprocess.run(
        [sys.executable, GENERATE, name], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def source(page: str) -> str:
    """A page in roff."""
    written = ROOT / "man" / page
    return written.read_text() if written.exists() else generated(page)


def rendered(page: str) -> str:
    """A page as its reader sees it, with nothing hyphenated and each paragraph in one line."""
    options = ["-Tascii", "-man", "-rHY=0", "-rLL=2000n", "-P-cbou"]
    done = subprocess.run(
        ["groff", *options], input=source(page), capture_output=True, text=True, check=True
    )
    return done.stdout


def words(page: str) -> set[str]:
    return set(re.findall(r"[\w./-]*\w", rendered(page)))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_mistake_that_groff_knows_of(page: str) -> None:
    """groff formats every page without a warning."""
    done = subprocess.run(
        ["groff", "-ww", "-Tutf8", "-man", "-z"],
        input=source(page),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_member_of_the_interfaces_is_explained() -> None:
    """org.vmbus1(5) has each method and signal with its arguments, and each property."""
    shown = rendered("org.vmbus1.5")
    for name, interface in documented().items():
        assert f"\n{name}\n" in shown
        for kind in ("method", "signal"):
            for member in interface.iterfind(kind):
                arguments = [
                    f"{each.attrib['type']} {each.attrib['name']}"
                    for each in member.iterfind("arg")
                    if each.get("direction", "in") == "in"
                ]
                head = f"{member.attrib['name']}({', '.join(arguments)})"
                assert re.search(rf"^ +{re.escape(head)}.*?\n? +\w", shown, re.MULTILINE), head
        for member in interface.iterfind("property"):
            head = f"{member.attrib['name']} {member.attrib['type']}, "
            assert re.search(rf"^ +{re.escape(head)}.*?\n? +\w", shown, re.MULTILINE), head


def test_the_prose_of_the_interfaces_is_there_word_for_word() -> None:
    """org.vmbus1(5) has every paragraph of every comment, and what is said of each argument."""
    shown = " ".join(rendered("org.vmbus1.5").split())
    for file in (ROOT / "data" / "dbus-1" / "interfaces").glob("*.xml"):
        for comment in re.findall(r"<!--(.*?)-->", file.read_text(), re.DOTALL):
            _, *paragraphs = comment.strip().split("\n\n")
            for paragraph in paragraphs:
                assert " ".join(paragraph.split()) in shown
            for argument, text in re.findall(r"@(\w+): ((?:[^@\n]|\n +(?!@))+)", comment):
                if argument != "short_description":
                    assert f"{argument}: {' '.join(text.split())}" in shown


def test_every_error_is_named() -> None:
    """org.vmbus1(5) names every error that a caller can be told, and says what it means."""
    shown = " ".join(rendered("org.vmbus1.5").split())
    for each in errors.VMBusError.__subclasses__():
        assert f"{each.dbus_name} {inspect.getdoc(each)}" in shown


def test_the_reference_is_what_the_interfaces_say() -> None:
    """docs/reference.md is as `make reference` makes it, and has every member and every error."""
    text = (ROOT / "docs" / "reference.md").read_text()
    assert text == generated("reference.md"), "run `make reference`"
    for interface in documented().values():
        for kind, shown in (
            ("method", "#### {}\n"),
            ("signal", "#### {}\n"),
            ("property", "| `{}` |"),
        ):
            for member in interface.iterfind(kind):
                assert shown.format(member.attrib["name"]) in text
    for each in errors.VMBusError.__subclasses__():
        assert f"| `{each.dbus_name}` | {inspect.getdoc(each)} |" in text


def test_every_command_and_option_is_explained() -> None:
    """vmbusctl(1) has each command with its usage, its options, and what they are for."""
    shown = rendered("vmbusctl.1")
    sections = dict(re.findall(r"^   (\S+)(.*?)(?=^   \S|^\S)", shown, re.MULTILINE | re.DOTALL))
    shared = {option for parameter in cli.params for option in parameter.opts}
    for option in shared:
        assert option in words("vmbusctl.1")
    for name, command in cli.commands.items():
        section = " ".join(sections[name].split())
        assert command.help
        assert " ".join(command.help.split("\n\n")[0].split()) in section
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not shared & set(parameter.opts):
                assert f"{parameter.opts[-1]} " in section
                assert " ".join(str(parameter.help).split()) in section


def test_every_exit_status_is_explained() -> None:
    """vmbusctl(1) has those by reason, as the help has them, and all others."""
    shown = rendered("vmbusctl.1")
    for line in exits.table().splitlines():
        assert shown.count(line.strip()) == 2  # at run and at wait
    said = shown[shown.index("EXIT STATUS") :]
    for status in (exits.FAILED, exits.MISUSED, exits.BY_SIGNAL):
        assert f" {status} " in said


def test_every_option_of_the_service_is_explained() -> None:
    """vmbusd(8) has each option."""
    for parameter in main.params:
        assert set(parameter.opts) <= words("vmbusd.8")


@pytest.mark.parametrize("model", [Settings, LimitSettings])
def test_every_setting_is_explained(model: type[Settings] | type[LimitSettings]) -> None:
    """vmbusd.toml(5) has each setting with its default and a text."""
    shown = rendered("vmbusd.toml.5")
    for name, field in model.model_fields.items():
        found = re.search(rf"^ {{7}}{name}(?: = (.+))?\n? +(\w.*)", shown, re.MULTILINE)
        assert found, name
        if field.default_factory is None:
            assert found[1] == _as_toml(field.default)


def _as_toml(value: object) -> str:
    match value:
        case tuple():
            return f"[{', '.join(_as_toml(each) for each in value)}]"
        case str() | Path():
            return f'"{value}"'
        case int() | float():
            return str(value)
    pairs = (f"{key} = {number}" for key, number in vars(value).items())
    return f"{{ {', '.join(pairs)} }}"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_its_shell_takes(shell: str, tmp_path: Path) -> None:
    """The completion scripts are of the shell whose directory they go to."""
    script = tmp_path / "script"
    script.write_text(generated({"bash": "vmbusctl", "zsh": "_vmbusctl"}[shell]))
    assert f"_VMBUSCTL_COMPLETE={shell}_complete" in script.read_text()
    if shell == "bash":
        subprocess.run(["bash", "-n", script], check=True)
    else:
        assert script.read_text().startswith("#compdef vmbusctl\n")
