"""vmbusctl: the command line of vmbus."""

from .main import main

__all__ = ["main"]
