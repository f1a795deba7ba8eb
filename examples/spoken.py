"""Spoken digits for examples/speech.py, made with espeak-ng: many voices, accents, speeds and pitches.

    voices to learn from and voices to be tested with are different ones

A sound becomes a log mel spectrum: the energy in bands that are as wide as the ear hears them (Stevens et al. 1937),
every hundredth of a second.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEARNED = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "klatt", "klatt2", "Andy", "Annie", "Mario", "Steph")
HELD_BACK = ("m7", "m8", "f4", "f5", "klatt4", "Alex", "Linda", "Michael")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland")
BANDS, HERTZ, FRAMES = 40, 22050, 120  # a second and a fifth, longer than any digit here


def espeak() -> str | None:
    """Where espeak-ng is, if it is installed."""
    return shutil.which("espeak-ng")


def spoken(folder: Path, voices: int) -> tuple[TensorDataset, TensorDataset]:
    """To learn from and to be tested with: spectra [n, t, m], lengths [n], words [n].

    The first `voices` of those to learn from, and half as many others; kept in `folder` for the next time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"spoken-{voices}.pt"
    if not kept.exists():
        learned = _said(LEARNED[:voices], ((130, 35), (160, 50), (190, 65)))
        held_back = _said(HELD_BACK[: (voices + 1) // 2], ((145, 45), (175, 60)))
        beside = kept.with_suffix(".new.pt")
        torch.save((learned, held_back), beside)
        beside.replace(kept)  # whole or not at all, for whoever reads it next
    learned, held_back = torch.load(kept, weights_only=True)
    return TensorDataset(*learned), TensorDataset(*held_back)


def _said(voices: tuple[str, ...], manners: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """All words in all voices, accents and manners (words per minute, pitch from 0 to 99)."""
    todo = list(product(range(len(WORDS)), voices, ACCENTS, manners))
    with ThreadPoolExecutor(4) as pool:
        spectra = list(pool.map(lambda one: _spectrum(_say(WORDS[one[0]], f"{one[2]}+{one[1]}", *one[3])), todo))
    padded = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, FRAMES - len(s))) for s in spectra])
    return [padded, torch.tensor([len(s) for s in spectra]), torch.tensor([one[0] for one in todo])]


def _say(word: str, voice: str, speed: int, pitch: int) -> Tensor:
    """The sound of one word, between -1 and 1, without the silence around it."""
    command = [espeak(), "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    done = subprocess.run(command, capture_output=True, check=True)
    with wave.open(io.BytesIO(done.stdout)) as file:
        assert file.getframerate() == HERTZ, f"espeak-ng speaks at {file.getframerate()} Hz"
        sound = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    loud = np.nonzero(np.abs(sound) > 0.02 * np.abs(sound).max())[0]
    return torch.from_numpy(sound[loud[0] : loud[-1] + 1] / 2.0**15).float()


def _spectrum(sound: Tensor) -> Tensor:  # [samples] -> [t, m]
    """The log mel spectrum, each band with mean 0 over the word, so that loudness does not tell the voice."""
    size, hop = 512, HERTZ // 100
    sound = torch.nn.functional.pad(sound, (0, size))
    frames = torch.stft(sound, size, hop, window=torch.hann_window(size), center=False, return_complex=True)
    energy = frames.abs().square().T[:FRAMES] @ _mel(size // 2 + 1)
    spectrum = (energy + 1e-4).log()
    return (spectrum - spectrum.mean()) / spectrum.std()


def _mel(lines: int) -> Tensor:  # -> [lines, m]
    """How much each line of a spectrum counts in each band: triangles, evenly spaced in mel, which overlap by half."""
    hertz = torch.linspace(0, HERTZ / 2, lines)
    mel = 2595 * torch.log10(1 + hertz / 700)
    ends = torch.linspace(0, float(mel[-1]), BANDS + 2)
    width = ends[1]
    return (1 - (mel[:, None] - ends[1:-1]).abs() / width).clamp(min=0)
