"""Train a GPT on real text over any mesh.

    python examples/gpt.py                                                  one process
    hybridpar run -np 4 --pipeline 2 examples/gpt.py                        2 replicas of 2 stages
    hybridpar run -np 8 --tensor 2 --pipeline 2 examples/gpt.py             2 x 2 x 2
    hybridpar run -np 2 --tensor 2 examples/gpt.py --save 100               a checkpoint every 100 steps
    hybridpar run -np 4 --pipeline 2 examples/gpt.py --resume               goes on from the newest, on any mesh

The loss is the same in every layout; only the time differs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from text import Text, Windows, standard_library

import hybridpar as hp
from hybridpar.models.gpt import GPT
from hybridpar.pipeline.simulate import Cost, simulate
from hybridpar.trace.svg import svg
from hybridpar.trace.text import gantt


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="samples per step, over all replicas")
    parser.add_argument("--microbatches", type=int, default=4, help="pieces into which each replica cuts its part")
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved, or a CSV file")
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism beside tensor parallelism")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt"), help="where results go")
    parser.add_argument("--save", type=int, default=0, metavar="STEPS", help="a checkpoint every so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    mesh = hp.init()  # the degrees come from `hybridpar run`
    first = mesh.rank == 0
    if first:
        standard_library(args.vocabulary, args.megabytes, args.folder)  # one rank prepares the text for all
    mesh.everyone.barrier()
    text = standard_library(args.vocabulary, args.megabytes, args.folder)

    shape = dict(
        vocabulary=args.vocabulary, width=args.width, depth=args.depth, heads=args.heads, context=args.context
    )
    model = hp.parallelize(
        GPT(**shape, dropout=args.dropout), mesh, loss=hp.CrossEntropy(), schedule=args.schedule, sequence=args.sequence
    )
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = hp.DistributedOptimizer(adam, model, clip=1.0)
    warm = min(20, args.steps // 4 + 1)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda s: min((s + 1) / warm, _cosine(s, warm, args.steps)))
    training = hp.DataLoader(Windows(text.train, args.context), mesh, batch_size=args.batch, drop_last=True)
    validation = hp.DataLoader(
        Windows(text.validation, args.context), mesh, batch_size=args.batch, drop_last=True
    )
    checkpoints = hp.Checkpoints(args.folder / "checkpoints", keep=3, asynchronous=True)
    parts = (model, optimizer, rate, training)
    found = checkpoints.load(*parts) if args.resume else None
    done = found.step if found else 0
    if first:
        print(model.report)
        if found:
            print(f"goes on after step {done}, from {found.path} written on {found.mesh}")
        print(f"text: {text.megabytes:.1f} MB, {len(text.train):,} tokens, {len(text.validation):,} held back")

    loss = math.nan
    began = time.perf_counter()
    tensorboard = args.folder / "tensorboard"
    with hp.Watch(
        model, optimizer, total=args.steps, every=5, jsonl=args.folder / "metrics.jsonl", tensorboard=tensorboard
    ) as watch:
        for step, batch in zip(range(done + 1, args.steps + 1), endless(training)):
            loss = model.train_step(batch, microbatches=args.microbatches)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss, batch, lr=rate.get_last_lr()[0])
            rate.step()
            if args.save and step % args.save == 0:
                checkpoints.save(*parts, metrics={"loss": loss})
    seconds, measured = time.perf_counter() - began, model.trace()

    losses = [model.eval_step(b, args.microbatches) for b, _ in zip(validation, range(20))]
    state = model.full_state_dict()
    if first:
        print(f"trained {args.steps} steps in {seconds:.0f} s on {mesh.mesh}; training loss {loss:.3f}")
        print(f"validation loss {sum(losses) / len(losses):.3f} nats per token; knowing frequencies only: "
              f"{text.unigram_entropy():.3f} (unigram entropy)")
        if done < args.steps:
            show_pipeline(model, measured, args)
        save_and_sample(state, shape, text, args.folder)


def _cosine(step: int, warm: int, steps: int) -> float:
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, max(0, step - warm) / max(1, steps - warm))))


def endless(loader: hp.DataLoader):
    """Batches for ever, epoch after epoch."""
    while True:
        yield from loader


def show_pipeline(model: hp.ParallelModel, measured, args: argparse.Namespace) -> None:
    """One step of the first replica's pipeline: as the schedule promises, and as it was."""
    schedule = model.schedule(args.microbatches)
    promised = simulate(schedule, Cost.measured(measured, schedule.ranks))
    print(gantt(promised, measured, width=100))
    (args.folder / "pipeline.svg").write_text(svg(promised, measured, title=f"{schedule.name}, one training step"))
    print(f"drawn in {args.folder / 'pipeline.svg'}")


def save_and_sample(state: dict, shape: dict, text: Text, folder: Path) -> None:
    """The model as plain PyTorch: saved, loaded, and asked to go on with a line of Python."""
    path = folder / "model.pt"
    torch.save({"shape": shape, "state": state}, path)
    saved = torch.load(path, weights_only=True)
    plain = GPT(**saved["shape"]).eval()
    plain.load_state_dict(saved["state"])
    torch.manual_seed(0)
    prompt = text.tokenizer.encode("def read(self, path):\n").ids
    told = plain.generate(torch.tensor([prompt]), tokens=60, temperature=0.8)[0].tolist()
    print(f"saved in {path}; plain PyTorch reads it and goes on:\n{text.tokenizer.decode(told)}")


if __name__ == "__main__":
    main()
