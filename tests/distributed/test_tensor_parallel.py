"""Tensor and sequence parallelism as torchtitan and Lightning's example lay it out: the records of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lightning_spectral as ls
from lightning_spectral.models.shards import tensor_mesh
from lightning_spectral.probe.attaching import _with_other_data
from lightning_spectral.records import SpectralRecord, read_losses, read_spectral
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
VOCAB, DIM, LAYERS, BATCH, STEPS = 60, 16, 2, 8, 3
COUNTS = np.arange(VOCAB, 0, -1) ** 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.feed_forward = FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.feed_forward(self.norm(x))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.gelu(self.w1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleDict({str(k): Block() for k in range(LAYERS)})
        self.norm = nn.LayerNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x)).clone()  # FSDP2 warns of views


def parallelize(net: Net, mesh: Any, *, embedding_in_parts: bool) -> None:
    embedded = Shard(1) if embedding_in_parts else Replicate()
    plan: dict[str, Any] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=embedded),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    if not embedding_in_parts:
        plan["layers.0"] = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        )
    parallelize_module(net, mesh, plan)
    for layer in net.layers.values():
        parallelize_module(
            layer,
            mesh,
            {
                "norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
            },
        )


def batch_of(step: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (BATCH, length + 1), generator=torch.Generator().manual_seed(step))


def train(net: Net, path: str, length: int, rank: int = 0, replicas: int = 1, group: Any = None) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with ls.observe(net, 1, out=path, counts=COUNTS, background=False) as probe:
        for step in range(STEPS):
            own = batch_of(step, length).chunk(replicas)[rank]
            F.cross_entropy(net(own[:, :-1]).flatten(0, 1), own[:, 1:].flatten()).backward()
            for param in net.parameters() if group is not None else ():
                dist.all_reduce(param.grad.to_local(), group=group)
                param.grad /= replicas
            optimizer.step()
            optimizer.zero_grad()
            probe.step()


def in_parts(rank: int, world_size: int, path: str, length: int, kind: str, embedding_in_parts: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    net, place = Net(), mesh["dp"].get_local_rank()
    parallelize(net, mesh["tp"], embedding_in_parts=embedding_in_parts)
    if kind == "fsdp2":
        for layer in net.layers.values():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
        train(net, path, length, place, world_size // 2)
    elif kind == "replicated":  # as under DDP: parameters know of the tensor mesh only
        train(net, path, length, place, world_size // 2, mesh["dp"].get_group())
    else:
        train(net, path, length)


def by_key(path: Path) -> dict[Any, SpectralRecord]:
    return {(r.step, r.layer, r.site, r.bucket): r for r in read_spectral(path).records}


@pytest.mark.parametrize("embedding_in_parts", [False, True])
@pytest.mark.parametrize(("kind", "world_size", "length"), [("tp", 2, 12), ("fsdp2", 4, 12), ("replicated", 4, 12)])
def test_records_are_those_of_one_process(
    tmp_path: Path, kind: str, world_size: int, length: int, embedding_in_parts: bool
) -> None:
    train(Net(), str(tmp_path / "one"), length)
    run_ranks(in_parts, world_size, str(tmp_path / "parts"), length, kind, embedding_in_parts)
    one, parts = by_key(tmp_path / "one"), by_key(tmp_path / "parts")
    assert one.keys() == parts.keys()
    for key, record in parts.items():
        assert (record.layout, record.status, record.world_size) == ("(B, T)", one[key].status, world_size // 2)
        assert (record.num_tokens, record.num_sequences) == (one[key].num_tokens, one[key].num_sequences)
        assert record.tokens_seen == one[key].tokens_seen == key[0] * BATCH * length
        assert record.hard_rank == pytest.approx(one[key].hard_rank, rel=1e-4)
        assert record.soft_rank == pytest.approx(one[key].soft_rank, rel=1e-4)
    losses = [[(r.num_tokens, r.loss) for r in read_losses(tmp_path / name).records] for name in ("one", "parts")]
    for (count, loss), (other_count, other_loss) in zip(*losses, strict=True):
        assert count == other_count
        assert loss == pytest.approx(other_loss, rel=1e-5)


def train_transformers(rank: int, world_size: int, saved: str, path: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved, **({"tp_plan": "auto"} if world_size > 1 else {})).train()
    assert model.model.layers[0].mlp.down_proj.weight.shape == (16, 48 // world_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ls.observe(model, 1, out=path, optimizer=optimizer, counts=COUNTS, sites=["pre", "post"], background=False):
        for step in range(STEPS):
            ids = batch_of(step, 12)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_model_that_transformers_has_cut_into_plain_slices(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path / "saved")
    train_transformers(0, 1, str(tmp_path / "saved"), str(tmp_path / "one"))
    run_ranks(train_transformers, 2, str(tmp_path / "saved"), str(tmp_path / "parts"))
    one, parts = by_key(tmp_path / "one"), by_key(tmp_path / "parts")
    assert one.keys() == parts.keys()
    for key, record in parts.items():
        assert (record.width, record.num_tokens, record.world_size) == (one[key].width, one[key].num_tokens, 1)
        assert record.tokens_seen == one[key].tokens_seen
        assert record.hard_rank == pytest.approx(one[key].hard_rank, rel=1e-4)
        assert record.soft_rank == pytest.approx(one[key].soft_rank, rel=1e-4)


def cut_by_columns(rank: int, world_size: int, mesh_of: str) -> list[int] | None:
    mesh = init_device_mesh("cpu", (world_size,))
    net = Net()
    if mesh_of == "fsdp":
        fully_shard(net, mesh=mesh, shard_placement_fn=lambda param: Shard(1) if param.ndim > 1 else None)
    else:
        weight = net.output.weight
        net.output.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
    found = tensor_mesh(net)
    return None if found is None else found.mesh.tolist()


def test_columns_that_fsdp_has_cut_are_no_tensor_parallelism() -> None:
    assert run_ranks(cut_by_columns, 2, "fsdp") == [None, None]
    assert run_ranks(cut_by_columns, 2, "tensor") == [[0, 1], [0, 1]]
    assert tensor_mesh(Net()) is None


def test_rows_are_added_over_ranks_with_other_data() -> None:
    peers = [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [_with_other_data(peers, rank) for rank in range(4)] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert _with_other_data([[0, 1], [0, 1]], 1) == [1]
