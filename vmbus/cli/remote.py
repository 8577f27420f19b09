"""The same command on another machine, by ssh."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Sequence
from typing import NoReturn

from .failures import Failure


def run_on(host: str, arguments: Sequence[str]) -> NoReturn:
    """Become an ssh that runs vmbusctl there: exit status, signals and streams are ssh's.

    Not a bus by way of ssh, as busctl has it: no descriptor gets through that.
    """
    terminal = ["-t"] if os.isatty(0) and os.isatty(1) else []
    # Python ignores it, and what is ignored stays so in a new program.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp("ssh", ["ssh", *terminal, "--", host, shlex.join(["vmbusctl", *arguments])])  # noqa: S606, S607
    except OSError as error:
        raise Failure(host, f"can't run ssh: {error.strerror}", "install openssh-client") from None
