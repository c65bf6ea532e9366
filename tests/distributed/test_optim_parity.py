"""DDP, FSDP1 and FSDP2 give the update of one process; checkpoints go from any of them to any other."""

from functools import lru_cache

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.optim_runs import MODELS, Weights, distance, resume, run, run_on_parts, save_midway

pytestmark = pytest.mark.distributed
STEPS = 20
FSDP1_ADVICE = "ignore:.*both parameters with requires_grad=True and False:UserWarning"
TOLERANCE = 1e-5  # of the update, fp32: gloo and FSDP sum gradients in another order


@lru_cache(maxsize=4)
def start(model: str = "gpt") -> Weights:
    return {name: p.detach().clone() for name, p in MODELS[model]().named_parameters()}


@lru_cache(maxsize=4)
def reference(kind: str, model: str = "gpt") -> Weights:
    return run(0, 1, "single", kind, STEPS, model)


def check_parity(strategy: str, kind: str, world_size: int, model: str = "gpt") -> Weights:
    for weights in run_ranks(run, world_size, strategy, kind, STEPS, model):
        assert distance(weights, reference(kind, model), start(model)) < TOLERANCE
    return weights


@pytest.mark.parametrize("kind", ["muon", "normuon"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_equal_one(strategy, kind):
    check_parity(strategy, kind, 2)


@pytest.mark.parametrize("kind", ["muon", "normuon", "adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_with_half_a_batch_each_equal_one(strategy, kind):
    for weights in run_ranks(run_on_parts, 2, strategy, kind, STEPS):
        assert distance(weights, reference(kind), start()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dion", "adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_equal_one_for_the_others(strategy, kind):
    check_parity(strategy, kind, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "normuon", "dion", "adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_four_ranks_with_uneven_shards_equal_one(strategy, kind):
    check_parity(strategy, kind, 4)


@pytest.mark.parametrize("kind", ["normuon", "dion"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_bf16_matrices_beside_fp32_norms_equal_one_process(strategy, kind):
    weights = check_parity(strategy, kind, 2, "two dtypes")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "normuon", "dion", "adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_two_dtypes_with_every_optimizer(strategy, kind):
    check_parity(strategy, kind, 2, "two dtypes")


# FSDP1 gives zeros to what is unused in a buffer that is used, so every optimizer's weight decay acts there.
@pytest.mark.filterwarnings(FSDP1_ADVICE)
@pytest.mark.parametrize(
    ("strategy", "kind"), [("ddp", "normuon"), ("fsdp1", "normuon, no decay"), ("fsdp2", "normuon")]
)
def test_frozen_and_unused_parameters_stay_and_the_others_equal_one_process(strategy, kind):
    weights = check_parity(strategy, kind, 2, "partly frozen")
    stayed = {name for name, value in weights.items() if torch.equal(value, start("partly frozen")[name])}
    unused = {"transformer.h.1.unused.weight", "transformer.h.1.unused.bias"}
    assert stayed == {"transformer.h.0.attn.qkv.weight", "transformer.h.1.norm_1.weight", *unused}


def check_checkpoints(
    source: str, kind: str, world_size: int, targets: list[tuple[str, int]], model: str = "gpt"
) -> None:
    weights, state, straight, resumed = run_ranks(save_midway, world_size, source, kind, model)[0]
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name  # the same strategy: bit-equal
    for target, ranks in targets:
        if ranks == 1:
            elsewhere = resume(0, 1, target, kind, weights, state, model)
        else:
            elsewhere = run_ranks(resume, ranks, target, kind, weights, state, model)[0]
        assert distance(elsewhere, straight, weights) < TOLERANCE, target


@pytest.mark.parametrize("kind", ["normuon", "dion"])
def test_fsdp2_resumes_bit_equal_and_on_one_process(kind):
    check_checkpoints("fsdp2", kind, 2, [("single", 1)])


def test_fsdp1_resumes_bit_equal_and_on_one_process():
    check_checkpoints("fsdp1", "normuon", 2, [("single", 1)])


def test_ddp_has_whole_momentum_and_resumes():
    check_checkpoints("ddp", "normuon", 2, [("single", 1)])


@pytest.mark.filterwarnings(FSDP1_ADVICE)
@pytest.mark.parametrize("model", ["partly frozen", "two dtypes"])
@pytest.mark.parametrize("source", ["fsdp1", "fsdp2"])
def test_checkpoints_of_frozen_parameters_and_of_two_dtypes(source, model):
    check_checkpoints(source, "normuon, no decay", 2, [("single", 1)], model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "normuon", "dion", "adamw"])
@pytest.mark.parametrize("source", ["single", "ddp", "fsdp1", "fsdp2"])
def test_checkpoints_go_from_every_strategy_to_every_other(source, kind):
    world_size = 1 if source == "single" else 4
    check_checkpoints(source, kind, world_size, [("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 2)])
