"""Real text for the examples: the source of the Python standard library that runs them, as tokens.

Several megabytes, on every machine, without a download. The tokenizer is a byte-level BPE trained on the same text.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Text:
    """Tokens to train on, tokens to validate on, and the tokenizer that made them."""

    train: Tensor  # [n] int64
    validation: Tensor
    tokenizer: ByteLevelBPETokenizer
    megabytes: float

    def unigram_entropy(self) -> float:
        """Nats per token of the validation text for one who knows how often each token occurs, and nothing else."""
        counts = np.bincount(self.train.numpy(), minlength=self.tokenizer.get_vocab_size()) + 1.0
        return float(-np.log(counts / counts.sum())[self.validation.numpy()].mean())


class Windows(Dataset):
    """Consecutive windows of `length` tokens, and for each token the one that follows."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = self.tokens[i * self.length : (i + 1) * self.length + 1]
        return window[:-1], window[1:]


def standard_library(vocabulary: int, megabytes: float, folder: Path) -> Text:
    """The running interpreter's standard library; tokens are kept in `folder` for the next time.

    A tenth of the files, chosen by their names, is for validation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"text-{sys.version_info[0]}.{sys.version_info[1]}-{vocabulary}-{megabytes:g}.npz"
    learned = kept.with_suffix(".json")
    if not kept.exists():
        train, validation = _read(megabytes)
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(train, vocab_size=vocabulary, show_progress=False)
        tokenizer._tokenizer.save(str(learned))
        parts = {"train": train, "validation": validation}
        tokens = {name: [i for e in tokenizer.encode_batch(files) for i in e.ids] for name, files in parts.items()}
        arrays = {name: np.array(ids, dtype=np.uint16) for name, ids in tokens.items()}
        size = sum(len(f.encode()) for files in parts.values() for f in files) / 1e6
        beside = kept.with_suffix(".new.npz")
        np.savez(beside, size=size, **arrays)
        beside.replace(kept)  # whole or not at all, for whoever reads it next
    tokenizer = ByteLevelBPETokenizer()
    tokenizer._tokenizer = tokenizer._tokenizer.from_file(str(learned))
    with np.load(kept) as file:
        train, validation = (torch.from_numpy(file[part].astype(np.int64)) for part in ("train", "validation"))
        return Text(train, validation, tokenizer, float(file["size"]))


def _read(megabytes: float) -> tuple[list[str], list[str]]:
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests"}
    files = sorted(p for p in folder.rglob("*.py") if not left_out & set(p.parts))
    files.sort(key=lambda p: hashlib.sha256(str(p.relative_to(folder)).encode()).digest())  # mixed, but always alike
    chosen, size = [], 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        size += len(text)
        chosen.append(text)
        if size > megabytes * 1e6:
            break
    held = max(1, len(chosen) // 10)
    return chosen[held:], chosen[:held]
