"""Train a 3-D U-Net to find ellipsoids in noise over any mesh; the Dice score is above 0.90 on volumes never seen.

    python examples/unet3d.py                                               one process
    hybridpar run -np 4 --pipeline 2 examples/unet3d.py                     2 replicas of 2 stages
    hybridpar run -np 2 --tensor 2 examples/unet3d.py                       the channels of every layer cut in two
    hybridpar run -np 2 --tensor 2 examples/unet3d.py --space               every volume cut in two

The volumes are made here, so the answer is known: in a cube of noise a few ellipsoids of random place, size and
brightness, each with a darker shell that is not to be found. A volume is a function of its number. Dice score: twice
the voxels that are rightly found, over those found and those there (Dice 1945; Milletari et al. 2016).
"""

from __future__ import annotations

import argparse
import time

import torch
from loop import steps, warm_then_falling
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

import hybridpar as hp
from hybridpar.models.unet import UNet


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8, help="samples per step, over all replicas")
    parser.add_argument("--microbatches", type=int, default=2, help="pieces into which each replica cuts its part")
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved, or a CSV file")
    parser.add_argument("--widths", type=int, nargs="+", default=(8, 16, 32), help="channels of each level")
    parser.add_argument("--side", type=int, default=20, help="voxels along each side of a volume")
    parser.add_argument("--space", action="store_true", help="cut volumes over the tensor axis instead of channels")
    parser.add_argument("--norm", default="group", choices=("batch", "group"))
    parser.add_argument("--lr", type=float, default=1e-2)
    return parser.parse_args()


class Ellipsoids(Dataset):
    """Volumes [1, side, side, side] and where their ellipsoids are (1) and are not (0), in the same shape."""

    def __init__(self, first: int, count: int, side: int) -> None:
        self.first, self.count, self.side = first, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.first + i)
        places = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, self.side)] * 3, indexing="ij"), -1)
        volume = torch.zeros(places.shape[:3])
        found = torch.zeros(places.shape[:3], dtype=torch.bool)
        for _ in range(int(torch.randint(1, 4, (), generator=random))):
            centre, radii, brightness = (torch.rand(n, generator=random) for n in (3, 3, 1))
            turned, _ = torch.linalg.qr(torch.randn(3, 3, generator=random))
            away = ((places - (centre - 0.5)) @ turned / (0.25 + 0.35 * radii)).norm(dim=-1)  # 1 on the surface
            volume = torch.where(away < 1.3, -0.5, volume)
            volume = torch.where(away < 1, 0.5 + brightness, volume)
            found = found & (away >= 1.3) | (away < 1)
        volume = volume + 0.7 * torch.randn(volume.shape, generator=random)
        return volume[None], found[None].float()


def dice(probabilities: Tensor, there: Tensor) -> Tensor:  # [b, 1, x, y, z] twice -> [b]
    """The Dice score of each sample."""
    both = (probabilities * there).flatten(1).sum(1)
    return (2 * both + 1) / (probabilities.flatten(1).sum(1) + there.flatten(1).sum(1) + 1)


def loss_of(logits: Tensor, there: Tensor) -> Tensor:
    """Cross entropy of the voxels and what the soft Dice score lacks, the mean over the samples."""
    return F.binary_cross_entropy_with_logits(logits, there) + (1 - dice(logits.sigmoid(), there)).mean()


def main() -> None:
    args = arguments()
    mesh = hp.init()  # the degrees come from `hybridpar run`
    loader = hp.DataLoader(Ellipsoids(1000, 4000, args.side), mesh, batch_size=args.batch, drop_last=True)
    model = UNet(colours=1, classes=1, widths=args.widths, norm=args.norm)
    by_space = {"": "space"} if mesh.pipeline.size == 1 else model.space_plan  # stages are cut part by part
    plan = by_space if args.space else model.tensor_plan
    model = hp.parallelize(model, mesh, loss=loss_of, schedule=args.schedule, plan=plan)
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = hp.DistributedOptimizer(adam, model, clip=1.0)
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

    held_back = Ellipsoids(0, 40, args.side)
    volumes, there = map(torch.stack, zip(*[held_back[i] for i in range(len(held_back))]))
    score = dice((model.predict(volumes, microbatches=10) > 0).float(), there).mean()
    if mesh.rank == 0:
        print(f"trained {args.steps} steps in {seconds:.0f} s on {mesh.mesh}; training loss {loss:.3f}")
        print(
            f"Dice score {score:.3f} on 40 volumes never seen; calling all bright voxels found: "
            f"{dice((volumes > 0.6).float(), there).mean():.3f}"
        )


if __name__ == "__main__":
    main()
