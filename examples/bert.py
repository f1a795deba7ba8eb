"""Train BERT to fill gaps in real text over any mesh; it must do better than one who knows how often words occur.

    python examples/bert.py                                                 one process
    hybridpar run -np 4 --pipeline 2 examples/bert.py                       2 replicas of 2 stages
    hybridpar run -np 8 --tensor 2 --pipeline 2 examples/bert.py            2 x 2 x 2

The text is that of examples/gpt.py. Which tokens of a sample are masked is a function of the sample, so the loss is the
same in every layout; each sample comes ten times, with other masks (Devlin et al. 2019, section A.1).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from loop import steps, warm_then_falling
from text import Text, standard_library
from torch import Tensor
from torch.utils.data import Dataset

import hybridpar as hp
from hybridpar.models.bert import BERT

IGNORED = -100  # what hp.CrossEntropy does not count


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="samples per step, over all replicas")
    parser.add_argument("--microbatches", type=int, default=4, help="pieces into which each replica cuts its part")
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved, or a CSV file")
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism beside tensor parallelism")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--post-norm", action="store_true", help="as in the paper; pre-norm learns faster")
    parser.add_argument("--masked", type=float, default=0.2, help="which share of the tokens is to be told")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text")
    parser.add_argument("--folder", type=Path, default=Path("runs/bert"), help="where the tokens are kept")
    return parser.parse_args()


class Gaps(Dataset):
    """Windows of tokens with some masked, and what stood there; everywhere else the target is IGNORED.

    Of the chosen tokens 8 of 10 become the mask, one another token, and one stays. Sample i is window i % windows, and
    what is chosen depends on i alone.
    """

    def __init__(self, tokens: Tensor, length: int, share: float, mask: int, copies: int) -> None:
        self.windows = tokens[: len(tokens) // length * length].view(-1, length)
        self.share, self.mask, self.copies = share, mask, copies

    def __len__(self) -> int:
        return self.copies * len(self.windows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = self.windows[i % len(self.windows)]
        generator = torch.Generator().manual_seed(i)
        chosen = torch.rand(len(window), generator=generator) < self.share
        becomes = torch.rand(len(window), generator=generator)
        other = torch.randint(self.mask, window.shape, generator=generator)
        seen = torch.where(chosen & (becomes < 0.8), self.mask, window)
        seen = torch.where(chosen & (becomes >= 0.9), other, seen)
        return seen, torch.where(chosen, window, IGNORED)


def main() -> None:
    args = arguments()
    mesh = hp.init()  # the degrees come from `hybridpar run`
    if mesh.rank == 0:
        standard_library(args.vocabulary, args.megabytes, args.folder)  # one rank prepares the text for all
    mesh.everyone.barrier()
    text = standard_library(args.vocabulary, args.megabytes, args.folder)
    mask = args.vocabulary  # one token more than the text has
    training, validation = (
        hp.DataLoader(Gaps(tokens, args.context, args.masked, mask, copies), mesh, args.batch, drop_last=True)
        for tokens, copies in ((text.train, 10), (text.validation, 1))
    )

    model = BERT(mask + 1, args.width, args.depth, args.heads, args.context, args.dropout, pre_norm=not args.post_norm)
    model = hp.parallelize(model, mesh, loss=hp.CrossEntropy(), schedule=args.schedule, sequence=args.sequence)
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    optimizer = hp.DistributedOptimizer(adam, model, clip=1.0)
    rate = warm_then_falling(adam, args.steps)
    if mesh.rank == 0:
        print(model.report)
        print(f"text: {text.megabytes:.1f} MB, {len(text.train):,} tokens, {len(text.validation):,} held back")

    began = time.perf_counter()
    with hp.Watch(model, optimizer, total=args.steps, every=5) as watch:
        for batch in steps(training, args.steps):
            loss = model.train_step(batch, args.microbatches)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            watch.step(loss, batch)
    seconds = time.perf_counter() - began

    batches = [batch for batch, _ in zip(validation, range(20))]
    told = sum(model.eval_step(batch, args.microbatches) for batch in batches) / len(batches)
    right, unigram = known(model, batches, text, mesh)
    if mesh.rank == 0:
        print(f"trained {args.steps} steps in {seconds:.0f} s on {mesh.mesh}; training loss {loss:.3f}")
        print(
            f"validation loss {told:.3f} nats per masked token; knowing frequencies only: {unigram:.3f} "
            f"(unigram entropy); {right:.1%} of the masked tokens are told"
        )


def known(model: hp.ParallelModel, batches: list[tuple[Tensor, Tensor]], text: Text, mesh: hp.World) -> Tensor:
    """Of all masked tokens: the share that the model tells, and the nats that each costs by its frequency alone."""
    counts = torch.bincount(text.train, minlength=text.tokenizer.get_vocab_size()) + 1.0
    nats = -(counts / counts.sum()).log()
    sums = torch.zeros(3, dtype=torch.float64)
    for seen, wanted in batches:
        masked = wanted != IGNORED
        told = model.predict(seen).argmax(-1)
        sums += torch.stack([(told == wanted).sum(), nats[wanted[masked]].sum(), masked.sum()])
    right, cost, count = mesh.peers.allreduce(sums)  # over the replicas: each has its part of every batch
    return torch.stack([right, cost]) / count


if __name__ == "__main__":
    main()
