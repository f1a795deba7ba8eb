"""The builder of Horovod: what it decides, what it says, and that it recognises what is there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.install import cache, cuda, debian, diagnosis, flags, mpi, probe, progress, smoke, steps, venv
from hybridpar.install.__main__ import EXAMPLES, main, parser
from hybridpar.install.build import needs_cmake, runpath
from hybridpar.install.probe import Compiler, Facts, Missing, Torch

ROOT = Path(__file__).parents[1]
GCC = Compiler(("g++",), "gcc", "12.2.0")
FACTS = Facts(
    python="cp311", machine="x86_64", libc="glibc-2.36", cores=4, memory_gib=16.0,
    cpu_flags=frozenset({"avx", "f16c", "fma", "sse2"}), torch=Torch("2.13.0+cpu", None, True), compiler=GCC,
    cuda_home=None, cuda_version=(), nccl=None,
)  # fmt: skip
PYPI = mpi.Mpi("Open MPI", "4.1.8", "/env/bin", inside=True)
DEBIAN = mpi.Mpi("Open MPI", "4.1.4", "/usr/bin", inside=False)


def key_of(facts: Facts = FACTS, library: mpi.Mpi | None = PYPI, **environment: str) -> str:
    return cache.key(
        facts, library, flags.build_settings(facts, environment), flags.wrapper(facts.compiler, facts.torch)
    )


@pytest.mark.parametrize(
    "other",
    [
        key_of(replace(FACTS, python="cp312")),
        key_of(replace(FACTS, libc="glibc-2.41")),
        key_of(replace(FACTS, torch=Torch("2.13.0", None, True))),
        key_of(replace(FACTS, torch=Torch("2.13.0+cpu", None, False))),
        key_of(replace(FACTS, torch=Torch("2.13.0+cpu", "13.0", True))),
        key_of(replace(FACTS, compiler=replace(GCC, version="12.3.0"))),
        key_of(replace(FACTS, cpu_flags=frozenset({"sse2"}))),
        key_of(library=DEBIAN),
        key_of(HOROVOD_GPU_OPERATIONS="MPI"),
        key_of(HOROVOD_BUILD_ARCH_FLAGS="-mavx2"),
    ],
)
def test_the_key_changes_with_all_that_a_wheel_depends_on(other: str) -> None:
    assert other != key_of()


def test_the_key_stays_where_the_wheel_would_be_the_same() -> None:
    assert key_of(library=replace(PYPI, folder="/elsewhere/bin")) == key_of()  # the wheel finds it relative to itself
    assert key_of(library=None) == key_of()  # the one that PyPI would give
    assert key_of(replace(FACTS, cores=64, memory_gib=1.0)) == key_of()
    assert key_of(HOROVOD_CYCLE_TIME="5", PATH="/elsewhere") == key_of()  # for running, not for building
    assert key_of(library=replace(DEBIAN, folder="/opt/mpi/bin")) != key_of(library=DEBIAN)


@pytest.mark.parametrize(
    ("torch", "given", "expected"),
    [
        ("2.13.0+cpu", "-std=c++14", "-std=c++17"),
        ("2.13.0+cpu", "-std=gnu++11", "-std=c++17"),
        ("2.13.0+cpu", "-std=c++20", "-std=c++20"),
        ("2.14.0", "-std=gnu++14", "-std=c++20"),
        ("2.14.0", "-std=c++17", "-std=c++20"),
        ("2.14.0", "-Da=b c", "-Da=b c"),
        ("2.13.0+cpu", "-g0", "-g0"),
    ],
)
def test_the_wrapper_raises_the_standard(tmp_path: Path, torch: str, given: str, expected: str) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script = tmp_path / "wrapper"
    script.write_text(flags.wrapper(Compiler(("sh", str(compiler)), "gcc", "12.2.0"), Torch(torch, None, True)))
    done = subprocess.run(["sh", str(script), "-c", "-g", given, "x.cc"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == ["-c", expected, "x.cc"]


def test_newer_compilers_get_the_headers_that_horovod_forgot() -> None:
    torch = FACTS.torch
    assert "-include" not in flags.wrapper(GCC, torch)
    assert "-include stdexcept -include string" in flags.wrapper(replace(GCC, version="13.1.0"), torch)
    assert "-include stdexcept -include string" in flags.wrapper(Compiler(("clang++",), "clang", "15.0.6"), torch)


def test_compilers_that_refuse_the_old_span_get_a_new_standard() -> None:
    gcc_14 = flags.wrapper(replace(GCC, version="14.2.0"), FACTS.torch)
    assert "-DFLATBUFFERS_USE_STD_SPAN" in gcc_14
    assert "a=-std=c++20" in gcc_14
    assert "FLATBUFFERS" not in flags.wrapper(replace(GCC, version="13.3.0"), FACTS.torch)


def test_cpu_flags_are_pinned_and_never_empty() -> None:
    assert flags.arch_flags(FACTS) == "-mf16c -mavx -mfma"
    assert flags.arch_flags(replace(FACTS, cpu_flags=frozenset())) == "-msse2"
    assert flags.arch_flags(replace(FACTS, machine="aarch64")) == "-fPIC"


def test_each_compiler_gets_a_core_and_two_gib() -> None:
    assert flags.jobs(FACTS) == 4
    assert flags.jobs(replace(FACTS, memory_gib=7.0)) == 3
    assert flags.jobs(replace(FACTS, memory_gib=0.5)) == 1


def test_nccl_is_asked_for_where_cuda_nvcc_and_nccl_are() -> None:
    gpu = replace(FACTS, torch=Torch("2.13.0", "13.0", True), cuda_home="/usr/local/cuda", nccl="/usr")
    assert flags.build_settings(gpu, {})["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert flags.build_settings(gpu, {"HOROVOD_GPU_OPERATIONS": "MPI"})["HOROVOD_GPU_OPERATIONS"] == "MPI"
    assert "HOROVOD_GPU_OPERATIONS" not in flags.build_settings(gpu, {"HOROVOD_GPU_ALLREDUCE": "MPI"})
    assert "HOROVOD_GPU_OPERATIONS" not in flags.build_settings(FACTS, {})
    assert "gets NCCL" in (flags.gpu_note(gpu, flags.build_settings(gpu, {})) or "")
    without = replace(gpu, cuda_home=None, nccl=None)
    assert "nvcc" in (flags.gpu_note(without, flags.build_settings(without, {})) or "")
    assert flags.gpu_note(FACTS, flags.build_settings(FACTS, {})) is None


@pytest.mark.parametrize(
    ("banner", "expected"),
    [
        ("mpicxx: Open MPI 4.1.4 (Language: C++)", ("Open MPI", "4.1.4")),
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to ...", ("Open MPI", "5.0.11")),
        ("mpicxx for MPICH version 4.0.2\nUsing built-in specs", ("MPICH", "4.0.2")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307", ("Intel MPI", "2021.9")),
        ("g++ (Debian 12.2.0-14) 12.2.0", ("an unknown MPI", "?")),
    ],
)
def test_mpi_is_known_by_its_banner(banner: str, expected: tuple[str, str]) -> None:
    assert mpi.parse(banner) == expected


def test_the_environment_s_mpi_goes_before_the_machine_s() -> None:
    assert mpi.choose(PYPI, DEBIAN).mpi == PYPI
    assert mpi.choose(None, DEBIAN).mpi == DEBIAN
    assert mpi.choose(None, None).mpi is None
    assert mpi.choose(None, DEBIAN, "pypi").mpi is None


def test_an_mpi_that_horovodrun_cannot_use_is_left_alone_with_a_sentence() -> None:
    for vendor, version in (("MPICH", "4.0.2"), ("Open MPI", "5.0.11")):
        choice = mpi.choose(None, mpi.Mpi(vendor, version, "/opt/mpi/bin", inside=False))
        assert choice.mpi is None
        assert f"{vendor} {version} in /opt/mpi/bin" in choice.note
        assert "Open MPI 4 only" in choice.note


def test_a_wish_for_an_mpi_that_cannot_be_is_refused() -> None:
    with pytest.raises(Missing, match="no mpicxx is on PATH.*libopenmpi-dev"):
        mpi.choose(None, None, "machine")
    with pytest.raises(Missing, match="MPICH 4.0.2.*is not Open MPI 4"):
        mpi.choose(None, mpi.Mpi("MPICH", "4.0.2", "/usr/bin", inside=False), "machine")
    with pytest.raises(Missing, match="Open MPI 5.0.11"):
        mpi.choose(mpi.Mpi("Open MPI", "5.0.11", "/env/bin", inside=True), None)


def test_mpi_settings_keep_what_the_user_has_set(tmp_path: Path) -> None:
    ready = mpi.settings({"PATH": "/usr/bin", "OMPI_MCA_mpi_yield_when_idle": "0"}, tmp_path / "bin", tmp_path)
    assert ready["OMPI_MCA_mpi_yield_when_idle"] == "0"
    assert ready["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    assert ready["PATH"] == f"{tmp_path}/bin:/usr/bin"
    assert "OPAL_PREFIX" not in ready
    without_ssh = mpi.settings({"PATH": str(tmp_path)}, tmp_path / "bin", tmp_path)
    assert without_ssh["OMPI_MCA_plm_rsh_agent"] == "false"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so").touch()
    assert mpi.settings({}, tmp_path / "bin", tmp_path)["OPAL_PREFIX"] == str(tmp_path)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("mpi_ops.cc:12:10: fatal error: Python.h: No such file or directory", "python3-dev"),
        ("context.cc:3:10: fatal error: mpi.h: No such file or directory", "libopenmpi-dev"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "--jobs 1"),
        ("cc1plus: error: x.o: No space left on device", "disk is full"),
        ("Compatibility with CMake < 3.5 has been removed from CMake.", "CMake is too new"),
        ("c10/util/C++20.h:7:2: error: #error C++20 or later compatible compiler is required", "GCC 11"),
        ("-- Could NOT find NCCL (missing: NCCL_INCLUDE_DIR)", "HOROVOD_NCCL_HOME"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "PIP_CERT"),
        ("ERROR: Could not find a version: No matching distribution found for horovod==0.28.1", "PIP_INDEX_URL"),
        ("something else", "none that is known"),
    ],
)
def test_a_failure_is_named(line: str, word: str) -> None:
    assert word in diagnosis.name(["Building", line, "exit code: 1"])


def test_the_lines_shown_are_the_last_that_look_like_errors() -> None:
    lines = ["cc -c a.cc", "a.cc:1: error: no", "x", "a.cc:1: error: no", "error: subprocess-exited-with-error", "bye"]
    assert diagnosis.telling(lines) == ["a.cc:1: error: no"]
    assert diagnosis.telling(["one", "", "two"]) == ["one", "two"]
    cmake = ["CMake Error at a.cmake:7 (message):", "  Could NOT find MPI", "  (missing: MPI_CXX)", "more"]
    assert diagnosis.telling(cmake) == [line.strip() for line in cmake[:3]]


def test_all_missing_tools_are_named_in_one_sentence() -> None:
    assert probe.missing_tools(True, True, True) is None
    sentence = probe.missing_tools(False, False, True)
    assert sentence is not None
    assert "apt-get install g++ python3-dev" in sentence
    assert "gcc-c++ python3-devel" in sentence


def test_cmake_is_brought_where_none_fits() -> None:
    assert [needs_cmake(t) for t in (None, "cmake version 3.10.2", "cmake version 4.0.2")] == [True] * 3
    assert not needs_cmake("cmake version 3.31.10\n\nCMake suite maintained ...")


def test_the_library_looks_for_its_neighbours_relative_to_itself() -> None:
    torch = "$ORIGIN/../../torch/lib"
    assert runpath("/v/lib:/v/lib/python3.11/site-packages/torch/lib", True, "/v") == f"$ORIGIN/../../../..:{torch}"
    assert runpath("/opt/mpi/lib:/v/lib/python3.11/site-packages/torch/lib", False, "/v") == f"{torch}:/opt/mpi/lib"
    assert runpath("", False, "/v") == torch
    assert runpath("", False, "/v", nccl=True) == f"{torch}:$ORIGIN/../../nvidia/nccl/lib"


def test_wheels_are_stored_whole_found_and_dropped(tmp_path: Path) -> None:
    wheel = tmp_path / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    assert cache.find(tmp_path, "0123") is None
    assert cache.store(tmp_path, "0123", wheel) == cache.find(tmp_path, "0123")
    assert [p.name for p in (tmp_path / "wheels" / "0123").iterdir()] == [wheel.name]
    cache.drop(tmp_path, "0123")
    assert cache.find(tmp_path, "0123") is None


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    assert cache.home({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "hybridpar"
    (tmp_path / "file").touch()
    assert tmp_path not in cache.home({"XDG_CACHE_HOME": str(tmp_path / "file")}).parents


def test_progress_shows_lines_and_keeps_the_log(tmp_path: Path) -> None:
    out, log = io.StringIO(), tmp_path / "log"
    script = "import time; print('[ 37%] Building', flush=True); time.sleep(0.5); raise SystemExit(3)"
    assert progress.follow([sys.executable, "-c", script], {}, log, "Building", out) == 3
    assert log.read_text() == "[ 37%] Building\n"
    assert out.getvalue().splitlines()[-1].startswith("Building  failed in 0:0")
    assert progress.percent("[100%] Linking") == 100
    assert progress.percent("nothing") is None


@pytest.mark.parametrize(
    ("code", "told", "works", "word"),
    [
        (0, 'smoke {"size": 2, "right": true, "mpi": true, "nccl": false}', True, ""),
        (0, 'smoke {"size": 1, "right": true, "mpi": true}', False, "world of 1"),
        (0, 'smoke {"size": 2, "right": true, "mpi": false}', False, "without MPI"),
        (1, "-----\nlibmpi.so.40: cannot open shared object file\n", False, "libmpi.so.40"),
        (None, "", False, "did not finish"),
    ],
)
def test_the_smoke_test_is_judged(code: int | None, told: str, works: bool, word: str) -> None:
    outcome = smoke.judge(code, told)
    assert outcome.works is works
    assert works or word in outcome.reason


def test_a_command_that_hangs_is_ended() -> None:
    assert smoke.captured(["sh", "-c", "echo here; sleep 60"], {"PATH": "/usr/bin:/bin"}, 1.0) == (None, "here\n")
    assert smoke.captured(["/no/such/program"], {}, 1.0)[0] == 127


def test_an_environment_that_was_moved_does_not_fit(tmp_path: Path) -> None:
    here = Path(sys.prefix)
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(here / "bin" / "python")
    (folder / venv.NOTE).write_text(f"/elsewhere\n{venv._this_python()}\n")
    assert not venv.fits(folder, any_python=True)
    (folder / venv.NOTE).write_text(f"{folder.resolve()}\nanother 3.10.0\n")
    assert not venv.fits(folder, any_python=False)
    assert not venv.fits(tmp_path / "nothing", any_python=True)


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(Missing, match="not touched"):
        venv.make(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_installer_needs_the_standard_library_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "hybridpar.install", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_every_example_of_the_installer_parses() -> None:
    commands = [line.strip().split("  ")[0] for line in EXAMPLES.splitlines() if "-m hybridpar.install" in line]
    assert len(commands) >= 5
    for command in commands:
        parser().parse_args(command.split("hybridpar.install")[1].split())


def test_wrong_use_of_the_installer_has_code_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--mpi", "mpich"], {}, io.StringIO())


def test_what_is_installed_is_recognised() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hybridpar.install"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "is installed already and works with torch" in done.stdout


def test_headers_are_fetched_for_the_operating_system_s_python_only(tmp_path: Path) -> None:
    if sysconfig.get_paths()["include"].startswith("/usr/include"):
        pytest.skip("this is the operating system's Python, and fetching is for the real thing")
    assert debian.headers(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_headers_that_were_fetched_before_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": f"/usr/include/{name}"})
    header = tmp_path / "usr" / "include" / name / "Python.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert debian.headers(tmp_path) == f"{header.parent}:{tmp_path / 'usr' / 'include'}"


def test_a_toolkit_of_links_has_its_own_nvcc(tmp_path: Path) -> None:
    real = tmp_path / "cuda"
    for name in ("bin/nvcc", "bin/ptxas", "include/cuda_runtime.h"):
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).touch()
    assert cuda.home({"CUDA_HOME": str(real), "PATH": ""}) == str(real)
    told = cuda.toolkit(real, flags.nvcc_wrapper(str(real), GCC, FACTS.torch), tmp_path / "links")
    assert told == {"HOROVOD_CUDA_HOME": str(tmp_path / "links"), "CUDA_HOME": str(real)}
    assert f"exec {real}/bin/nvcc" in (tmp_path / "links" / "bin" / "nvcc").read_text()
    assert (tmp_path / "links" / "bin" / "ptxas").resolve() == real / "bin" / "ptxas"
    assert (tmp_path / "links" / "include" / "cuda_runtime.h").exists()


def test_torch_s_version_is_read_without_importing_it() -> None:
    import torch

    assert smoke.torch_version() == torch.__version__


def test_a_kept_wheel_that_is_broken_is_a_reason_to_build_anew(tmp_path: Path) -> None:
    wheel = tmp_path / "horovod.whl"
    wheel.write_bytes(b"half a wheel")
    reason = steps._take(wheel, dict(os.environ))
    assert reason is not None
    assert "pip cannot install" in reason
