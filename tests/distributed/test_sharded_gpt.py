"""A GPT in slices and shards: outputs, gradients and their clipping are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from litgpt.config import Config
from torch.distributed.device_mesh import init_device_mesh

from lightning_spectral.gpt.architecture import Architecture, build_gpt
from lightning_spectral.gpt.clipping import clip_by_norm
from lightning_spectral.gpt.module import shard
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
DENSE = {
    "block_size": 16, "n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 16, "padded_vocab_size": 60,
    "mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "bias": False,
}  # fmt: skip
EXPERTS = {
    **DENSE, "mlp_class_name": "LLaMAMoE", "moe_intermediate_size": 24, "n_expert": 4, "n_expert_per_token": 2,
    "n_shared_expert": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def clipped(rank: int, world_size: int, config: dict[str, Any], slices: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, norm of the gradient, and the gradient after clipping to half of that; the whole of each."""
    model = build_gpt(Config(**config), Architecture(), seed=0)
    if world_size > 1:
        sizes = (world_size // slices, slices)
        shard(model, init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel")))
    ids = torch.randint(60, (4, 13), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    norm = float(clip_by_norm(model.parameters(), 1e9))
    again = clip_by_norm(model.parameters(), norm / 2)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
    return norm, {"loss": loss.detach(), "norm": again, **whole}


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(("ranks", "slices"), [(2, 2), (4, 2), (2, 1)], ids=["tp", "tp and fsdp2", "fsdp2"])
def test_loss_norm_and_clipped_gradients_are_those_of_one_process(
    config: dict[str, Any], ranks: int, slices: int
) -> None:
    norm, expected = clipped(0, 1, config, 1)
    reference = build_gpt(Config(**config), Architecture(), seed=0)
    ids = torch.randint(60, (4, 13), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(reference(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert float(torch.nn.utils.clip_grad_norm_(reference.parameters(), norm / 2)) == pytest.approx(norm, rel=1e-5)
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(expected[name], parameter.grad, rtol=1e-5, atol=1e-8)  # fp32 sums
    for found, values in run_ranks(clipped, ranks, config, slices):
        assert found == pytest.approx(norm, rel=1e-4)  # fp32 sums in another order
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)  # the same
