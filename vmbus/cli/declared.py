"""A VM that is declared in a file: the config that Create takes, in TOML."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from ..client import Config, Disk, Net, SharedDir
from ..errors import InvalidConfig
from .failures import Failure

#: The arrays of tables.
_PARTS: Mapping[str, type] = {"disks": Disk, "net": Net, "shared_dirs": SharedDir}
_PATHS = ("kernel", "initrd", "bios", "image", "source")


class Declaration:
    """A config in a file. Files that it names are relative to its own directory."""

    def __init__(self, file: Path) -> None:
        """Read it. Raises Failure; what the values may be is for the service to say."""
        self._file = file
        self._problems: list[str] = []
        #: Where each file is named, for people.
        self._places: dict[str, str] = {}
        config = self._table("", self._parsed(), Config)
        if self._problems:
            raise self._failure(InvalidConfig(self._problems))
        self.config = cast(Config, {"name": file.stem, **config})

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Have what is wrong with the config, or a file that it names, be told of this file."""
        try:
            yield
        except InvalidConfig as error:
            raise self._failure(error) from error
        except OSError as error:
            place = self._places.get(str(error.filename))
            if place is None:
                raise
            raise self._failure(f"{place}: {error.filename}: {error.strerror}") from error

    def _failure(self, reason: object) -> Failure:
        return Failure(str(self._file), str(reason))

    def _parsed(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._file.read_text("utf-8"))
        except OSError as error:
            raise self._failure(error.strerror) from error
        except UnicodeDecodeError as error:
            raise self._failure("is not UTF-8") from error
        except tomllib.TOMLDecodeError as error:
            raise self._failure(error) from error

    def _table(self, inside: str, table: Mapping[str, Any], kind: type) -> dict[str, Any]:
        """A table as the client takes it; what it can't take goes to the problems."""
        made: dict[str, Any] = {}
        for key, value in table.items():
            if key not in kind.__annotations__:
                known = ", ".join(kind.__annotations__)
                self._problems.append(f"{inside}{key}: unknown key; the keys are {known}")
            elif key in _PARTS:
                made[key] = self._parts(key, value)
            else:
                made[key] = self._value(inside + key, key, value)
        return made

    def _parts(self, key: str, value: object) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self._problems.append(f"{key}: must be an array of tables, each begun by [[{key}]]")
            return []
        return [self._table(f"{key}[{i}].", each, _PARTS[key]) for i, each in enumerate(value)]

    def _value(self, place: str, key: str, value: object) -> object:
        # A number would be taken for a descriptor.
        if not isinstance(value, str) and key in (*_PATHS, "tap"):
            self._problems.append(f"{place}: must be a string")
        elif not isinstance(value, str | int):
            self._problems.append(f"{place}: must be a string, an integer or a boolean")
        elif isinstance(value, str) and "\0" in value:
            self._problems.append(f"{place}: must not have a NUL in it")
        elif key in _PATHS:
            path = str(self._file.parent / str(value))
            self._places.setdefault(path, place)
            return path
        return value
