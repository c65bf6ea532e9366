"""After a clip the largest logit of every head is what it was, or the threshold, for every way to keep q and k."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from litgpt import GPT, Config
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

from lightning_spectral.callbacks.qk_clip import QKClipCallback, _scale
from lightning_spectral.models.placement import Shards
from lightning_spectral.models.query_key import find_attentions, largest_logits
from tests.distributed.harness import run_ranks

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers
QUERIES_AND_KEYS = ("qkv", "q_proj", "k_proj", "c_attn", "query_key_value", "q_b_proj", "kv_b_proj")
IDS = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))


def litgpt(**changes) -> nn.Module:
    torch.manual_seed(0)  # every rank, and the run of one process, begins with the same weights
    return GPT(Config(**{
        "n_layer": 1, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "vocab_size": 50, "padded_vocab_size": 64,
        "block_size": 16, "intermediate_size": 64, "bias": True, **changes,
    }))  # fmt: skip


def hugging_face(kind: str, attention: str = "sdpa", **more) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    if kind in ("gpt2", "gpt_neox"):
        del sizes["head_dim"], sizes["num_key_value_heads"]
    if kind == "gpt2":  # as they are called there; training would drop entries, and with them change the logits
        sizes |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if kind == "falcon":
        del sizes["head_dim"], sizes["num_key_value_heads"]
        sizes |= {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
    if kind == "codegen":
        del sizes["head_dim"], sizes["num_key_value_heads"]
        sizes |= {"rotary_dim": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.AutoConfig.for_model(kind, attn_implementation=attention, **{**sizes, **more})
    return transformers.AutoModelForCausalLM.from_config(config)


def latent(kind: str, q_lora_rank: int | None, attention: str = "sdpa") -> nn.Module:
    """Multi-head latent attention: a part of every query and key with position, whose key all heads share."""
    config = transformers.AutoConfig.for_model(
        kind, attn_implementation=attention, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=6, v_head_dim=5, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=1, first_k_dense_replace=1, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def gpt_oss() -> nn.Module:
    model = hugging_face("gpt_oss", "eager", num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"])
    model.model.layers[0].self_attn.sinks.data.normal_()
    return model


MODELS = {
    "litgpt, latent": lambda: litgpt(
        n_query_groups=4,
        latent_attention={
            **{"q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5},
        },
    ),
    "deepseek_v3, latent": lambda: latent("deepseek_v3", 16),
    "deepseek_v2, latent, eager": lambda: latent("deepseek_v2", None, "eager"),
    "gpt_oss, sinks": gpt_oss,
    "codegen, four blocks": lambda: hugging_face("codegen", "eager"),
    "falcon, by groups": lambda: hugging_face("falcon"),
    "litgpt, grouped, biases": litgpt,
    "llama": lambda: hugging_face("llama"),
    "llama, eager": lambda: hugging_face("llama", "eager"),
    "qwen2, biases of q and k": lambda: hugging_face("qwen2"),
    "gpt2, transposed": lambda: hugging_face("gpt2"),
    "gpt_neox, per head": lambda: hugging_face("gpt_neox", "eager"),
}


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module, lr: float = 0.0) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, batch_idx):
        output = self.model(batch[:, :-1])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def sharp(model: nn.Module) -> nn.Module:
    """Logits far above one, different in every head."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if any(part in name for part in QUERIES_AND_KEYS):
            p.data.normal_(std=0.5 if p.ndim == 2 else 0.3)
    return model


def logits_of(model: nn.Module) -> torch.Tensor:
    """Largest causal logit of every head of the first attention, from q and k as attention gets them: all of them."""
    seen = []
    plain_attention, plain_softmax = nn.functional.scaled_dot_product_attention, nn.functional.softmax

    def attention(q, k, v, **options):
        k_of_q = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scale = options.get("scale") or 1 / math.sqrt(q.shape[-1])
        logits = torch.einsum("bhtd,bhsd->bhts", q, k_of_q) * scale
        seen.append(logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf).amax((0, 2, 3)))
        return plain_attention(q, k, v, **options)

    def softmax(logits, *args, **options):
        if logits.ndim == 4:  # not a router's
            seen.append(logits.amax((0, 2, 3)))
        return plain_softmax(logits, *args, **options)

    def cat(tensors, *args, **options):
        if (
            tensors[-1].shape[-1:] == (1,) and tensors[0].ndim == 4 and tensors[0].shape[-1] > 8
        ):  # gpt-oss takes the largest off afterwards
            seen.append(tensors[0].amax((0, 2, 3)))
        return plain_cat(tensors, *args, **options)

    plain_cat = torch.cat
    nn.functional.scaled_dot_product_attention, nn.functional.softmax, torch.cat = attention, softmax, cat
    try:
        with torch.no_grad():
            model(IDS[:, :-1])
    finally:
        torch.cat, nn.functional.softmax = plain_cat, plain_softmax
        nn.functional.scaled_dot_product_attention = plain_attention
    return seen[0].float()


def fit(module: Module, callbacks: list[Callback], **options) -> pl.Trainer:
    trainer = pl.Trainer(
        callbacks=callbacks, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **{"max_steps": 1, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(IDS, batch_size=4))
    return trainer


@pytest.mark.parametrize("kind", MODELS)
def test_every_head_ends_at_the_threshold_or_where_it_was(kind):
    model = sharp(MODELS[kind]())
    before = logits_of(model)
    threshold = float(before.sort().values[1:3].mean())  # two heads above it, two below
    untouched = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(Module(model), [QKClipCallback(threshold)])
    after = logits_of(model)
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-5, atol=1e-6)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, untouched[name])}
    assert changed
    assert all(any(part in name for part in QUERIES_AND_KEYS) for name in changed)


def test_below_the_threshold_training_is_bit_identical():
    ends = []
    for callbacks in ([], [QKClipCallback(1e6)]):
        torch.manual_seed(0)
        module = Module(litgpt(), lr=0.1)
        fit(module, callbacks, max_steps=3, max_epochs=3)
        ends.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_values_and_output_weights_are_left_alone():
    model = sharp(litgpt())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(Module(model), [QKClipCallback(1e-3)])
    weight = model.transformer.h[0].attn.qkv.weight
    rows = 8 * (4 + 2)  # of q and k
    assert torch.equal(weight[rows:], before["transformer.h.0.attn.qkv.weight"][rows:])
    assert not torch.equal(weight[:rows], before["transformer.h.0.attn.qkv.weight"][:rows])


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float", "padding"])
def test_largest_logits_of_what_may_be_seen(mask):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 300, 8, generator=generator) for h in (4, 2))
    all_logits = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1)) / math.sqrt(8)
    hidden = torch.ones(300, 300).triu(1).bool()
    options = {
        None: {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": ~hidden},
        "float": {"attn_mask": torch.zeros(300, 300).masked_fill(hidden, -math.inf)},
        "padding": {"attn_mask": torch.arange(300).lt(200).view(1, 1, 1, 300)},
    }[mask]
    if mask == "padding":
        all_logits = all_logits[..., :200]
    elif mask is not None:
        all_logits = all_logits.masked_fill(hidden, -math.inf)
    found = largest_logits(q, k, k, enable_gqa=True, **options)
    torch.testing.assert_close(found, all_logits.amax((0, 2, 3)), rtol=1e-5, atol=1e-6)


def on_ranks(rank: int, world_size: int) -> torch.Tensor:
    """The large logits are on one rank; all scale alike."""
    model = sharp(litgpt())
    module = Module(model)
    trainer = pl.Trainer(
        callbacks=[QKClipCallback(float(logits_of(model).median()))], accelerator="cpu", devices=world_size,
        strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(IDS if rank == 0 else IDS[:, :1].expand(4, 16), batch_size=4))
    return module.model.transformer.h[0].attn.qkv.weight.detach().clone()


@pytest.mark.distributed
def test_ranks_clip_by_the_largest_of_all():
    alone = sharp(litgpt())
    threshold = float(logits_of(alone).median())
    fit(Module(alone), [QKClipCallback(threshold)])
    first, second = run_ranks(on_ranks, 2, init=False)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.transformer.h[0].attn.qkv.weight.detach(), rtol=1e-6, atol=0)


def scaled_in_shards(rank: int, world_size: int, kind: str) -> dict[str, torch.Tensor]:
    """Query and key rows scaled where they are held."""
    torch.manual_seed(0)
    model = sharp(litgpt())
    factors = torch.tensor([1.0, 0.25, 0.5, 0.81])
    if kind == "fsdp2":
        model = fully_shard(model)
    elif kind == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for attention in find_attentions(model):
        _scale(attention, factors, Shards())
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    return {n: p.full_tensor().detach() if kind == "fsdp2" else p.detach() for n, p in model.named_parameters()}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_shards_are_scaled_as_the_whole(kind):
    expected = scaled_in_shards(0, 1, "whole")
    rows = expected["transformer.h.0.attn.qkv.weight"][:48].view(6, 8, 32) / sharp(litgpt()).transformer.h[
        0
    ].attn.qkv.weight.detach()[:48].view(6, 8, 32)
    # two query heads to a key: it takes the root of their smaller factor, each query what is missing to its own
    by_hand = torch.tensor([2.0, 0.5, 0.5 / 0.5**0.5, 0.81 / 0.5**0.5, 0.5, 0.5**0.5])
    torch.testing.assert_close(rows.mean((1, 2)), by_hand, rtol=1e-5, atol=0)
    for weights in run_ranks(scaled_in_shards, 2, kind):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("arguments", [{"threshold": 0.0}, {"threshold": -1.0}, {"every_n_steps": 0}])
def test_misuse_is_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        QKClipCallback(**arguments)


def test_models_that_cannot_be_clipped_are_refused_before_the_first_step():
    with pytest.raises(MisconfigurationException, match="found no query and key heads in `Module`"):
        fit(Module(nn.Linear(3, 3)), [QKClipCallback()])
    with pytest.raises(MisconfigurationException, match=r"`model\.transformer\.h\.0\.attn` normalises queries"):
        fit(Module(litgpt(norm_qk=True, bias=False)), [QKClipCallback()])


def test_logits_that_nobody_sees_are_said_once_and_change_nothing():
    model = litgpt()
    attention = model.transformer.h[0].attn
    attention.scaled_dot_product_attention = lambda q, k, v, mask=None: v.transpose(1, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"no finite logits in 1 attentions, model\.transformer\.h\.0\.attn first"):
        fit(Module(model), [QKClipCallback(1e-3)], max_steps=3, max_epochs=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_heads_are_found_in_their_order():
    found = {a.name: a for a in find_attentions(hugging_face("gpt_neox"))}
    (attention,) = found.values()
    weight = attention.rows[0]
    # per head its query, key and value, eight rows each
    assert weight.queries == tuple((((24 * h, 24 * h + 8),)) for h in range(4))
    assert weight.keys == tuple((((24 * h + 8, 24 * h + 16),)) for h in range(4))


def test_a_head_whose_largest_logit_is_below_zero_stays_as_it_is():
    model = sharp(hugging_face("llama", num_key_value_heads=4))
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.data[:8] = -attention.k_proj.weight.data[:8] * 1e-3
    one = IDS[:1, :2]  # a token that sees itself: -1e-3 |k|^2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pl.Trainer(
        callbacks=[QKClipCallback(1e-4)], accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(model), DataLoader(one))  # fmt: skip
    assert all(p.isfinite().all() for p in model.parameters())
    for name in ("q_proj", "k_proj"):
        weight = getattr(attention, name).weight
        assert torch.equal(weight[:8], before[f"model.layers.0.self_attn.{name}.weight"][:8])
