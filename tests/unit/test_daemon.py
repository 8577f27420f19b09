"""What vmbusd does to its own process before it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import vmbus

_PREPARED = """
import os, resource, signal, sys
from vmbus.daemon import _prepare_process
_prepare_process()
os.posix_spawn("/bin/ls", ["ls", "/proc/self/fd"], {})
os.wait()
print("SIGCHLD", signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL)
print("umask", oct(os.umask(0)))
print("files", len(set(resource.getrlimit(resource.RLIMIT_NOFILE))))
"""


def test_nothing_that_a_parent_did_gets_through_to_a_vmm() -> None:
    """Neither its open files, nor its ignored signals, nor its umask and limits."""
    reader, writer = os.pipe()
    done = subprocess.run(
        ["/bin/sh", "-c", "trap '' CHLD; exec \"$@\"", "sh", sys.executable, "-c", _PREPARED],
        cwd=Path(vmbus.__file__).parents[1],
        pass_fds=[reader, writer],
        umask=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=20,
        check=True,
    )
    os.close(reader)
    os.close(writer)
    # 3 is what ls has the directory open as.
    assert done.stdout.split("\n") == [
        *"0123",
        "SIGCHLD True",
        "umask 0o77",
        "files 1",
        "",
    ]
