"""`python -m hybridpar.install`: Horovod for the torch of this interpreter's environment."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from hybridpar.install import steps
from hybridpar.install.mpi import WISHES
from hybridpar.install.probe import Missing

EXAMPLES = """\
examples:
  python -m hybridpar.install                    build Horovod 0.28.1 for the installed torch, or take it from the cache
  python -m hybridpar.install --check            only say whether all is well (exit code 0 or 1)
  python -m hybridpar.install --force            build anew, say after changing HOROVOD_GPU_OPERATIONS
  python -m hybridpar.install --mpi pypi         do not use the MPI of the machine
  HOROVOD_GPU_OPERATIONS=NCCL python -m hybridpar.install

It needs torch, a C++ compiler, make and Python's headers. MPI comes from the machine if it has Open MPI 4, else from
PyPI. The wheel is kept in ~/.cache/hybridpar, so the second environment takes seconds.
Exit code: 0 all is well, 1 something is missing (one sentence says what), 2 wrong use.
"""


def parser() -> argparse.ArgumentParser:
    """The options, as `--help` shows them."""
    result = argparse.ArgumentParser(
        prog="python -m hybridpar.install",
        description="Build Horovod 0.28.1 for the torch that is installed, and try it on two ranks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--check", action="store_true", help="only say whether Horovod is installed and works")
    result.add_argument("--force", action="store_true", help="build anew even if all is well")
    result.add_argument("--mpi", choices=WISHES, default="auto", help="which MPI to build against (default: auto)")
    result.add_argument("--jobs", type=int, metavar="N", help="compilers at once (default: one per core and 2 GiB)")
    return result


def main(arguments: Sequence[str], environment: Mapping[str, str], out: TextIO) -> int:
    """Run the command with `arguments`; returns the exit code.

    Example: `main(["--check"], os.environ, sys.stdout)`.
    """
    options = parser().parse_args(arguments)
    wishes = steps.Wishes(options.force, options.mpi, options.jobs)

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    try:
        if options.check:
            steps.check(wishes, environment, say)
        else:
            steps.install(wishes, environment, say, out)
    except Missing as error:
        print(f"hybridpar: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("hybridpar: interrupted; nothing was changed but what is said above", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ, sys.stdout))
