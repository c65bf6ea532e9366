"""Pipeline stages, one rank each: every rank observes its part, and one run folder holds all layers.

torchrun --nproc-per-node 2 examples/pipeline_stages.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional as F

from lightning_spectral import observe

VOCAB, WIDTH, LAYERS, BATCH, LENGTH, MICRO_BATCHES, STEPS = 64, 16, 4, 16, 64, 4, 20


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Part(nn.Module):
    """Some layers of the model, under the numbers that they have in the whole."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        own = range(stage * LAYERS // num_stages, (stage + 1) * LAYERS // num_stages)
        self.embedding = nn.Embedding(VOCAB, WIDTH) if stage == 0 else nn.Identity()
        self.layers = nn.ModuleDict({str(number): FeedForward() for number in own})
        self.head = nn.Linear(WIDTH, VOCAB) if stage == num_stages - 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers.values():
            x = x + layer(x)
        return self.head(x)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / MICRO_BATCHES


dist.init_process_group("gloo")
rank, num_stages = dist.get_rank(), dist.get_world_size()
groups = [dist.new_group([stage]) for stage in range(num_stages)]  # who holds the same part: here one rank each
torch.manual_seed(rank)
part = Part(rank, num_stages)
optimizer = torch.optim.AdamW(part.parameters(), lr=1e-3)
schedule = ScheduleGPipe(
    PipelineStage(part, rank, num_stages, torch.device("cpu")), MICRO_BATCHES, loss_fn=loss_of, scale_grads=False
)
counts = torch.arange(VOCAB, 0, -1)  # of each id in the training text, the same on every rank
settings = {"counts": counts, "num_steps": STEPS, "process_group": groups[rank]}
with observe(part, 10, out="out/examples/pipeline_stages", **settings) as probe:
    for step in range(STEPS):
        batch = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        probe.tokens(batch[:, :-1])  # stages behind the first are given no ids: whose row is whose
        if rank == 0:
            schedule.step(batch[:, :-1])
        else:
            schedule.step(**({"target": batch[:, 1:]} if rank == num_stages - 1 else {}))
        optimizer.step()
        optimizer.zero_grad()
        probe.step()
dist.destroy_process_group()
