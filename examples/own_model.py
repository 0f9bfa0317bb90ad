"""A model of your own: torchrun --nproc-per-node 2 examples/own_model.py AXIS (replica, shard or tensor)."""

import sys
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

import meshwright.parallel as mp
from meshwright.spec import Layout, SplitTable

BATCH, SEQUENCE, TOKENS, WIDTH = 8, 32, 64, 32
TABLE: SplitTable = {  # how each module is split along tensor
    "words": "vocabulary",
    "layers.*.norm": "sequence",
    "layers.*.think": "gather",
    "layers.*.think.0": "column",
    "layers.*.think.2": "row",
    "head": "logits",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.think = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.think(self.norm(x))


def build_net() -> nn.Module:
    parts = {"words": nn.Embedding(TOKENS, WIDTH), "layers": nn.Sequential(Block(), Block())}
    return nn.Sequential(OrderedDict(**parts, head=nn.Linear(WIDTH, TOKENS, bias=False)))


if sys.argv[1:] not in (["replica"], ["shard"], ["tensor"]) or not dist.is_torchelastic_launched():
    sys.exit(__doc__)
device = mp.start_distributed()
layout = Layout(**{sys.argv[1]: dist.get_world_size()}, precision="fp32")
mesh = mp.build_mesh(layout, device)
torch.manual_seed(0)  # the same values on every rank
model = mp.parallelize(build_net(), layout, mesh, blocks=["layers.*"], tail=["head"], table=TABLE)
loss_of = mp.build_token_loss(TOKENS, layout, mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(20):
    whole = torch.randint(TOKENS, (BATCH, 1)) + torch.arange(SEQUENCE + 1)  # each token is the one before, plus 1
    share = (whole % TOKENS).chunk(layout.data_size)[mp.data_rank(mesh)].to(device)
    mp.begin_microbatch(model, layout, last=True)
    loss = loss_of(model(share[:, :-1]), share[:, 1:]) / (BATCH * SEQUENCE)
    loss.backward()
    totals = mp.reduce_step(loss, mp.squared_norm(model), layout, stop=False)
    mp.clip_gradients(model, totals.gradient_norm, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 5 == 4:
        print(f"step {step + 1}  loss {totals.loss.item():.4f}")
mp.stop_distributed()
