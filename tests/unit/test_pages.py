"""How the blocks of a page are found, and told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import Block, blocks, is_as_shown, printed

PAGE = """# A page

## Life

```sh
begin &
```

<!-- tested by Makefile -->
```sh
make test
```

```console
$ echo one \\
>     two
one two
```

```python
print(1)
```

```text
1
```

```toml web.toml
[a]
```

## Death

```console
# halt
```
"""


@pytest.fixture
def page(tmp_path: Path) -> list[Block]:
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    return blocks(file)


def test_blocks_are_found_with_what_is_said_of_them(page: list[Block]) -> None:
    """In order, with their section, who types them, and where else they are tested."""
    begin, make, echo, program, file, halt = page
    assert {block.section for block in page if block is not halt} == {"Life"}
    assert (halt.section, halt.prompt, halt.commands) == ("Death", "#", "halt\n")
    assert (begin.prompt, begin.commands, printed(begin)) == ("$", "begin &\n", None)
    assert (make.proof, begin.proof) == ("Makefile", "")
    assert (echo.commands, printed(echo)) == ("echo one \\\n    two\n", "one two\n")
    assert (program.prompt, printed(program)) == ("$", "1\n")
    assert (file.file, file.is_local, file.prompt) == ("web.toml", True, "")


@pytest.mark.parametrize(
    ("said", "shown", "same"),
    [
        ("one\ntwo\n", "one\ntwo\n", True),
        ("one  \n\n", "one", True),
        ("one\ntwo\n", "one\n", False),
        ("one\ntwo\n", "one\n…\n", True),
        ("one\n", "one\n…\n", True),
        ("one\ntwo\nthree\n", "…\ntwo\n…\n", True),
        ("one\ntwo 3 4\n", "…\ntwo … 4\n", True),
        ("one.two\n", "one two\n", False),
        ("one\ntwo\n", "one…\n", False),
        ("", "", True),
        ("one\n", "", False),
    ],
)
def test_output_is_what_is_shown_but_for_what_differs(said: str, shown: str, same: bool) -> None:
    """Anything else than what stands for anything has to be the same."""
    assert is_as_shown(said, shown) == same


def test_a_block_that_is_not_closed_is_no_page(tmp_path: Path) -> None:
    """Or what stands in it would be no block, and nobody would test it."""
    (tmp_path / "page.md").write_text("```sh\ntrue\n")
    with pytest.raises(AssertionError):
        blocks(tmp_path / "page.md")
