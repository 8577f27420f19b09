"""What the service holds open for one VM: counted, kept for the next service, closed once."""

from __future__ import annotations

from collections.abc import MutableMapping

from ..spec import VMConfig
from .limits import Shares
from .surroundings import Keep


class Holdings:
    """The files of a config, and a descriptor of the VMM. `id`: the VM's."""

    def __init__(self, id: int, config: VMConfig, shares: Shares, keep: Keep) -> None:
        self._config = config
        self._shares = shares
        self._keep = keep
        self._vmm = f"vm-{id}-vmm"
        self._files = {f"vm-{id}-file-{n}": file for n, file in enumerate(config.files())}

    @property
    def fleeting(self) -> bool:
        """Whether something is open. What keeps it over a restart does not over an ordinary end."""
        return any(file.fd >= 0 for file in self._files.values())

    def store(self) -> None:
        """Have the files outlive the service, where there is a place for that."""
        for name, file in self._files.items():
            if file.fd >= 0:
                self._keep.store(name, file.fd)

    def store_vmm(self, pidfd: int) -> None:
        """Have a descriptor of the VMM outlive the service."""
        self._keep.store(self._vmm, pidfd)

    def take_over(self, kept: MutableMapping[str, int]) -> int | None:
        """Take what was kept out of `kept`; returns the descriptor of the VMM, to be closed."""
        for name, file in self._files.items():
            file.fd = kept.pop(name, -1)
        return kept.pop(self._vmm, None)

    def check(self) -> None:
        """Raises ValueError if a file was lost on the way from one service to the next."""
        for file in self._files.values():
            file.check_open()

    def close_for_run(self) -> None:
        """Close what is the VMM's by now."""
        self._config.close_for_run()
        self._closed()

    def close(self) -> None:
        """Close all of it: a VM that has ended, or never will start, needs it no more."""
        self._config.close()
        self._closed()
        self._keep.forget(self._vmm)

    def _closed(self) -> None:
        self._shares.close_files()
        for name, file in self._files.items():
            if file.fd < 0:
                self._keep.forget(name)
