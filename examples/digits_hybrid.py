"""Handwritten digits with Horovod and hybridpar: the same script, hybrid parallel.

    horovodrun -np 4 python examples/digits_hybrid.py
"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hybridpar as hp

mesh = hp.init(tensor=2)
torch.manual_seed(0)
torch.set_num_threads(1)

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (images / 16).float()  # [1797, 64]
train, test = TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])
sampler = DistributedSampler(train, num_replicas=hvd.size(), rank=hvd.rank(), seed=0)
loader = DataLoader(train, batch_size=60 // hvd.size(), sampler=sampler)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
model = hp.parallelize(model, mesh, loss=F.cross_entropy, plan={"0": "column", "2": "row", "4": "column"})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

for epoch in range(12):
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        loss = model.train_step((x, y))
        optimizer.step()

with torch.no_grad():
    right = (model.predict(test[0]).argmax(1) == test[1]).float().mean()
if mesh.rank == 0:
    print(f"{mesh.mesh}: loss {loss:.4f}, {right:.1%} of the test digits read correctly")
