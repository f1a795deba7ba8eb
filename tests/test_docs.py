"""What the documentation shows is what happens.

In README.md and docs/*.md:

    ```console        Lines that start with "$ " are run, with the environment's bin folder on PATH; a line that ends in
                      a backslash goes on in the next. The lines below a command, if there are any, are what it must
                      print, where `...` stands for anything. Exit code 0 is expected, or not 0 where what is shown
                      starts with "hybridpar: " (an error). A command that ends in "# not run: reason" is left out; of
                      `make X` it is only checked that the target is there, of `pip install` nothing.
    ```python         Compiled. With ">>>" a doctest. With "# runs" or "# runs on 4 ranks" as first line a script.
    ```csv, toml, ... Saved for the commands where the line before the fence ends in a file's name: "... `v.csv`:".

All commands of a page run in one folder, in order. It shows the checkout's files, and keeps what they write.
`sh` and `bash` fences are refused, since nobody could tell their commands from their output.

In docstrings every public name has an "Example:". Those with ">>>" are run, on one rank where they need MPI.
"""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hybridpar as hp
from hybridpar.install import mpi
from tests.ranks import ranks
from tests.ranks.launch import CHECKOUT, environment
from tests.test_walls import on_floors

README = CHECKOUT / "README.md"
PAGES = [*([README] if README.exists() else []), *sorted((CHECKOUT / "docs").glob("*.md"))]
COMMAND_SECONDS = 240


@dataclass(frozen=True)
class Fence:
    """A code block of a page: where it starts, its language, its text, the file it is to be saved as."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command and what is shown of its output."""

    text: str
    output: str


def fences_in(page: Path, text: str) -> Iterator[Fence]:
    pattern = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    for found in pattern.finditer(text):
        before = text[: found.start()].rstrip()
        name = re.search(r"`([\w.-]+)`:$", before)
        inner = re.sub(f"^{found[1]}", "", found[3], flags=re.MULTILINE)
        yield Fence(page, text.count("\n", 0, found.start()) + 1, found[2], inner, name[1] if name else None)


def commands_in(text: str) -> list[Command]:
    """The commands of a console fence that are to be run."""
    found: list[Command] = []
    goes_on = False
    for line in text.splitlines():
        last = found.pop() if found and not line.startswith("$ ") else Command("", "")
        if goes_on:
            found.append(Command(f"{last.text}\n{line}", ""))
        elif line.startswith("$ "):
            found.append(Command(line[2:], ""))
        else:
            found.append(Command(last.text, f"{last.output}{line}\n"))
            continue
        goes_on = line.endswith("\\")
    return [command for command in found if command.text and not re.search(r"# not run: \S", command.text)]


FENCES = [fence for page in PAGES for fence in fences_in(page, page.read_text())]


def fences(*languages: str) -> Any:
    chosen = [fence for fence in FENCES if fence.language in languages]
    return pytest.mark.parametrize("fence", chosen, ids=map(str, chosen))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Page -> the folder where its commands run."""
    made = {page: tmp_path_factory.mktemp(page.stem) for page in PAGES}
    for folder in made.values():
        for path in CHECKOUT.iterdir():
            if not path.name.startswith("."):
                (folder / path.name).symlink_to(path)
    for fence in FENCES:
        if fence.file:
            (made[fence.page] / fence.file).write_text(fence.text)
    return made


def executed(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = environment() | {
        "OMPI_MCA_rmaps_base_oversubscribe": "1",  # the reader's machine may have the cores that this one lacks
        "PYTHONPATH": str(CHECKOUT),
        "COLUMNS": "120",
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_SECONDS,
    )


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))


def test_the_readme_shows_commands() -> None:
    if README.exists():
        assert any(commands_in(fence.text) for fence in FENCES if fence.page == README and fence.language == "console")


def test_commands_are_shown_in_console_fences() -> None:
    hidden = [str(fence) for fence in FENCES if fence.language in ("sh", "bash", "shell", "zsh")]
    assert not hidden, "write ```console, and `$ ` before each command, so that it can be tested"


@pytest.mark.timeout(0)  # each command has its own limit
@fences("console")
def test_a_shown_command_does_what_is_shown(fence: Fence, folders: dict[Path, Path]) -> None:
    for command in commands_in(fence.text):
        if command.text.startswith("make "):
            asked = {word for word in command.text.split("#")[0].split()[1:] if "=" not in word}
            assert asked <= targets(), f"{command.text}: the Makefile has {sorted(targets())}"
        elif not re.match(r"(\S*python3? -m )?pip install ", command.text):
            done = executed(["bash", "-c", command.text], folders[fence.page])
            told = f"$ {command.text}\n{done.stdout}\nexit code {done.returncode}"
            assert (done.returncode != 0) == command.output.startswith("hybridpar: "), told
            assert not command.output.strip() or same(command.output, done.stdout), told


def same(shown: str, printed: str) -> bool:
    """Whether a command printed what is shown, spaces at the ends of lines aside."""
    want, got = ("\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n" for text in (shown, printed))
    return doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS)


@fences("python")
def test_shown_python_is_right(fence: Fence, folders: dict[Path, Path]) -> None:
    marked = re.match(r"# runs(?: on (\d+) ranks)?\n", fence.text)
    if ">>>" in fence.text:
        assert_examples(doctest.DocTestParser().get_doctest(fence.text, {}, str(fence), str(fence.page), fence.line))
    elif marked:
        script = folders[fence.page] / f"line-{fence.line}.py"
        script.write_text(fence.text)
        run = [sys.executable, str(script)]
        done = executed(mpi.mpirun(int(marked[1]), run) if marked[1] else run, script.parent)
        assert done.returncode == 0, done.stdout
    else:
        compile(fence.text, str(fence), "exec")


def assert_examples(test: doctest.DocTest) -> None:
    told: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    assert not runner.run(test, out=told.append).failed, "".join(told)


def assert_module_examples(module: ModuleType, names: dict[str, Any]) -> None:
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names):
        assert_examples(test)


@pytest.mark.parametrize("name", [name for name in on_floors(0, 1) if not name.endswith("__main__")])
def test_examples_in_docstrings_run(name: str) -> None:
    assert_module_examples(importlib.import_module(name), {})


@ranks(1)
@pytest.mark.parametrize("name", [name for name in on_floors(2, 3, 4, 5) if not name.endswith("__main__")])
def test_examples_in_docstrings_run_on_one_rank(name: str) -> None:
    import torch

    from hybridpar.wires.axis import Alone

    world = hp.init()
    names = {"hp": hp, "torch": torch, "nn": torch.nn, "Alone": Alone, "world": world}
    assert_module_examples(importlib.import_module(name), names)
    world.close()


@pytest.mark.parametrize("name", [name for name in hp.__all__ if not name.startswith("_")])
def test_every_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = getattr(hp, name).__doc__ or ""
    first = text.strip().splitlines()[:1]
    assert first and first[0][0].isupper() and first[0].rstrip()[-1] in ".:", f"{name}: {first}"
    assert re.search(r"^ *Examples?:\n", text, re.MULTILINE), f"the docstring of {name} has no Example:"


PAGE = """\
Text, and a file `a.csv`:

```csv
1,2
```

```console
$ echo one \\
    two
one two
$ make demo    # not run: takes minutes
$ false
hybridpar: no
```

1. In a list

   ```python
   x = 1
   ```
"""


def test_fences_and_their_commands_are_found() -> None:
    found = list(fences_in(README, PAGE))
    assert [(fence.line, fence.language, fence.file) for fence in found] == [
        (3, "csv", "a.csv"),
        (7, "console", None),
        (18, "python", None),
    ]
    assert found[2].text == "x = 1\n"
    assert commands_in(found[1].text) == [
        Command("echo one \\\n    two", "one two\n"),
        Command("false", "hybridpar: no\n"),
    ]


def test_shown_output_may_leave_parts_out() -> None:
    assert same("loss ...\nsaved\n", "loss 3.2  \nand more\nsaved\n")
    assert not same("loss 1\n", "loss 2\n")
