"""What each rank of `hybridpar run` is: the user's script, watched from its first line.

    python -m hybridpar.launch.rank TAG FOLDER SCRIPT ARGUMENTS...      TAG is tag or plain, FOLDER that of logs or ""

The script finds sys.argv, sys.path and __main__ as under `python SCRIPT ARGUMENTS...`. An error before hp.init() is
told by one rank too, and a rank whose launcher has been killed ends.
"""

from __future__ import annotations

import builtins
import os
import select
import sys
import threading
from types import ModuleType, TracebackType

from hybridpar.launch.tee import lead
from hybridpar.wires.ending import Ending

_LAUNCHER_GONE = 75


def main(tag: str, folder: str, script: str, *arguments: str) -> None:
    """Run `script` as the main program of this process."""
    ending = Ending.installed()
    if tag == "tag" or folder:
        lead(ending.rank, tag == "tag", folder)
    # Lines as they come, as on a terminal, and whole, also under PYTHONUNBUFFERED: other ranks print too.
    sys.stdout.reconfigure(line_buffering=True, write_through=False)
    if hasattr(os, "pidfd_open"):
        threading.Thread(target=_end_with, args=(os.getppid(),), name="hybridpar-parent", daemon=True).start()
    _run(script, arguments)


def _run(script: str, arguments: tuple[str, ...]) -> None:
    sys.argv[:] = [script, *arguments]
    path = os.path.abspath(script)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(path)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=builtins, __spec__=None)
    sys.modules["__main__"] = module
    told = sys.excepthook

    def without_us(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
            trace = trace.tb_next
        told(kind, error, trace)

    sys.excepthook = without_us
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _end_with(parent: int) -> None:
    """End when the process `parent` does: it would have ended us, and shows what we print."""
    select.select([os.pidfd_open(parent)], [], [])
    os._exit(_LAUNCHER_GONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
