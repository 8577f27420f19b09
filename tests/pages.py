"""The documentation as tests see it: its pages, and the blocks of code in them.

What stands behind the three backticks says how a block is tested:

- `sh`: commands, run as they are. `console`: commands behind "$ ", with what they print. Those
  behind "# " are for root on a machine with systemd, and run in a container.
- `python`: a program, or tests for pytest. `text` right below a block is what that prints.
- a language and a path: the file of this name, for the commands of its section or, where the path
  is absolute, for those of root; that has to be one which its reader takes.

A comment `<!-- tested by FILE -->` above a block names where else all of its lines stand and are
run.
In what is printed, "…" stands for anything within a line, and as a line for any lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .rig import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/guest/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(
    r"^(?:<!-- tested by (?P<proof>\S+) -->\n)?"
    r"```(?P<language>\S*)(?: (?P<file>\S+))?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PROMPT = re.compile(r"^([$#]) ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block. `section`: the heading above it; `output`: what it prints, where shown."""

    page: Path
    line: int
    section: str
    language: str
    file: str
    proof: str
    text: str
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_local(self) -> bool:
        """Whether it is a file for who types the commands."""
        return bool(self.file) and not self.file.startswith("/")

    @property
    def prompt(self) -> str:
        """Who is to type its commands: "$" anybody, "#" root; nothing where there are none."""
        if self.language != "console":
            return "$" if self.language in ("sh", "python") and not self.file else ""
        found = set(_PROMPT.findall(self.text))
        assert len(found) == 1, f"{self} has not one prompt, but {found}"
        return str(found.pop())

    @property
    def commands(self) -> str:
        """What is typed."""
        if self.language != "console":
            return self.text
        return "".join(line[2:] for line in self.text.splitlines(True) if _typed(line))


def _typed(line: str) -> bool:
    return line.startswith(("$ ", "# ", "> "))


def printed(block: Block) -> str | None:
    """What is shown of a block's output; None where nothing is."""
    if block.language != "console":
        return block.output
    return "".join(line for line in block.text.splitlines(True) if not _typed(line))


def is_as_shown(said: str, shown: str) -> bool:
    """Whether the output is what the page shows."""
    lines = (line.rstrip() for line in shown.strip().splitlines())
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n"
        for line in lines
    )
    heard = "".join(f"{line.rstrip()}\n" for line in said.strip().splitlines())
    return re.fullmatch(pattern, heard) is not None


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in their order; output goes with what prints it."""
    text = page.read_text()
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(_BLOCK.findall(text)), page
    found: list[Block] = []
    end = 0
    for match in _BLOCK.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^## (.*)$", before, re.MULTILINE)
        block = Block(
            page,
            before.count("\n") + 1,
            headings[-1] if headings else "",
            match["language"],
            match["file"] or "",
            match["proof"] or "",
            match["text"],
        )
        if block.language == "text" and found and not text[end : match.start()].strip():
            last = found.pop()
            found.append(Block(**{**vars(last), "output": block.text}))
        else:
            found.append(block)
        end = match.end()
    return found


def all_blocks() -> Iterator[Block]:
    for page in PAGES:
        yield from blocks(page)
