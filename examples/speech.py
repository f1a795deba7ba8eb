"""Train an LSTM to recognise spoken digits over any mesh; more than 90 % of the digits of unheard voices are right.

    python examples/speech.py                                               one process
    hybridpar run -np 4 --pipeline 2 examples/speech.py                     2 replicas of 2 stages
    hybridpar run -np 2 --tensor 2 examples/speech.py                       hidden units on two ranks

The digits are spoken by espeak-ng (`apt install espeak-ng`), see examples/spoken.py. Without it the script says so and
ends with exit code 0.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from loop import steps, warm_then_falling
from spoken import BANDS, LEARNED, WORDS, espeak, spoken
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import hybridpar as hp
from hybridpar.models.speech import SpeechRecogniser


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="samples per step, over all replicas")
    parser.add_argument("--microbatches", type=int, default=2, help="pieces into which each replica cuts its part")
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved, or a CSV file")
    parser.add_argument("--width", type=int, default=64, help="features: hidden units of both directions")
    parser.add_argument("--depth", type=int, default=2, help="LSTM layers")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--voices", type=int, default=len(LEARNED), help="to learn from; half as many are for the test")
    parser.add_argument("--folder", type=Path, default=Path("runs/speech"), help="where the spectra are kept")
    return parser.parse_args()


class Utterances(Dataset):
    """((spectra, length), word) of each."""

    def __init__(self, said: TensorDataset) -> None:
        self.said = said

    def __len__(self) -> int:
        return len(self.said)

    def __getitem__(self, i: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        spectra, length, word = self.said[i]
        return (spectra, length), word


def main() -> None:
    args = arguments()
    mesh = hp.init()  # the degrees come from `hybridpar run`
    if espeak() is None:
        if mesh.rank == 0:
            print("skipped: this example needs espeak-ng to speak its data, and it is not here: apt install espeak-ng")
        return
    if mesh.rank == 0:
        spoken(args.folder, args.voices)  # one rank has the words spoken for all
    mesh.everyone.barrier()
    learned, held_back = spoken(args.folder, args.voices)
    loader = hp.DataLoader(Utterances(learned), mesh, batch_size=args.batch, drop_last=True)

    model = SpeechRecogniser(BANDS, len(WORDS), args.width, args.depth, args.dropout)
    model = hp.parallelize(model, mesh, loss=torch.nn.functional.cross_entropy, schedule=args.schedule)
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = hp.DistributedOptimizer(adam, model, clip=1.0)
    rate = warm_then_falling(adam, args.steps)
    if mesh.rank == 0:
        print(model.report)
        print(f"{len(learned)} utterances to learn from, {len(held_back)} in other voices")

    began = time.perf_counter()
    with hp.Watch(model, optimizer, total=args.steps, every=5) as watch:
        for batch in steps(loader, args.steps):
            loss = model.train_step(batch, args.microbatches)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            watch.step(loss, batch)
    seconds = time.perf_counter() - began

    spectra, lengths, words = held_back.tensors
    right = (model.predict((spectra, lengths), microbatches=4).argmax(1) == words).float().mean()
    if mesh.rank == 0:
        print(f"trained {args.steps} steps in {seconds:.0f} s on {mesh.mesh}; training loss {loss:.3f}")
        print(f"{right:.1%} of the {len(words)} digits in voices never heard are recognised")


if __name__ == "__main__":
    main()
