#!/bin/bash
# Make a fresh Debian 12 ready to build and test vmbus: Debian packages, then a venv in .venv.
# With the argument "bench": to measure it, too. Quick, and needs no root, when there is nothing to do.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    busybox-static
    ca-certificates
    dbus
    dbus-bin
    dbus-daemon
    gcc # an example in C
    gettext    # msgfmt
    groff-base # the manual pages' tests
    libc6-dev
    libglib2.0-bin # gdbus
    libsystemd-dev
    libxml2-utils  # xmllint
    munge # Slurm's nodes trust each other by it
    pkg-config
    polkitd
    python3
    python3-dbus # python-dbusmock needs it, and there is no wheel of it
    python3-gi
    python3-venv
    qemu-system-x86
    slurm-client # srun; like its daemons, idle where there is no slurm.conf
    slurmctld
    slurmd
    systemd # busctl, systemd-analyze
    util-linux
    zsh # its completion's tests
)
if [[ ${1-} == bench ]]; then
    packages+=(
        libvirt-daemon-driver-qemu
        libvirt-daemon-system
        libvirt-dbus
        strace
    )
fi
log=build/bootstrap.log
venv=.venv
stamp=$venv/.stamp

say() { printf '==> %s\n' "$*"; }

die() {
    printf 'bootstrap: %s\n' "$*" >&2
    exit 1
}

# Run a command into the log, and show the log only if it fails.
logged() {
    mkdir -p "${log%/*}"
    printf '$ %s\n' "$*" >"$log"
    "$@" >>"$log" 2>&1 && return
    cat "$log" >&2
    die "'$*' failed; its output is above and in $log"
}

missing_packages() {
    local installed package format='${db:Status-Status} ${Package}\n'
    installed=$(dpkg-query -W -f="$format" "${packages[@]}" 2>/dev/null) || true
    for package in "${packages[@]}"; do
        [[ $'\n'$installed$'\n' == *$'\n'"installed $package"$'\n'* ]] || printf '%s\n' "$package"
    done
}

install_packages() {
    command -v dpkg-query apt-get >/dev/null ||
        die "this needs Debian 12 or a relative of it; elsewhere install: ${packages[*]}"
    local missing as_root=()
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]})) || return 0
    say "installing ${#missing[@]} packages, which needs root: ${missing[*]}"
    if ((EUID != 0)); then
        command -v sudo >/dev/null ||
            die "neither root nor sudo is here; run as root: apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    as_root+=(env DEBIAN_FRONTEND=noninteractive apt-get -q)
    say "reading the package lists"
    logged "${as_root[@]}" update
    say "downloading and installing"
    logged "${as_root[@]}" install --yes --no-install-recommends "${missing[@]}"
}

make_venv() {
    # The second test fails for a venv whose Python has since been upgraded.
    [[ -x $venv/bin/pip ]] && $venv/bin/python -c 'import pip' 2>/dev/null && return
    say "creating $venv"
    # Not a Python from a home directory: tests run it as other users, too.
    logged /usr/bin/python3 -m venv --clear --system-site-packages "$venv"
}

# Files only: running Python from the source tree changes the directories.
sources() {
    find pyproject.toml meson.build meson_options.txt vmbus data man -name __pycache__ -prune -o -type f "$@" |
        LC_ALL=C sort
}

# A reinstallation without pip's isolation takes less than half the time, but then the venv must
# have what the build needs; ninja isn't in that list, but asked for where the system has none.
build_requirements() {
    printf 'ninja\n'
    $venv/bin/python -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")'
}

pip_install() {
    PATH=$PWD/$venv/bin:$PATH logged $venv/bin/pip --disable-pip-version-check -q install "$@"
}

install_project() {
    local files requirements
    files=$(sources -print)
    if [[ ! -e $stamp || pyproject.toml -nt $stamp ]]; then
        say "installing vmbus and what its tests need into $venv"
        mapfile -t requirements < <(build_requirements)
        pip_install '.[test]' "${requirements[@]}"
    elif [[ $files != "$(<"$stamp")" || -n $(sources -newer "$stamp" -print -quit) ]]; then
        say "reinstalling vmbus into $venv"
        pip_install --no-build-isolation --no-deps --force-reinstall .
    else
        return 0
    fi
    printf '%s\n' "$files" >"$stamp"
}

install_for_bench() {
    local requirements
    mapfile -t requirements < <($venv/bin/python -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["bench"], sep="\n")')
    $venv/bin/python -c 'import dbus_fast, matplotlib' 2>/dev/null && return
    say "installing what the benchmark needs into $venv"
    pip_install "${requirements[@]}"
}

install_packages
make_venv
install_project
[[ ${1-} != bench ]] || install_for_bench
