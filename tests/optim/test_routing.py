"""Roles come from owners and names; what cannot be known is refused."""

import logging

import pytest
import torch
from torch import nn

from lightning_spectral.optim import AdamW, Muon
from lightning_spectral.optim.owners import find_owners
from lightning_spectral.optim.routing import route, routing_table
from tests.optim.models import TinyLM


def roles_of(params, overrides=None) -> dict[str, str]:
    return {one.named.name: one.role for one in route(find_owners(params), overrides)}


EXPECTED = {
    **dict.fromkeys(TinyLM.MATRICES, "matrix"),
    "embed.weight": "embedding",
    "head.weight": "head",
    **{f"blocks.{i}.{name}": "vector" for i in range(2) for name in ("norm.weight", "norm.bias", "fc.bias")},
}


@pytest.mark.parametrize(
    "give",
    [
        lambda model: model,
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: list(model.parameters()),
        lambda model: list(model.named_parameters()),
        lambda model: filter(lambda p: p.requires_grad, model.parameters()),
    ],
    ids=["module", "parameters", "named", "list", "named list", "filter"],
)
def test_every_way_to_hand_parameters_over_gives_the_same_roles(give):
    model = TinyLM()
    assert roles_of(give(model)) == EXPECTED


def test_wrappers_compiled_and_nested_modules():
    model = TinyLM()
    assert roles_of(torch.compile(model, backend="eager").parameters()) == EXPECTED

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    assert roles_of(Outer().parameters()) == {f"model.{name}": role for name, role in EXPECTED.items()}


def test_fabric_hands_over_a_wrapped_module():
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    assert roles_of(fabric.setup(TinyLM()).parameters()) == EXPECTED


def test_litgpt_roles():
    from litgpt import GPT, Config

    model = GPT(Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30, padded_vocab_size=32, block_size=8, bias=True))
    found = roles_of(model.parameters())
    assert found["lm_head.weight"] == "head"
    assert found["transformer.wte.weight"] == "embedding"
    matrices = {name for name, role in found.items() if role == "matrix"}
    assert matrices == {f"transformer.h.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")}


def test_tied_weights_appear_once_as_embedding():
    model = TinyLM()
    model.head.weight = model.embed.weight
    found = roles_of(model.parameters())
    assert found == {name: role for name, role in EXPECTED.items() if name != "head.weight"}
    for tied, reason in ((model, "embedding, tied"), (TinyLM(), "embedding")):
        assert [one.reason for one in route(find_owners(tied)) if one.role == "embedding"] == [reason]
    optimizer = Muon(model)
    assert sum(p is model.embed.weight for group in optimizer.param_groups for p in group["params"]) == 1


def test_head_is_found_by_its_number_of_outputs_attention_and_convolutions():
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(50, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "readout": nn.Linear(8, 50),
            "patch": nn.Conv2d(3, 8, 2),
        }
    )
    found = roles_of(model)
    assert found["readout.weight"] == "head"
    assert found["attention.in_proj_weight"] == "matrix"
    assert found["attention.out_proj.weight"] == "matrix"
    assert found["patch.weight"] == "vector"


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 4))
        self.layer = nn.Linear(4, 4)


def test_unknown_matrices_go_to_the_vector_rule_until_named():
    model = Positions()
    routes = route(find_owners(model))
    assert {r.named.name: r.role for r in routes}["table"] == "vector"
    assert "see `roles`" in next(r.reason for r in routes if r.named.name == "table")
    assert roles_of(model, {"table": "matrix"})["table"] == "matrix"
    optimizer = Muon(model, roles={"^table$": "matrix", "layer": "vector"})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"embed": "matrix"}, r"makes the embedding `embed.weight` a matrix"),
        ({"norm": "matrix"}, r"of shape \(10,\) a matrix: two dimensions above one are needed"),
        ({"nothing": "vector"}, r"match no parameter: \['nothing'\]"),
        (
            {"head": "tail"},
            r"must be one of \['matrix', 'embedding', 'head', 'vector', 'transposed matrix'\], got 'tail'",
        ),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        Muon(TinyLM(), roles=overrides)


def test_orphans_and_empty_lists_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"belong to no live module.*Pass the module itself"):
        Muon([nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(ValueError, match=r"holds no parameter.*Pass the module itself"):
        Muon([])
    started = TinyLM().parameters()
    next(started)
    with pytest.raises(ValueError, match="belong to no live module"):
        Muon([p.clone() for p in started])


def test_a_started_generator_is_resolved_by_owner():
    model = TinyLM()
    generator = model.parameters()
    next(generator)
    assert roles_of(generator) == {name: role for name, role in EXPECTED.items() if name != "embed.weight"}


def test_a_group_dict_stays_one_group_and_overrides_settings():
    model = TinyLM()
    optimizer = Muon(
        [
            {"params": model.blocks.parameters(), "weight_decay": 0.5, "name": "blocks", "note": 3},
            {"params": [model.embed.weight, model.head.weight], "lr": 0.7},
        ],
        lr=0.1,
        fallback_weight_decay=0.01,
    )
    blocks, rest = optimizer.param_groups
    assert (blocks["name"], blocks["note"], blocks["lr"], blocks["role"]) == ("blocks", 3, 0.1, "mixed")
    assert (rest["lr"], rest["param_roles"]) == (0.7, ["embedding", "head"])
    decays = {member.role: member.weight_decay for member in optimizer._members()}
    assert decays == {"matrix": 0.5, "vector": 0.5, "embedding": 0.01, "head": 0.01}


def test_the_table_is_logged_once_with_learning_rates(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_spectral"):
        optimizer = Muon(TinyLM(), lr=0.02, fallback_lr=0.002)
        optimizer.step()
    tables = [record.getMessage() for record in caplog.records if "routes" in record.getMessage()]
    assert len(tables) == 1
    assert "muon, lr 0.02 x match_rms_adamw, wd 0.1" in tables[0]
    assert "adamw, lr 0.002, wd 0.1" in tables[0]


def test_table_counts_every_parameter():
    model = TinyLM()
    routes = route(find_owners(model))
    rows = routing_table(routes, lambda role: "rule").rows
    assert sum(row[1] for row in rows) == len(list(model.parameters()))
    assert sum(row[2] for row in rows) == sum(p.numel() for p in model.parameters())


def test_every_group_carries_what_schedulers_and_litgpt_read():
    for optimizer in (Muon(TinyLM()), AdamW(TinyLM())):
        assert {"lr", "betas", "momentum", "weight_decay", "eps"} <= optimizer.defaults.keys()
        for group in optimizer.param_groups:
            assert {"lr", "lr_ratio", "betas", "momentum", "weight_decay", "eps", "role", "algorithm"} <= group.keys()


class ByteModel(nn.Module):
    """Vocabulary, block size, width: everything is 16; blocks have a list, the output layer any name."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.bytes, self.pos_table = nn.Embedding(16, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(width, 16), "fc": nn.Linear(16, 16), "proj": nn.Linear(16, width)})
            for _ in range(blocks)
        )
        self.readout = nn.Linear(width, 16)


@pytest.mark.parametrize("blocks", [1, 2])
def test_layers_as_wide_as_a_table_are_no_heads(blocks):
    found = roles_of(ByteModel(blocks=blocks))
    hidden = {f"blocks.{i}.{name}.weight" for i in range(blocks) for name in ("attn", "fc", "proj")}
    assert {name for name, role in found.items() if role == "matrix"} == hidden
    assert {name for name, role in found.items() if role == "head"} == {"readout.weight"}


def test_a_list_of_parameters_in_another_order_gives_the_same_roles():
    model = ByteModel()
    assert roles_of(list(model.parameters())[::-1]) == roles_of(model)


def test_a_position_table_alone_makes_no_head():
    model = nn.ModuleDict({"wpe": nn.Embedding(8, 8), "up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    assert roles_of(model) == {
        "wpe.weight": "embedding",
        "up.weight": "matrix",
        "up.bias": "vector",
        "down.weight": "matrix",
        "down.bias": "vector",
    }


def test_parts_of_classifiers_and_heads():
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
            "classifier": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        }
    )
    found = roles_of(model)
    assert [name for name, role in found.items() if role == "head"] == ["classifier.2.weight"]
    lstm = nn.LSTM(8, 8, bias=False)
    assert set(roles_of(lstm).values()) == {"matrix"}


class Foreign(nn.Module):
    """Matrices that nothing tells apart from tables."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(size, size))
        self.layer = nn.Linear(4, 4)


def test_less_than_half_of_the_matrix_elements_is_a_loud_warning():
    with pytest.warns(UserWarning, match="(?s)Muon trains only 20% of the matrix elements.*2-D of Foreign"):
        Muon(Foreign(8))
    Muon(Foreign(3))  # 16 of 25
    Muon(Foreign(8), roles={"mix": "matrix"})
    Muon(Foreign(8), roles={"mix": "vector"})  # as told
    AdamW(Foreign(8))


def test_transposed_matrices_and_stacks_can_be_named():
    model = Foreign(6)
    model.stack = nn.Parameter(torch.zeros(3, 5, 7))
    views = {
        one.named.name: one.views
        for one in route(find_owners(model), {"mix": "transposed matrix", "stack": "transposed matrix"})
    }
    assert views["mix"].transposed
    assert [view.shape for view in views["stack"]] == [(7, 5)] * 3


@pytest.mark.parametrize("name", ["classifier", "score", "qa_outputs"])
def test_a_named_head_outside_of_the_blocks_need_not_be_as_wide_as_the_tokens(name):
    model = nn.Module()
    model.embed = nn.Embedding(50, 8)
    model.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16), "head": nn.Linear(16, 8)}) for _ in range(2))
    model.add_module(name, nn.Linear(8, 3))
    model.last = nn.Linear(3, 3)  # not the named one
    roles = roles_of(model)
    assert roles[f"{name}.weight"] == "head"
    assert roles["blocks.0.head.weight"] == "matrix"  # in a block it must be
    assert roles["last.weight"] == "matrix"


@pytest.mark.parametrize(
    ("container", "followed", "role"),
    [
        ("lm_head", False, "head"),
        ("lm_head", True, "head"),  # nothing else is called so
        ("head", False, "head"),
        ("head", True, "matrix"),  # a last transformation: the decoder stands elsewhere
        ("heads", True, "matrix"),
    ],
)
def test_what_is_inside_a_head_is_one_unless_a_decoder_follows(container, followed, role):
    model = nn.Module()
    model.embed = nn.Embedding(50, 8)
    model.body = nn.Linear(8, 8)
    model.add_module(container, nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6)))
    if followed:
        model.decoder = nn.Linear(6, 50)
    roles = roles_of(model)
    assert roles[f"{container}.2.weight"] == role
    assert roles[f"{container}.0.weight"] == roles["body.weight"] == "matrix"


@pytest.mark.parametrize("says", [True, False])
def test_a_model_that_says_it_has_no_output_embeddings_is_believed(says):
    """Its last layer may be as wide as the tokens and not be over them."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)

    class Saying(Plain):
        def get_output_embeddings(self):
            return None

    assert roles_of(Saying() if says else Plain())["out.weight"] == ("matrix" if says else "head")


@pytest.mark.parametrize(
    ("norm", "vectors"),
    [
        (torch.nn.utils.parametrizations.weight_norm, {"parametrizations.weight.original0"}),
        (torch.nn.utils.parametrizations.spectral_norm, set()),
        (torch.nn.utils.parametrizations.orthogonal, set()),
        (torch.nn.utils.weight_norm, {"weight_g"}),
        (torch.nn.utils.spectral_norm, set()),
    ],
    ids=["weight", "spectral", "orthogonal", "old weight", "old spectral"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_norm_of_the_weight_keeps_is_the_weight(norm, vectors):
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "up": nn.Linear(8, 12, bias=False), "lm_head": nn.Linear(8, 9)})
    model["conv"] = nn.Conv1d(8, 12, 3, groups=2, bias=False)
    for name in ("up", "conv", "lm_head"):
        norm(model[name])
    routes = {one.named.name: one for one in route(find_owners(model)) if "bias" not in one.named.name}
    assert {name for name, one in routes.items() if one.role == "vector"} == {
        f"{owner}.{name}" for owner in ("up", "conv", "lm_head") for name in vectors
    }
    assert {name.split(".")[0]: one.views.label for name, one in routes.items() if one.role == "matrix"} == {
        "up": "12 x 8",
        "conv": "2 x (6 x 12)",
    }
    assert [name.split(".")[0] for name, one in routes.items() if one.role == "head"] == ["lm_head"]
    assert set(routes) == {name for name, _ in model.named_parameters() if "bias" not in name}
    assert all(one.certain for one in routes.values())


class Mixture(nn.Module):
    """Experts kept in every way but as modules."""

    def __init__(self, width: int = 6, inner: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.experts_up = nn.Parameter(torch.zeros(3, width, inner))  # x @ up
        self.experts_down = nn.Parameter(torch.zeros(3, inner, width))
        self.expert_gates = nn.ParameterList([nn.Parameter(torch.zeros(3, inner, width)) for _ in range(2)])
        self.pair = nn.ParameterDict({"lora_A": torch.zeros(2, width), "latents": torch.zeros(4, width)})
        self.text_projection = nn.Parameter(torch.zeros(width, inner))  # x @ projection, as CLIP's
        self.in_proj_weight = nn.Parameter(torch.zeros(inner, width))
        self.codebook = nn.Parameter(torch.zeros(7, width))
        self.attention_biases = nn.Parameter(torch.zeros(4, 9))
        self.query = nn.Parameter(torch.zeros(1, 3, width))
        self.latent_queries = nn.Parameter(torch.zeros(3, width))


def test_bare_parameters_lists_and_dicts_are_what_their_owner_calls_them():
    routes = {one.named.name: one for one in route(find_owners(Mixture()))}
    views = {name: (one.views.shape, one.views.label) for name, one in routes.items() if one.views is not None}
    assert views == {
        "experts_up": ((3, 6, 10), "3 x (10 x 6), transposed"),
        "experts_down": ((3, 10, 6), "3 x (6 x 10), transposed"),
        "expert_gates.0": ((3, 10, 6), "3 x (10 x 6)"),
        "expert_gates.1": ((3, 10, 6), "3 x (10 x 6)"),
        "text_projection": ((6, 10), "10 x 6, transposed"),
        "in_proj_weight": ((10, 6), "10 x 6"),
        "pair.lora_A": ((2, 6), "2 x 6"),
    }
    assert all(one.certain for one in routes.values())


class Experts(nn.Module):
    """As torchtitan keeps them: `dim` is the model's width, `hidden_dim` the inner one."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.dim, self.hidden_dim = dim, hidden_dim
        self.w1 = nn.Parameter(torch.zeros(2, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.zeros(2, dim, hidden_dim))


def test_an_inner_width_beside_the_models_is_not_taken_for_it():
    views = {one.named.name: one.views for one in route(find_owners(Experts(6, 10)))}
    assert [view.shape for view in views["w1"]] == [(10, 6)] * 2
    assert [view.shape for view in views["w2"]] == [(6, 10)] * 2


class Heads(nn.Module):
    """Several outputs: lists, dicts and multilayer ones, over convolutions and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        self.blocks = nn.ModuleList(nn.ModuleDict({"q_head": nn.Linear(8, 8), "score": nn.Linear(8, 8)}) for _ in "ab")
        self.pre_classifier = nn.Linear(8, 8)
        self.class_embed = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.bbox_embed = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
        self.heads = nn.ModuleDict({"value": nn.Linear(8, 8), "policy": nn.Linear(8, 8)})
        self.decode_head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 8)


def test_lists_dicts_and_sequences_of_heads():
    found = {name.removesuffix(".weight") for name, role in roles_of(Heads()).items() if role == "head"}
    assert found == {
        *("class_embed.0", "class_embed.1", "bbox_embed.0.2", "bbox_embed.1.2", "decode_head.1", "fc"),
        *("heads.value", "heads.policy"),
    }


def test_a_head_divides_its_learning_rate_by_its_inputs():
    conv = nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": nn.Conv2d(16, 8, 1)})
    optimizer = Muon(conv, head_lr_scale="inverse_width")
    assert {group["name"]: group["lr_ratio"] for group in optimizer.param_groups}["head"] == 1 / 16


def test_hidden_convolutions_under_an_embedder_are_matrices():
    model = nn.ModuleDict(
        {
            "patch_embed": nn.Sequential(nn.Conv2d(5, 8, 3), nn.Conv2d(8, 8, 3)),
            "patch_merging": nn.Conv2d(8, 8, 2),
            "pos_conv_embed": nn.Conv1d(8, 8, 3, groups=2),
            "to_patch_embedding": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)),
            "patch_embedding_projection": nn.Linear(8, 8),
        }
    )
    matrices = {name.removesuffix(".weight") for name, role in roles_of(model).items() if role == "matrix"}
    assert matrices == {"patch_embed.1", "patch_merging", "pos_conv_embed", "patch_embedding_projection"}


class Plain(nn.Module):
    """Parts of plain torch; everything that can be is eight wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.cell = nn.GRUCell(8, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2)
        self.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(4, 8)})
        self.decode = nn.ModuleList([nn.Conv1d(8, 8, 3), nn.Conv1d(8, 3, 3), nn.Conv1d(8, 1, 3)])
        self.mlp_head = nn.Linear(8, 8)
        self.loss = nn.AdaptiveLogSoftmaxWithLoss(8, 8, [2, 4], div_value=2.0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_parts_of_plain_torch():
    routes = {one.named.name.removesuffix(".weight"): one for one in route(find_owners(Plain()))}
    found = {
        role: {name for name, one in routes.items() if one.role == role} for role in ("matrix", "head", "embedding")
    }
    layers = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    assert found["matrix"] == {
        *("cell.weight_ih", "cell.weight_hh", "decode.0", "loss.tail.0.0", "loss.tail.1.0"),
        *(f"encoder.layers.{i}.{name}" for i in range(2) for name in layers),
    }
    assert found["head"] == {"mlp_head", "loss.head", "loss.tail.0.1", "loss.tail.1.1"}
    assert found["embedding"] == {"embed", "lora_embedding_A.default"}
    assert {name: routes[name].reason for name in ("decode.1", "decode.2")} == {
        "decode.1": "convolution of the output",
        "decode.2": "one row or column",
    }
    assert all(one.certain for one in routes.values())
