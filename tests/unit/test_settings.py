"""vmbusd.toml: what it may say, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbus.settings import Settings, SettingsError, load_settings
from vmbus.spec import host_memory_mib


def _load(tmp_path: Path, text: str | bytes) -> Settings:
    path = tmp_path / "vmbusd.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path)


DEFAULTS = {
    "image_directories": (Path("/var/lib/vmbus/images"),),
    "crosvm": "crosvm",
    "qemu": "qemu-system-x86_64",
    "virtiofsd": "virtiofsd",
    "qemu_machine": "auto",
    "kvm": "probe",
    "start_timeout": 30.0,
    "control_timeout": 10.0,
    "stop_timeout": 90.0,
    "shutdown_timeout": 20.0,
    "limits": {
        "vms": {"per_user": 1000, "in_all": 4000},
        "memory": {"per_user": host_memory_mib(), "in_all": host_memory_mib()},
        "calls": {"per_user": 1000, "in_all": 4000},
        "consoles": {"per_user": 200, "in_all": 2000},
        "files": {"per_user": 2000, "in_all": 8000},
    },
    "notify_port": 9277,
    "console_log_bytes": 256 * 1024,
}


def test_without_a_file_everything_has_its_default() -> None:
    assert load_settings(None).model_dump() == DEFAULTS


def test_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert _load(tmp_path, "") == Settings()


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ('image_directories = ["/a", "/b"]', "image_directories", (Path("/a"), Path("/b"))),
        ("image_directories = []", "image_directories", ()),
        ('crosvm = "/opt/crosvm"', "crosvm", "/opt/crosvm"),
        ('qemu = "/opt/qemu"', "qemu", "/opt/qemu"),
        ('virtiofsd = "/opt/virtiofsd"', "virtiofsd", "/opt/virtiofsd"),
        ("control_timeout = 600", "control_timeout", 600.0),
        ('qemu_machine = "microvm"', "qemu_machine", "microvm"),
        ('qemu_machine = "q35"', "qemu_machine", "q35"),
        ('kvm = "on"', "kvm", "on"),
        ('kvm = "off"', "kvm", "off"),
        ("start_timeout = 2", "start_timeout", 2.0),
        ("start_timeout = 0.25", "start_timeout", 0.25),
        ("start_timeout = 3600", "start_timeout", 3600.0),
        ("stop_timeout = 86400", "stop_timeout", 86400.0),
        ("shutdown_timeout = 3600", "shutdown_timeout", 3600.0),
        ("notify_port = 1024", "notify_port", 1024),
        ("console_log_bytes = 4096", "console_log_bytes", 4096),
        ("console_log_bytes = 16777216", "console_log_bytes", 1 << 24),
    ],
)
def test_file_changes_one_setting_and_no_other(
    tmp_path: Path, line: str, key: str, value: object
) -> None:
    assert _load(tmp_path, line).model_dump() == {**DEFAULTS, key: value}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("colour = 1", "colour"),
        ("[section]\nkvm = 'on'", "section"),
        ("image_directories = '/a'", "image_directories"),
        ("image_directories = [1]", "image_directories.0"),
        ("crosvm = 5", "crosvm"),
        ("qemu = ['qemu']", "qemu"),
        ("virtiofsd = 1", "virtiofsd"),
        ("control_timeout = 601", "control_timeout"),
        ("control_timeout = 0", "control_timeout"),
        ("qemu_machine = 'virt'", "qemu_machine"),
        ("kvm = true", "kvm"),
        ("kvm = 'yes'", "kvm"),
        ("start_timeout = 'soon'", "start_timeout"),
        ("start_timeout = 0", "start_timeout"),
        ("start_timeout = 3600.5", "start_timeout"),
        ("start_timeout = nan", "start_timeout"),
        ("stop_timeout = -1", "stop_timeout"),
        ("stop_timeout = inf", "stop_timeout"),
        ("shutdown_timeout = []", "shutdown_timeout"),
        ("notify_port = 1023", "notify_port"),
        ("notify_port = 4294967295", "notify_port"),
        ("console_log_bytes = 4095", "console_log_bytes"),
        ("console_log_bytes = 16777217", "console_log_bytes"),
        ("console_log_bytes = 4096.5", "console_log_bytes"),
        ("console_log_bytes = 'much'", "console_log_bytes"),
    ],
)
def test_refusal_names_the_file_and_the_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{tmp_path}/vmbusd\.toml: {key}: ."):
        _load(tmp_path, text)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        _load(tmp_path, "kvm = 1\ncolour = 'red'\nstop_timeout = 0")
    assert [problem.partition(":")[0] for problem in str(refused.value).split("; ")] == [
        f"{tmp_path}/vmbusd.toml",
        "stop_timeout",
        "colour",
    ]


@pytest.mark.parametrize("text", ["kvm: on", "kvm = ", b"\xff\xfe", "kvm = 'on'\nkvm = 'off'"])
def test_file_that_is_not_toml_is_refused_with_its_name(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(SettingsError, match=rf"^{tmp_path}/vmbusd\.toml: ."):
        _load(tmp_path, text)


def test_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{tmp_path}/none: No such file or directory$"):
        load_settings(tmp_path / "none")


def test_directory_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{tmp_path}: Is a directory$"):
        load_settings(tmp_path)
