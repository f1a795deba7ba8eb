"""The `hybridpar` command. No logic here: each command calls one function, which Python code can call too.

Exit codes: 0 fine, 1 found a problem, 2 wrong use.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import click

from hybridpar.checkpoint.commands import checkpoint
from hybridpar.launch.wishes import BINDINGS, LAUNCHERS, Wishes, setting

EXAMPLES = "\b\nExamples:"  # \b: click leaves the lines that follow as they are


@contextmanager
def _said() -> Iterator[None]:
    """Errors as one sentence: ValueError is wrong use, RuntimeError a problem that was found."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        click.echo(f"hybridpar: {error}", err=True)
        sys.exit(2 if isinstance(error, ValueError) else getattr(error, "exit_code", 1))


def _environment(wishes: Wishes) -> dict[str, str]:
    """Ours, and how wide the terminal is, if what ranks print goes to one as it comes."""
    shown = sys.stderr.isatty() and not wishes.tag_output and not wishes.output_dir
    columns = {"HYBRIDPAR_COLUMNS": str(shutil.get_terminal_size().columns)} if shown else {}
    return {**os.environ, **columns}


def _no_option(context: click.Context, _: click.Parameter, script: str) -> str:
    """`script`, unless it is an option that the command does not have: those are let through for the script."""
    if script.startswith("-"):
        known = [name for one in context.command.params for name in one.opts]
        raise click.NoSuchOption(script, None, get_close_matches(script, known), context)
    return script


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hybridpar")
def main() -> None:
    """Tensor x pipeline x data parallelism for PyTorch on MPI and Horovod."""


@main.command(
    context_settings={"allow_interspersed_args": False},
    epilog=f"""{EXAMPLES}
  hybridpar run -np 4 --tensor 2 examples/gpt.py
  hybridpar run -np 8 --tensor 2 --pipeline 2 train.py --steps 100
  hybridpar run -H a:4,b:4 --tensor 4 --tag-output train.py
  hybridpar run --hostfile hosts -np 16 --pipeline 4 --dry-run train.py
""",
)
@click.option("-np", "ranks", type=int, help="How many ranks; else the hosts' slots, or the product of the degrees.")
@click.option("--tensor", type=int, help="Ranks along the tensor axis.")
@click.option("--pipeline", type=int, help="Ranks along the pipeline axis.")
@click.option("--data", type=int, help="Ranks along the data axis; the rest if left out.")
@click.option("--carrier", type=click.Choice(["mpi", "gloo", "nccl"]), help="What carries tensors between ranks.")
@click.option("--sync", help="How replicas keep together, as in 'diloco(64)'; overrules the script (docs/sync.md).")
@click.option("-H", "--hosts", help="Hosts and their slots, as in a:4,b:4; this host alone if left out.")
@click.option("--hostfile", help="A file with a line `name slots=4` for each host.")
@click.option("--launcher", type=click.Choice(LAUNCHERS), default="auto", show_default=True, help="What starts ranks.")
@click.option("--ssh-port", type=int, help="Port of the hosts' ssh.")
@click.option("--ssh-identity", help="File of the key for ssh.")
@click.option("--ssh-config", help="Configuration file of ssh, instead of the user's.")
@click.option("--network-interface", help="The interface between the hosts, as in eth0.")
@click.option("--bind-to", type=click.Choice(BINDINGS), default="none", show_default=True, help="Pin ranks to cores.")
@click.option("--threads", type=int, help="Threads of each rank; the host's cores shared out if left out.")
@click.option("--env", "sets", multiple=True, metavar="NAME[=VALUE]", help="Set this for all ranks; may be repeated.")
@click.option("--tag-output", is_flag=True, help="Put the rank before each line of output.")
@click.option("--output-dir", help="Write what each rank prints to files in this folder.")
@click.option("--mpi-args", default="", help="More options for mpirun or srun, in one string.")
@click.option("--dry-run", is_flag=True, help="Only print what would be run.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    ranks: int | None,
    tensor: int | None,
    pipeline: int | None,
    data: int | None,
    carrier: str | None,
    sync: str | None,
    sets: tuple[str, ...],
    dry_run: bool,
    script: str,
    arguments: tuple[str, ...],
    **options: Any,
) -> None:
    """Run SCRIPT on the ranks of a mesh, on this host or several.

    The degrees overrule those that the script gives to hp.init(). The exit code is the job's.
    """
    from hybridpar.install.probe import prefix, scripts
    from hybridpar.launch.job import plan
    from hybridpar.launch.reach import checked
    from hybridpar.launch.start import start

    with _said():
        wishes = Wishes(sets=tuple(setting(one) for one in sets), **options)
        job = plan(
            ranks, [script, *arguments], _environment(wishes), scripts(), prefix(), len(os.sched_getaffinity(0)),
            tensor=tensor, pipeline=pipeline, data=data, carrier=carrier, sync=sync, wishes=wishes,
        )  # fmt: skip
        if dry_run:
            click.echo(str(job))
            return
        if job.placement is not None and job.placement.warning:
            click.echo(f"hybridpar: {job.placement.warning}", err=True)
        job = checked(job)
    sys.exit(start(job))


@main.command(
    context_settings={"ignore_unknown_options": True},
    epilog=f"""{EXAMPLES}
  hybridpar verify --tensor 2 examples/digits_hybrid.py
  hybridpar verify train.py --tensor 2 --pipeline 2 -np 8
  hybridpar verify --tensor 2 train.py -- --steps 100       # what follows -- is the script's
  hybridpar verify --pipeline 2 --data 2 --steps 1 --json train.py | jq .sentence
""",
)
@click.option("-np", "ranks", type=int, help="How many ranks to start; the product of the degrees if left out.")
@click.option("--tensor", type=int, help="Ranks along the tensor axis.")
@click.option("--pipeline", type=int, help="Ranks along the pipeline axis.")
@click.option("--data", type=int, help="Ranks along the data axis; the rest if left out.")
@click.option("--carrier", type=click.Choice(["mpi", "gloo", "nccl"]), help="What carries tensors between ranks.")
@click.option("--steps", type=int, default=3, show_default=True, help="Training steps to compare.")
@click.option("--fp64/--no-fp64", "double", default=True, help="Also run it in fp64, which tells bugs from rounding.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds for these steps; then it hangs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("script", callback=_no_option)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def verify(
    ranks: int | None,
    tensor: int | None,
    pipeline: int | None,
    data: int | None,
    carrier: str | None,
    steps: int,
    double: bool,
    timeout: float,
    as_json: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Prove that the first training steps of SCRIPT on a mesh equal one process in plain PyTorch.

    Where they do not it names the first step, module, microbatch and rank that differ, and the likely cause. What the
    script prints goes to stderr. The exit code is 0 if equal, 1 if not, 2 for wrong use.
    """
    from rich.console import Console

    from hybridpar.install.probe import prefix, scripts
    from hybridpar.proof import job
    from hybridpar.proof.table import show

    with _said():
        report = job.start(
            script, arguments, os.environ, scripts(), prefix(), len(os.sched_getaffinity(0)), ranks=ranks,
            tensor=tensor, pipeline=pipeline, data=data, carrier=carrier, steps=steps, double=double, timeout=timeout,
        )  # fmt: skip
    if as_json:
        click.echo(report.as_json())
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 120))
    sys.exit(0 if report.equal else 1)


@main.command(
    epilog=f"""{EXAMPLES}
  hybridpar doctor
  hybridpar doctor -np 4
  hybridpar doctor --json | jq .findings
"""
)
@click.option("-np", "ranks", type=int, default=2, show_default=True, help="Ranks of the job that it starts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(ranks: int, as_json: bool) -> None:
    """Say what is installed, whether it works together, and how to mend what does not."""
    from hybridpar import doctor as doctors

    with _said():
        findings = doctors.examine(ranks, os.environ)
    click.echo(doctors.as_json(findings) if as_json else doctors.render(findings))
    sys.exit(doctors.exit_code(findings))


@main.command(
    epilog=f"""{EXAMPLES}
  hybridpar trace --simulate --schedule 1f1b --pipeline 4 --microbatches 8
  hybridpar trace --simulate --schedule interleaved --pipeline 2 --chunks 2 --svg schedule.svg
  hybridpar trace --simulate --schedule mine.csv --chrome mine.json
"""
)
@click.option("--simulate", is_flag=True, help="Draw a schedule as it would run; nothing is started.")
@click.option("--schedule", default="1f1b", show_default=True, help="gpipe, 1f1b, interleaved, or a CSV file.")
@click.option("--pipeline", type=int, default=4, show_default=True, help="Ranks along the pipeline axis.")
@click.option("--microbatches", type=int, default=8, show_default=True, help="Microbatches per step.")
@click.option("--chunks", type=int, default=2, show_default=True, help="Stages per rank (interleaved only).")
@click.option("--svg", type=click.Path(dir_okay=False), help="Write the picture to this file.")
@click.option("--chrome", type=click.Path(dir_okay=False), help="Write a Chrome trace to this file.")
@click.option("--csv", type=click.Path(dir_okay=False), help="Write the schedule to this file.")
def trace(
    simulate: bool,
    schedule: str,
    pipeline: int,
    microbatches: int,
    chunks: int,
    svg: str | None,
    chrome: str | None,
    csv: str | None,
) -> None:
    """Show when each rank does what."""
    from hybridpar.trace import report

    if not simulate:
        raise click.UsageError("say --simulate; a training run draws its own trace")
    with _said():
        text = report.simulate(
            schedule=schedule, pipeline=pipeline, microbatches=microbatches, chunks=chunks,
            svg=svg, chrome=chrome, csv=csv,
        )  # fmt: skip
    click.echo(text)


@main.command(
    epilog=f"""{EXAMPLES}
  hybridpar support
  hybridpar support --json | jq '.[] | select(.zero == 1 and .refused)'
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every combination, and why it is refused, if it is.")
def support(as_json: bool) -> None:
    """Print what goes with what: degrees, ZeRO, precision, recompute, sync policies and compression.

    A degree of 2 in the JSON stands for any above 1.
    """
    from hybridpar import support as supports

    click.echo(json.dumps(supports.rows(), indent=1) if as_json else supports.table())


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def install(arguments: tuple[str, ...]) -> None:
    """Build Horovod for the installed torch (the same as `python -m hybridpar.install`; --help shows the options)."""
    from hybridpar.install.__main__ import main as builder

    sys.exit(builder(arguments, os.environ, sys.stdout))


main.add_command(checkpoint)

if __name__ == "__main__":
    main()
