"""The contract in its several places: XML, code, policies, build files. And who imports whom."""

from __future__ import annotations

import ast
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import vmbus
from vmbus import errors
from vmbus.bus.authority import Access
from vmbus.bus.contract import interfaces
from vmbus.bus.methods import TABLE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vmbus"
DATA = ROOT / "data"
INTERFACES = sorted((DATA / "dbus-1" / "interfaces").glob("*.xml"))
MODULES = sorted(PACKAGE.rglob("*.py"))
MANAGER, VM = "org.vmbus1.Manager", "org.vmbus1.VirtualMachine"
FREEDESKTOP = "org.freedesktop.DBus."
STANDARD = {
    (FREEDESKTOP + "Properties", "Get"),
    (FREEDESKTOP + "Properties", "GetAll"),
    (FREEDESKTOP + "Properties", "Set"),
    (FREEDESKTOP + "Introspectable", "Introspect"),
    (FREEDESKTOP + "ObjectManager", "GetManagedObjects"),
    (FREEDESKTOP + "Peer", "Ping"),
    (FREEDESKTOP + "Peer", "GetMachineId"),
}


def _tree(path: Path) -> ElementTree.Element:
    """The root element of a file, comments among its children."""
    builder = ElementTree.TreeBuilder(insert_comments=True)
    return ElementTree.fromstring(path.read_text(), ElementTree.XMLParser(target=builder))


def _is_comment(element: ElementTree.Element) -> bool:
    return not isinstance(element.tag, str)


def _interface(path: Path) -> ElementTree.Element:
    (interface,) = _tree(path).iterfind("interface")
    return interface


def _own_methods() -> set[tuple[str, str]]:
    return {
        (interface.attrib["name"], method.attrib["name"])
        for interface in map(_interface, INTERFACES)
        for method in interface.iterfind("method")
    }


# The XML


def test_every_interface_has_a_file_of_its_name() -> None:
    names = [_interface(path).attrib["name"] for path in INTERFACES]
    assert names == [path.stem for path in INTERFACES] == [MANAGER, VM]


def _documented() -> Iterator[tuple[str, str, list[str], str]]:
    """Name, arguments and the comment directly before, of every interface and member."""
    for path in INTERFACES:
        for parent in (_tree(path), _interface(path)):
            before: ElementTree.Element | None = None
            for element in parent:
                if not _is_comment(element):
                    arguments = [each.attrib["name"] for each in element.iterfind("arg")]
                    prose = before.text if before is not None and _is_comment(before) else None
                    yield path.stem, element.attrib["name"], arguments, prose or ""
                before = element


@pytest.mark.parametrize(
    ("name", "arguments", "prose"),
    [
        pytest.param(name, arguments, prose, id=f"{interface}-{name}")
        for interface, name, arguments, prose in _documented()
    ],
)
def test_every_element_has_prose_directly_before_it(
    name: str, arguments: list[str], prose: str
) -> None:
    """Its name, each argument by its name and in its order, and a sentence on what it is."""
    lines = [line.strip() for line in prose.strip().splitlines()]
    assert lines[:1] == [f"{name}:"]
    described = [line.split(":")[0][1:] for line in lines if re.match("@[a-z_]+: .", line)]
    assert [each for each in described if each != "short_description"] == arguments
    text = [line for line in lines[1:] if line and not line.startswith("@")]
    assert text
    assert text[-1].endswith(".")


def test_errors_that_the_prose_names_exist() -> None:
    named = {
        name
        for path in INTERFACES
        for name in re.findall(r"org\.vmbus1\.Error\.\w+", path.read_text())
    }
    assert named
    assert named <= {error.dbus_name for error in _errors()}


def test_loaded_xml_has_the_same_elements_and_none_of_the_prose() -> None:
    for path in INTERFACES:
        loaded = ElementTree.fromstring(interfaces()[path.stem].xml)
        plain = ElementTree.fromstring(path.read_text()).find("interface")
        assert plain is not None
        tags = [(each.tag, each.attrib) for each in plain.iter()]
        assert [(each.tag, each.attrib) for each in loaded.iter()] == tags
        assert "<!--" not in interfaces()[path.stem].xml


METHODS: Mapping[str, tuple[str, str]] = {
    f"{MANAGER}.Create": ("a{sv}", "o"),
    f"{MANAGER}.GetVM": ("s", "o"),
    f"{MANAGER}.GetVMByCID": ("u", "o"),
    f"{MANAGER}.List": ("", "a(ussuuo)"),
    f"{MANAGER}.StopAll": ("t", ""),
    f"{VM}.Start": ("", ""),
    f"{VM}.Stop": ("t", ""),
    f"{VM}.Kill": ("", ""),
    f"{VM}.Suspend": ("", ""),
    f"{VM}.Resume": ("", ""),
    f"{VM}.Wait": ("", "si"),
    f"{VM}.Remove": ("", ""),
    f"{VM}.OpenConsole": ("", "h"),
    f"{VM}.OpenLog": ("", "h"),
    f"{VM}.ConnectVsock": ("u", "h"),
    f"{VM}.SetMemoryTarget": ("t", ""),
    f"{VM}.ResizeDisk": ("ut", ""),
}
PROPERTIES: Mapping[str, tuple[str, str]] = {
    f"{MANAGER}.Version": ("s", "const"),
    f"{MANAGER}.AvailableVMMs": ("as", "true"),
    f"{MANAGER}.VMCount": ("u", "true"),
    f"{VM}.Id": ("u", "const"),
    f"{VM}.Name": ("s", "const"),
    f"{VM}.CID": ("u", "const"),
    f"{VM}.VMM": ("s", "const"),
    f"{VM}.Protected": ("b", "const"),
    f"{VM}.MemoryMiB": ("u", "const"),
    f"{VM}.CPUs": ("u", "const"),
    f"{VM}.State": ("s", "true"),
    f"{VM}.PayloadState": ("s", "true"),
    f"{VM}.PayloadExitStatus": ("i", "true"),
    f"{VM}.StatusText": ("s", "true"),
    f"{VM}.RequesterUid": ("u", "const"),
    f"{VM}.RequesterSid": ("s", "const"),
    f"{VM}.RequesterPid": ("u", "const"),
    f"{VM}.Pid": ("u", "true"),
    f"{VM}.CreatedTimestamp": ("t", "const"),
    f"{VM}.StartedTimestamp": ("t", "true"),
    f"{VM}.DiedTimestamp": ("t", "true"),
    f"{VM}.DeathReason": ("s", "true"),
    f"{VM}.ExitStatus": ("i", "true"),
    f"{VM}.LastWords": ("s", "true"),
    f"{VM}.MemoryActual": ("t", "invalidates"),
}


def test_every_method_is_the_contracts() -> None:
    """Not all of the contract is there yet; what is there is as it says."""
    for path in INTERFACES:
        for name, kind in interfaces()[path.stem].methods.items():
            assert (kind.takes, kind.gives) == METHODS[f"{path.stem}.{name}"], name


def test_every_property_is_the_contracts() -> None:
    for path in INTERFACES:
        for name, kind in interfaces()[path.stem].properties.items():
            assert (kind.signature, kind.emits) == PROPERTIES[f"{path.stem}.{name}"], name


def test_every_signal_is_the_contracts() -> None:
    assert interfaces()[MANAGER].signals == {}
    assert interfaces()[VM].signals == {"Died": "usi"}


def test_properties_can_only_be_read() -> None:
    access = {
        each.attrib["access"] for path in INTERFACES for each in _interface(path).iter("property")
    }
    assert access == {"read"}


# Methods and who may call them


def test_method_table_has_every_method_of_the_xml_and_no_other() -> None:
    assert set(TABLE) == _own_methods() | STANDARD


@pytest.mark.parametrize(
    ("interface", "member"), sorted(TABLE), ids=lambda name: name.rpartition(".")[2]
)
def test_method_that_changes_or_opens_something_is_not_a_mere_read(
    interface: str, member: str
) -> None:
    """The contract: reads are properties, Get*, List, Wait, and what every object has."""
    if (interface, member) in STANDARD or re.match("Get|List$|Wait$", member):
        expected = Access.READ
    else:
        expected = Access.CREATE if member == "Create" else Access.MANAGE
    assert TABLE[interface, member].access is expected


# The bus policy


def _bus_policies() -> dict[str, list[tuple[str, dict[str, str]]]]:
    root = ElementTree.parse(DATA / "dbus-1" / "system.d" / "org.vmbus1.conf").getroot()
    return {
        " ".join(f"{key}={value}" for key, value in policy.attrib.items()): [
            (rule.tag, dict(rule.attrib)) for rule in policy
        ]
        for policy in root.iterfind("policy")
    }


def test_bus_policy_lets_only_the_service_and_root_own_the_name() -> None:
    owners = {
        who for who, rules in _bus_policies().items() if ("allow", {"own": "org.vmbus1"}) in rules
    }
    assert owners == {"user=vmbus", "user=root"}
    assert ("deny", {"own": "org.vmbus1"}) in _bus_policies()["context=default"]


def test_bus_policy_allows_nothing_that_the_contract_does_not_name() -> None:
    policies = _bus_policies()
    rules = policies.pop("context=default")
    own = ("allow", {"own": "org.vmbus1"})
    assert policies["user=vmbus"] == [own]
    # Root's signals too, or nobody would be told that the host shuts down.
    signals = {"send_destination": "org.vmbus1", "send_type": "signal"}
    assert policies["user=root"] == [own, ("allow", signals)]
    # The last rule that matches holds, so the denial must come first.
    assert rules[1] == ("deny", {"send_destination": "org.vmbus1"})
    allowed = [attributes for tag, attributes in rules if tag == "allow"]
    keys = {"send_destination", "send_interface", "send_member"}
    assert all(attributes.keys() == keys for attributes in allowed)
    assert {attributes["send_destination"] for attributes in allowed} == {"org.vmbus1"}
    members = [(each["send_interface"], each["send_member"]) for each in allowed]
    assert sorted(members) == sorted(_own_methods() | STANDARD)


# polkit


def test_polkit_actions_are_those_of_the_contract() -> None:
    root = ElementTree.parse(DATA / "polkit-1" / "actions" / "org.vmbus1.policy").getroot()
    defaults = ("allow_any", "allow_inactive", "allow_active")
    assert {
        action.attrib["id"]: tuple(action.findtext(f"defaults/{key}") for key in defaults)
        for action in root.iterfind("action")
    } == {
        "org.vmbus1.create": ("auth_admin", "auth_admin", "yes"),
        "org.vmbus1.manage-own": ("yes", "yes", "yes"),
        "org.vmbus1.manage": ("auth_admin", "auth_admin", "auth_admin_keep"),
    }


def test_polkit_actions_name_the_service_as_their_owner() -> None:
    """Else polkit would not answer a service that isn't root."""
    root = ElementTree.parse(DATA / "polkit-1" / "actions" / "org.vmbus1.policy").getroot()
    for action in root.iterfind("action"):
        annotations = {each.attrib["key"]: each.text for each in action.iterfind("annotate")}
        assert annotations == {"org.freedesktop.policykit.owner": "unix-user:vmbus"}
        assert action.findtext("description")
        assert action.findtext("message")


def test_every_text_for_polkit_is_in_every_translation(tmp_path: Path) -> None:
    template = tmp_path / "vmbus.pot"
    argv = ["xgettext", "--from-code=UTF-8", "--keyword=_", "--files-from=po/POTFILES"]
    subprocess.run([*argv, "-o", template], cwd=ROOT, check=True, timeout=20)
    languages = (ROOT / "po" / "LINGUAS").read_text().split()
    assert languages
    for language in languages:
        # It fails for a text that isn't there, or not translated.
        done = subprocess.run(
            ["msgcmp", ROOT / "po" / f"{language}.po", template],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


# Errors


def _errors() -> set[type[errors.VMBusError]]:
    return {
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.VMBusError)
    }


def test_errors_are_those_of_the_contract() -> None:
    own = (
        "InvalidConfig InvalidState NoSuchVM NameExists StartFailed LimitExceeded NotSupported "
        "VMMUnavailable ControlFailed TimedOut"
    )
    standard = (
        "AccessDenied InteractiveAuthorizationRequired InvalidArgs UnknownObject UnknownInterface "
        "UnknownMethod UnknownProperty PropertyReadOnly Failed"
    )
    expected = [f"org.vmbus1.Error.{name}" for name in own.split()]
    expected += [f"{FREEDESKTOP}Error.{name}" for name in standard.split()]
    assert sorted(error.dbus_name for error in _errors()) == sorted(expected)


def test_errors_classes_have_the_names_they_have_on_the_bus() -> None:
    for error in _errors() - {errors.VMBusError}:
        assert error.dbus_name.rpartition(".")[2] == error.__name__


# Build files


def test_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(
        r"^  version: '(.*)',$", (ROOT / "meson.build").read_text(), re.MULTILINE
    )
    assert version == vmbus.__version__


def test_meson_installs_every_file_of_the_package_and_no_other() -> None:
    text = (PACKAGE / "meson.build").read_text()
    listed = re.findall(r"^    '(.+)',$", text, re.MULTILINE)
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {str(path.relative_to(PACKAGE)) for path in files} - {"meson.build"}
    assert sorted(listed) == sorted(expected)


def test_meson_installs_every_file_of_the_package_into_its_own_directory() -> None:
    text = (PACKAGE / "meson.build").read_text()
    for directory, block in re.findall(
        r"^  '([\w.]+)': \[(.*?)^  \],$", text, re.MULTILINE | re.DOTALL
    ):
        for name in re.findall(r"'(.+)'", block):
            assert Path(name).parent == Path(directory)


# Layers


def _imports(path: Path) -> set[str]:
    """Every module that a module imports, anywhere in it, by its full name."""
    package = [*path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def _importers(name: str, where: str = "") -> list[str]:
    """The modules in a folder of the package that import `name`, or what is in it."""
    return [
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if str(path.relative_to(PACKAGE)).startswith(where)
        and any(each == name or each.startswith(f"{name}.") for each in _imports(path))
    ]


def test_imports_are_found_however_they_are_written() -> None:
    seen = _imports(PACKAGE / "model" / "machine.py")
    assert {"asyncio", "vmbus.errors", "vmbus.vmm.base", "vmbus.model.state"} <= seen
    assert "vmbus.errors" in _imports(PACKAGE / "spec.py")
    assert "vmbus.__version__" in _imports(PACKAGE / "daemon.py")


@pytest.mark.parametrize("library", ["dbus_next", "dbus_fast"])
def test_only_the_wire_imports_the_dbus_library(library: str) -> None:
    assert _importers(library) == []
    loaders = [
        str(path.relative_to(PACKAGE)) for path in MODULES if f'"{library}"' in path.read_text()
    ]
    assert loaders == ["bus/wire.py"]


@pytest.mark.parametrize(
    ("layer", "foreign"),
    [
        ("model/", "vmbus.bus"),
        ("model/", "vmbus.daemon"),
        ("vmm/", "vmbus.bus"),
        ("vmm/", "vmbus.model"),
        ("vmm/", "vmbus.daemon"),
        ("guest/", "vmbus.bus"),
        ("guest/", "vmbus.model"),
        ("guest/", "vmbus.vmm"),
        ("model/", "vmbus.systemd"),
        ("vmm/", "vmbus.systemd"),
        ("guest/", "vmbus.systemd"),
        ("bus/", "vmbus.systemd"),
        ("systemd/", "vmbus.vmm"),
        ("systemd/", "vmbus.guest"),
        ("systemd/", "vmbus.model.machine"),
        ("systemd/", "vmbus.model.registry"),
        ("systemd/", "vmbus.daemon"),
        ("bus/", "vmbus.vmm"),
        ("bus/", "vmbus.daemon"),
        ("bus/", "vmbus.serve"),
        ("cli/", "vmbus.model"),
        ("cli/", "vmbus.vmm"),
        ("spec.py", "vmbus.bus"),
        ("errors.py", "vmbus"),
        ("model/state.py", "vmbus.vmm"),
    ],
)
def test_layer_does_not_know_what_is_above_it(layer: str, foreign: str) -> None:
    assert _importers(foreign, layer) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
