"""`hybridpar checkpoint`: list, show, verify, export, diff. No logic here: each command calls one function.

Exit codes: 0 fine, 1 found a problem (or a difference), 2 wrong use.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

EXAMPLES = "\b\nExamples:"  # \b: click leaves the lines that follow as they are
_FOLDER = click.Path(path_type=Path)


@contextmanager
def _said() -> Iterator[None]:
    """Errors as one sentence."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        click.echo(f"hybridpar: {error}", err=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)


@click.group()
def checkpoint() -> None:
    """Look at checkpoints: which there are, what is in them, whether they are whole."""


@checkpoint.command(name="list", epilog=f"{EXAMPLES}\n  hybridpar checkpoint list run\n")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("run", type=_FOLDER)
def list_(run: Path, as_json: bool) -> None:
    """The complete checkpoints in the folder RUN, the oldest first."""
    from hybridpar.checkpoint import look

    with _said():
        several = look.listed(run)
    damaged = [told for _, told in several if isinstance(told, str)]
    if as_json:
        rows = [
            {"path": str(path), **({"wrong": told} if isinstance(told, str) else look.shown(told))}
            for path, told in several
        ]
        click.echo(json.dumps(rows, indent=1))
    else:
        for path, told in several:
            click.echo(told if isinstance(told, str) else _line(path, look.shown(told)))
        if not several:
            click.echo(f"no complete checkpoint in {run}")
    sys.exit(1 if damaged else 0)


@checkpoint.command(epilog=f"{EXAMPLES}\n  hybridpar checkpoint show run/step-00000300\n")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--tensors", is_flag=True, help="Each tensor with its shape, dtype and file.")
@click.argument("path", type=_FOLDER)
def show(path: Path, as_json: bool, tensors: bool) -> None:
    """What is in the checkpoint PATH, or in the newest one of the folder PATH."""
    from hybridpar.checkpoint import folders, look, manifest

    with _said():
        found = folders.newest(path)
        told = manifest.read(found)
    facts = {"path": str(found), **look.shown(told)}
    every = {kind: {name: asdict(one) for name, one in some.items()} for kind, some in told.tensors.items()}
    if as_json:
        click.echo(json.dumps({**facts, **({"all": every} if tensors else {})}, indent=1))
        return
    for name, value in facts.items():
        click.echo(f"{name:12} {value if isinstance(value, str) else json.dumps(value)}")
    for kind, some in every.items() if tensors else ():
        for name, one in some.items():
            click.echo(f"{kind:12} {name}  {list(one['shape'])} {one['dtype']}  {one['file']}")


@checkpoint.command(epilog=f"{EXAMPLES}\n  hybridpar checkpoint verify run/step-00000300 && echo whole\n")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("paths", type=_FOLDER, nargs=-1, required=True)
def verify(paths: tuple[Path, ...], as_json: bool) -> None:
    """Read all files of the checkpoints PATHS and compare sizes and checksums. Exit code 1 if one is not whole."""
    from hybridpar.checkpoint import folders, look

    absent = [str(path) for path in paths if folders.present(path) is None and not path.exists()]
    if absent:
        click.echo(f"hybridpar: there is no checkpoint {', '.join(absent)} on this host", err=True)
        sys.exit(2)
    found: dict[str, list[str]] = {}
    for path in paths:
        try:
            one = folders.newest(path)
            found[str(one)] = look.flaws(one)
        except ValueError as error:
            found[str(path)] = [str(error)]
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for path, wrong in found.items():
            click.echo("\n".join(wrong) or f"{path} is whole")
    sys.exit(1 if any(found.values()) else 0)


@checkpoint.command(
    epilog=f"""{EXAMPLES}
  hybridpar checkpoint export run model.safetensors
  hybridpar checkpoint export run/step-00000300 model.safetensors --dtype BF16 --tied
"""
)
@click.option("--dtype", help="What floating point tensors become: F32, BF16, F16, ...")
@click.option("--tied", is_flag=True, help="Write tied tensors under all of their names.")
@click.argument("path", type=_FOLDER)
@click.argument("target", type=_FOLDER)
def export(path: Path, target: Path, dtype: str | None, tied: bool) -> None:
    """Write the model of the checkpoint PATH (or of the newest in it) as the one safetensors file TARGET."""
    from hybridpar.checkpoint import folders
    from hybridpar.checkpoint.export import export as write

    with _said():
        found = folders.newest(path)
        count = write(found, target, dtype, tied)
    click.echo(f"{count} tensors of {found} in {target}")


@checkpoint.command(epilog=f"{EXAMPLES}\n  hybridpar checkpoint diff run/step-00000300 other/step-00000300\n")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--tolerance", type=float, default=0.0, show_default=True, help="Tensors may be so far apart.")
@click.option("--model", "only_model", is_flag=True, help="Compare parameters and buffers only.")
@click.argument("left", type=_FOLDER)
@click.argument("right", type=_FOLDER)
def diff(left: Path, right: Path, as_json: bool, tolerance: float, only_model: bool) -> None:
    """In what the checkpoints LEFT and RIGHT differ. Exit code 1 if they do."""
    from hybridpar.checkpoint import folders, look

    with _said():
        found = [
            one
            for one in look.differences(folders.newest(left), folders.newest(right), only_model)
            if one.largest is None or not one.largest <= tolerance
        ]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        for one in found:
            click.echo(f"{one.name}: {one.what}")
    sys.exit(1 if found else 0)


def _line(path: Path, facts: dict[str, object]) -> str:
    metrics = ", ".join(f"{name}={value:.4g}" for name, value in facts["metrics"].items())
    layout = " x ".join(f"{name}={degree}" for name, degree in facts["layout"].items())
    size = facts["bytes"] / 1e6
    return f"{path}  step {facts['step']}  {size:,.1f} MB  {facts['written']}  {layout}  {metrics}".rstrip()
