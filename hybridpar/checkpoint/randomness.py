"""The generators of torch, Python and NumPy, which data sets and modules draw from.

hybridpar's own masks and orders are functions of the step and have no generator. What draws from these (augmentation in
a data set, a dropout between an LSTM's layers) goes on exactly on the same mesh; with as many replicas on another mesh
each replica goes on with the state of its first rank; with another number, replica d with that of d modulo the earlier.
"""

from __future__ import annotations

import json
import random
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hybridpar.checkpoint.plain import from_plain, to_plain
from hybridpar.mesh import Mesh


def state(device: torch.device) -> str:
    """This rank's generators, as JSON."""
    version, words, gauss = random.getstate()
    found = {"torch": torch.get_rng_state(), "python": (version, array("I", words).tobytes(), gauss)}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, words, *rest = numpy.random.get_state()
        found["numpy"] = (kind, words.tobytes(), *rest)
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return json.dumps(to_plain(found, "randomness"))


def merged(states: Sequence[str]) -> dict[str, Any]:
    """All ranks' states, each different one once."""
    different = list(dict.fromkeys(states))
    return {"states": [json.loads(one) for one in different], "ranks": [different.index(one) for one in states]}


def mine(saved: Mapping[str, Any], then: Mesh, now: Mesh, rank: int) -> Any:
    """The state that `rank` goes on with, of what `merged` gave on the mesh `then`."""
    place = now.place(rank)
    source = rank if then == now else then.rank(place.data % then.data)
    return saved["states"][saved["ranks"][source]]


def restore(saved: Any, device: torch.device) -> None:
    """Set this rank's generators."""
    told = from_plain(saved)
    torch.set_rng_state(told["torch"])
    version, words, gauss = told["python"]
    random.setstate((version, tuple(array("I", words)), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in told:
        kind, words, *rest = told["numpy"]
        numpy.random.set_state((kind, numpy.frombuffer(words, dtype=numpy.uint32), *rest))
    if device.type == "cuda" and "cuda" in told:
        torch.cuda.set_rng_state(told["cuda"], device)
