# The front door. Each target first makes ready what it needs; what needs root is asked for.

.PHONY: help demo test test-system bench check deb guest reference format clean

help:
	@echo "make demo        watch real guests be created, started, seen on the bus and die"
	@echo "make test        run the tests"
	@echo "make test-system run those that install the package into a Debian and boot it"
	@echo "make bench       measure vmbus beside libvirt-dbus, and with thousands of VMs"
	@echo "make check       run the linters and the type checker"
	@echo "make deb         build the Debian package, in build/deb"
	@echo "make format      format the code"
	@echo "make reference   write docs/reference.md anew, from the interfaces"
	@echo "make guest       build the Linux guest that the demo and the tests boot"
	@echo "make clean       remove what the others made"

ready:
	@tools/bootstrap.sh
.PHONY: ready

guest: ready
	@tools/make-guest build/guest

demo: ready guest
	@.venv/bin/python tools/demo

# Other users, taps and namespaces are part of what is tested, and need root.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

test: ready guest user
	@[ -z "$(SUDO)" ] || echo "==> the tests act as several users and make taps, which needs root"
	$(SUDO) .venv/bin/pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

# The peer is installed, and both run on a bus of their own; what was found goes into docs/.
bench: guest user
	@tools/bootstrap.sh bench
	@[ -z "$(SUDO)" ] || echo "==> the benchmark acts as several users and mounts, which needs root"
	$(SUDO) .venv/bin/python -m bench

# polkit takes questions about others from the user whom the actions name as their owner.
user:
	@id vmbus >/dev/null 2>&1 || { echo "==> creating the system user vmbus, which needs root"; \
	  $(SUDO) useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin vmbus; }
.PHONY: user

test-system: ready guest deb
	@[ -z "$(SUDO)" ] || echo "==> making a Debian and booting it needs root"
	$(SUDO) tools/make-root
	$(SUDO) .venv/bin/pytest tests/system

deb:
	@tools/make-deb

check: ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	xmllint --noout --nonet data/dbus-1/interfaces/*.xml data/dbus-1/system.d/*.conf data/polkit-1/actions/*.policy
	@rm -rf build/meson
	PATH=$(CURDIR)/.venv/bin:$$PATH .venv/bin/python -m mesonbuild.mesonmain setup --fatal-meson-warnings build/meson >build/meson.log || { cat build/meson.log; exit 1; }
	@echo "make check:      all fine"

reference: ready
	.venv/bin/python tools/generate reference.md >docs/reference.md

format: ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The Debian that the system tests boot is root's.
clean:
	rm -rf build .venv 2>/dev/null || $(SUDO) rm -rf build .venv
