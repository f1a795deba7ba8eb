"""Handwritten digits with Horovod: data parallel, as its users have written it for years.

    horovodrun -np 2 python examples/digits_horovod.py
"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

hvd.init()
torch.manual_seed(0)
torch.set_num_threads(1)

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (images / 16).float()  # [1797, 64]
train, test = TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])
sampler = DistributedSampler(train, num_replicas=hvd.size(), rank=hvd.rank(), seed=0)
loader = DataLoader(train, batch_size=60 // hvd.size(), sampler=sampler)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

for epoch in range(12):
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

with torch.no_grad():
    right = (model(test[0]).argmax(1) == test[1]).float().mean()
if hvd.rank() == 0:
    print(f"{hvd.size()} replicas: loss {loss.item():.4f}, {right:.1%} of the test digits read correctly")
