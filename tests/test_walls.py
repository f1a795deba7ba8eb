"""The walls of the house, as docs/design.md draws them: who may import whom, and what is done nowhere.

Each check is a function from a module's source to its faults, so that it can be tried on a planted fault too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "hybridpar"
MOST_LINES = 320

# (floor, its modules, what they may import that is neither ours nor in the standard library)
FLOORS = (
    (
        "facts",
        ("mesh", "shard", "batches", "support", "pipeline/action", "pipeline/order", "pipeline/partition")
        + ("pipeline/budget",)
        + ("pipeline/schedule", "pipeline/simulate", "pipeline/weave", "trace/*", "install/*")
        + ("proof/point", "proof/report", "proof/facts", "proof/gradients", "proof/causes", "proof/patience")
        + ("proof/together",)
        + ("launch/hosts", "launch/placement", "launch/wishes", "launch/lines", "launch/interfaces", "launch/pages")
        + ("optim/sync/wish",)
        + ("tensor/halo", "checkpoint/manifest", "checkpoint/folders", "checkpoint/writers")
        + ("watch/metrics", "watch/writers"),
        (),
    ),
    ("torch", ("seeds", "split", "microbatch", "chance", "pipeline/skip", "skeleton/*", "models/*"), ("torch",)),
    ("wires", ("wires/*",), ("torch", "mpi4py", "horovod")),
    (
        "parts",
        ("tensor/*", "pipeline/executor", "pipeline/ties", "optim/*", "loss", "global_view", "data", "fill/*")
        + ("company",)
        + ("checkpoint/plain", "checkpoint/stream", "checkpoint/randomness", "checkpoint/agreement")
        + ("checkpoint/gathering", "checkpoint/writing", "checkpoint/replicas")
        + ("checkpoint/optimizers", "checkpoint/saving")
        + ("orders", "streams", "handing", "portion")
        + ("watch/traffic", "watch/finite", "watch/drift", "watch/work", "watch/norm"),
        ("torch", "safetensors"),
    ),
    (
        "whole",
        ("assemble", "budgeted", "engine", "evaluating", "unsplit", "start", "doctor")
        + ("proof/watch", "proof/recorder", "proof/reference")
        + ("checkpoint/parts", "checkpoint/inventory", "checkpoint/commit", "checkpoint/save", "checkpoint/load")
        + ("checkpoint/runs", "checkpoint/look", "checkpoint/export")
        + ("proof/between", "proof/compare", "proof/diagnose", "proof/locate", "proof/verify", "proof/rank")
        + ("watch/watch", "watch/together", "watch/progress"),
        ("torch", "rich"),
    ),
    (
        "shell",
        ("cli", "launch/*", "__main__", "proof/job", "proof/table", "checkpoint/commands"),
        ("click", "rich", "psutil", "cloudpickle"),
    ),
)
READ_THE_ENVIRONMENT = ("start", "cli", "doctor", "wires/boot", "wires/ending", "install/*")
READ_THE_ENVIRONMENT += ("launch/function", "launch/call")
PICKLING = ("bcast", "gather", "allgather", "scatter", "alltoall", "reduce", "allreduce", "scan", "exscan")
PICKLING += ("send", "isend", "ssend", "issend", "bsend", "recv", "irecv", "sendrecv", "mrecv")
CARRIERS = ("mpi4py", "horovod", "torch.distributed")


def name_of(path: Path) -> str:
    """hybridpar/pipeline/schedule.py -> pipeline/schedule; a package is its `__init__`; "" is hybridpar itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.stat().st_size}
INNER = [name for name in SOURCES if name]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) or name == pattern.removesuffix("/*") for pattern in patterns)


def floor_of(name: str) -> int | None:
    found = [floor for floor, (_, patterns, _) in enumerate(FLOORS) if matches(name, patterns)]
    return found[0] if found else None


def on_floors(*floors: int) -> list[str]:
    """The dotted names of the modules on these floors."""
    return ["hybridpar." + name.replace("/", ".") for name in INNER if floor_of(name) in floors]


def imported(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, nested ones and `import_module("...")` too, but not for annotations only."""
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # "from . import x" in a/b.py is a; in the package a too
                package = ["hybridpar", *name.split("/")]
                package = package if SOURCES.get(name, Path()).name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _last(node.func) in ("import_module", "__import__"):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and _last(child.test) == "TYPE_CHECKING":
            continue
        yield from _executed(child)


def _last(node: ast.expr) -> str:
    """`a.b.c` -> c"""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def wrong_imports(name: str, source: str) -> list[str]:
    floor = floor_of(name)
    title, _, allowed = FLOORS[floor]
    faults = []
    for line, target in imported(name, ast.parse(source)):
        head = target.split(".")[0]
        if head == "hybridpar":
            parts = target.split(".")[1:]
            home = "/".join(parts) if "/".join(parts) in SOURCES else "/".join(parts[:-1])
            if not home:
                faults.append(f"line {line}: {target} by its public name; import it from its module")
            elif floor_of(home) is None or floor_of(home) > floor:
                faults.append(f"line {line}: {home} is above floor {floor} ({title})")
        elif head not in sys.stdlib_module_names and head not in allowed:
            faults.append(f"line {line}: {target}; floor {floor} ({title}) may import {allowed} besides its own")
        elif floor != 2 and any(f"{target}.".startswith(f"{carrier}.") for carrier in CARRIERS):
            faults.append(f"line {line}: {target}; only wires import it")
    return faults


def hidden_state(name: str, source: str) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global):
            faults.append(f"line {node.lineno}: global {', '.join(node.names)}")
        used = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            used = [alias.name for alias in node.names]
        reads = {"environ", "environb", "getenv"} & set(used)
        if reads and not matches(name, READ_THE_ENVIRONMENT):
            faults.append(f"line {node.lineno}: the environment; only {', '.join(READ_THE_ENVIRONMENT)} read it")
    return faults


def pickled_messages(name: str, source: str) -> list[str]:
    """mpi4py's lower-case calls: the first one duplicates a communicator while holding Python's lock, which Horovod's
    thread may need before the other ranks can join: a deadlock."""
    return [
        f"line {node.lineno}: {ast.unparse(node.func)}(...) pickles; use {node.func.attr.capitalize()} on a buffer"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in PICKLING
        and re.search(r"(^|_)(comm|world)$|COMM_WORLD$", _last(node.func.value), re.IGNORECASE)
    ]


def shape(name: str, source: str) -> list[str]:
    lines = source.splitlines()
    faults = [f"line {i}: not ASCII" for i, line in enumerate(lines, 1) if not line.isascii()]
    if len(lines) > MOST_LINES:
        faults.append(f"{len(lines)} lines, more than {MOST_LINES}: split it by idea")
    if source.strip() and not ast.get_docstring(ast.parse(source)):
        faults.append("no docstring that says what the module is for")
    return faults


def assert_free_of(check: Callable[[str, str], list[str]], names: list[str]) -> None:
    found = [f"{name or '__init__'}: {fault}" for name in names for fault in check(name, SOURCES[name].read_text())]
    assert not found, "\n" + "\n".join(found)


def test_every_module_is_on_a_floor() -> None:
    homeless = [name for name in INNER if floor_of(name) is None]
    assert not homeless, f"put {homeless} on a floor: in FLOORS here and in the table of docs/design.md"


def test_the_design_shows_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d) (\w+) \| (.*?) \|", (CHECKOUT / "docs" / "design.md").read_text(), re.MULTILINE)
    drawn = [(title, set(re.findall(r"`([\w/*]+)`", modules))) for _, title, modules in rows]
    assert drawn == [(title, set(patterns)) for title, patterns, _ in FLOORS]


def test_imports_go_down_only() -> None:
    assert_free_of(wrong_imports, [name for name in INNER if floor_of(name) is not None])


def test_nothing_is_hidden_in_globals_or_the_environment() -> None:
    assert_free_of(hidden_state, list(SOURCES))


def test_no_message_is_pickled() -> None:
    assert_free_of(pickled_messages, list(SOURCES))


def test_files_are_short_ascii_and_say_what_they_are_for() -> None:
    assert_free_of(shape, list(SOURCES))


def test_facts_and_the_package_itself_load_neither_torch_nor_mpi() -> None:
    code = """if True:
        import importlib, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
            loaded = {"torch", "mpi4py", "horovod", "numpy"} & set(sys.modules)
            if loaded:
                sys.exit(f"{name} loads {loaded}")
    """
    names = ["hybridpar", *(name for name in on_floors(0) if not name.endswith("__main__"))]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("check", "name", "source", "fault"),
    [
        (wrong_imports, "mesh", "import torch", "line 1: torch; floor 0"),
        (wrong_imports, "mesh", "def f():\n    from torch import nn", "line 2: torch.nn"),
        (wrong_imports, "mesh", "import importlib\nimportlib.import_module('mpi4py')", "line 2: mpi4py"),
        (wrong_imports, "mesh", "from hybridpar.wires import axis", "wires/axis is above floor 0"),
        (wrong_imports, "mesh", "from hybridpar.wires.axis import Axis", "wires/axis is above floor 0"),
        (wrong_imports, "mesh", "from .wires.axis import Axis", "wires/axis is above floor 0"),
        (wrong_imports, "tensor/plan", "from ..engine import ParallelModel", "engine is above floor 3"),
        (wrong_imports, "engine", "from hybridpar import init", "hybridpar.init by its public name"),
        (wrong_imports, "engine", "from torch import distributed", "torch.distributed; only wires"),
        (wrong_imports, "engine", "import torch.distributed as dist", "torch.distributed; only wires"),
        (hidden_state, "engine", "def f():\n    global x", "line 2: global x"),
        (hidden_state, "engine", "import os\nos.environ['A']", "line 2: the environment"),
        (hidden_state, "engine", "from os import getenv", "line 1: the environment"),
        (pickled_messages, "wires/mpi", "self._comm.bcast(x)", "self._comm.bcast(...) pickles; use Bcast"),
        (pickled_messages, "wires/mpi", "MPI.COMM_WORLD.allreduce(x)", "pickles; use Allreduce"),
        (shape, "engine", '"""One."""\nx = "\u00e4"', "line 2: not ASCII"),
        (shape, "engine", '"""One."""\n' * 321, "321 lines"),
        (shape, "engine", "x = 1", "no docstring"),
    ],
)
def test_a_planted_fault_is_found(check: Callable[[str, str], list[str]], name: str, source: str, fault: str) -> None:
    found = check(name, source)
    assert len(found) == 1 and fault in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mesh", "import json\nfrom hybridpar.shard import Spec\nfrom hybridpar.pipeline.schedule import Schedule"),
        ("start", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mpi4py import MPI"),
        ("wires/mpi", "import torch.distributed\nfrom mpi4py import MPI\nfrom . import axis"),
    ],
)
def test_what_is_allowed_is_not_reported(name: str, source: str) -> None:
    assert wrong_imports(name, source) == []
