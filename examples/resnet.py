"""Train a ResNet to read handwritten digits over any mesh; more than 97 % of the digits of other writers are right.

    python examples/resnet.py                                               one process
    hybridpar run -np 4 --pipeline 2 examples/resnet.py                     2 replicas of 2 stages
    hybridpar run -np 2 --tensor 2 examples/resnet.py --norm group          cut over the tensor axis

The images are scikit-learn's: 1,797 digits of 8 x 8, of which the last 297 are held back. Each of the others is shown
in nine places, shifted by a pixel. With `--norm batch` a replica normalises over its own samples, as always with batch
norms; with `--norm group` the loss is the same in every layout.
"""

from __future__ import annotations

import argparse
import time

import torch
from loop import steps, warm_then_falling
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hybridpar as hp
from hybridpar.models.resnet import ResNet


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="samples per step, over all replicas")
    parser.add_argument("--microbatches", type=int, default=2, help="pieces into which each replica cuts its part")
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved, or a CSV file")
    parser.add_argument("--widths", type=int, nargs="+", default=(16, 32, 64), help="channels of each size of image")
    parser.add_argument("--depth", type=int, default=1, help="blocks of each width")
    parser.add_argument("--norm", default="batch", choices=("batch", "group"))
    parser.add_argument("--lr", type=float, default=5e-3)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    mesh = hp.init()  # the degrees come from `hybridpar run`
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = (images / 16).float().view(-1, 1, 8, 8)
    digits = TensorDataset(shifted(images[:1500]), labels[:1500].repeat(9))
    loader = hp.DataLoader(digits, mesh, batch_size=args.batch, drop_last=True)

    model = ResNet(colours=1, classes=10, widths=args.widths, depth=args.depth, norm=args.norm)
    model = hp.parallelize(model, mesh, loss=torch.nn.CrossEntropyLoss(label_smoothing=0.1), schedule=args.schedule)
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    optimizer = hp.DistributedOptimizer(adam, model)
    rate = warm_then_falling(adam, args.steps)
    if mesh.rank == 0:
        print(model.report)

    began = time.perf_counter()
    with hp.Watch(model, optimizer, total=args.steps, every=5) as watch:
        for batch in steps(loader, args.steps):
            loss = model.train_step(batch, args.microbatches)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            watch.step(loss, batch)
    seconds = time.perf_counter() - began

    right = (model.predict(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    if mesh.rank == 0:
        print(f"trained {args.steps} steps in {seconds:.0f} s on {mesh.mesh}; training loss {loss:.3f}")
        print(f"{right:.1%} of the 297 digits held back are read correctly")


def shifted(images: Tensor) -> Tensor:
    """All images nine times: where they are, and a pixel away in every direction."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1))
    return torch.cat([padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)])


if __name__ == "__main__":
    main()
