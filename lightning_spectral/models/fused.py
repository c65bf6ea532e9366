"""Where q, k, v and single heads lie in attention projections, and gate and up in feed-forward ones.

The numbers of heads are those that the attention module, or the nearest ``config`` above it, says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lightning_spectral.models.places import Place
from lightning_spectral.models.views import Part, Views

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "encoder_attention_heads")
_GROUPS = ("num_key_value_heads", "n_query_groups", "num_kv_heads", "kv_n_heads", "n_kv_heads", "num_query_groups")
_SIZES = ("head_dim", "head_size", "d_kv", "d_head", "attention_head_size")

_FUSED = re.compile(r"^(qkv|qkv_proj|c_attn|query_key_value|wqkv|in_proj|attn_qkv|att_proj|qkv_net)$", re.IGNORECASE)
_KEYS_VALUES = re.compile(r"^(kv|kv_proj|to_kv|c_attn|wkv|kv_b_proj)$", re.IGNORECASE)
_GATE_UP = re.compile(r"^(gate_up_proj|w12|gate_up|fc_gate_up)$")
# (class that holds the projection, its name): gate and up under a name that elsewhere is that of one matrix
_GATE_UP_OF = re.compile(r"ModernBert\w*MLP:Wi|(Granite|JetMoe)\w*(MoE|MLP|Moe):input_linear|AriaGroupedExpertsMLP:fc1")
_SINGLE = re.compile(
    r"^(q|k|v|q_b_proj|(query|key|value)(_proj)?|[qkv]_(proj|lin|head)|(linear_|to_|w)[qkv])$", re.IGNORECASE
)
# q, k and v of a head lie beside each other: (heads, 3, head size)
_PER_HEAD = re.compile(
    r"(GPTNeoX\w*|Bloom|Persimmon|MiniMaxLightning)Attention|GPTNeoXJapanese\w*|DisentangledSelfAttention"
)


@dataclass(frozen=True)
class Heads:
    """Numbers of query heads and key/value heads, and the size of one."""

    queries: int
    groups: int
    size: int


def parts_of(place: Place, views: Views, by_head: bool) -> tuple[Part, ...] | None:
    """Output rows of the matrices that a fused projection holds, or None for what is no projection or not fused.

    Args:
        place: Where the model keeps the parameter.
        views: Its matrices, undivided.
        by_head: Every head of q, k and v a matrix of its own; else q, k and v as wholes.
    """
    name = _projection_name(place)
    rows = views.matrix[0]
    if rows % 2 == 0 and _holds_gate_and_up(place, name):
        return _gate_and_up(place, rows)
    single = bool(_SINGLE.match(name))
    if views.stack > 1 or not (by_head if single else _FUSED.match(name) or _KEYS_VALUES.match(name)):
        return None
    heads = _heads(place)
    if heads is None:
        return None
    if single:
        return _chop(((0, rows),), heads.size) if rows % heads.size == 0 else None
    parts = _fused_parts(place, name, rows, heads)
    if parts is None or not by_head:
        return parts
    if name == "kv_b_proj":
        return tuple((head,) for part in parts for head in part)
    return tuple(head for part in parts for head in _chop(part, heads.size))


def _holds_gate_and_up(place: Place, name: str) -> bool:
    if _GATE_UP.match(name):
        return True
    return bool(_GATE_UP_OF.fullmatch(f"{type(_attention(place)).__name__}:{name}"))


def _gate_and_up(place: Place, rows: int) -> tuple[Part, ...]:
    if type(place.module).__name__ == "GptOssExperts":  # row by row in turns
        return ((0, rows, 2),), ((1, rows, 2),)
    return ((0, rows // 2),), ((rows // 2, rows),)


def _fused_parts(place: Place, name: str, rows: int, heads: Heads) -> tuple[Part, ...] | None:
    """Rows of q, k and v, or of k and v alone; None where the numbers of heads do not fit."""
    if name == "kv_b_proj":
        return _latent(place, rows, heads)
    if rows == 3 * heads.queries * heads.size:  # also beside a configuration that says something of another attention
        heads = Heads(heads.queries, heads.queries, heads.size)
    if _FUSED.match(name) and rows == (heads.queries + 2 * heads.groups) * heads.size:
        if type(_attention(place)).__name__ == "CodeGenAttention":
            return _codegen(rows)
        return _interleaved(heads) if _lies_per_head(place, heads) else _one_after_the_other(heads)
    if (
        _KEYS_VALUES.match(name)
        and rows % 2 == 0
        and (rows // 2) % heads.size == 0
        and rows < 3 * heads.queries * heads.size
    ):
        return ((0, rows // 2),), ((rows // 2, rows),)
    return None


def _latent(place: Place, rows: int, heads: Heads) -> tuple[Part, ...] | None:
    """Per head a key (what of it has no position) and a value, from a latent vector."""
    sources = _sources(place)
    key, value = _first(sources, ("qk_nope_head_dim",)), _first(sources, ("v_head_dim",))
    if key is None or value is None or rows != heads.groups * (key + value):
        return None
    starts = range(0, rows, key + value)
    return tuple((s, s + key) for s in starts), tuple((s + key, s + key + value) for s in starts)


def _codegen(rows: int) -> tuple[Part, ...]:
    """Four blocks of queries, values and keys each, as the model was cut over four devices."""
    block, third = rows // 4, rows // 12
    q, v, k = (tuple((b + i * third, b + (i + 1) * third) for b in range(0, rows, block)) for i in range(3))
    return q, k, v


def is_fused_name(name: str) -> bool:
    """Whether a layer of this name holds q, k and v."""
    return bool(_FUSED.match(name))


def head_rows(place: Place, rows: int) -> tuple[tuple[Part, ...], tuple[Part, ...]] | None:
    """Output rows of every query head and of every key head of a projection with this many rows.

    Of a projection that is not fused all heads stand in the first place, whatever it projects to; None where the
    numbers of heads do not fit the rows.
    """
    heads, name = _heads(place), _projection_name(place)
    if heads is None:
        return None
    if not is_fused_name(name):
        return (_chop(((0, rows),), heads.size), ()) if rows % heads.size == 0 else None
    parts = _fused_parts(place, name, rows, heads)
    if parts is None or len(parts) != 3:
        return None
    q, k, _ = parts
    return _chop(q, heads.size), _chop(k, heads.size)


def latent_rows(place: Place, rows: int) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]] | None:
    """Of latent attention: rows of every head's query and key without position, and of its query with position.

    The key with position is one for all heads. None for a projection of anything else.
    """
    heads, name, sources = _heads(place), _projection_name(place), _sources(place)
    positioned, plain = _first(sources, ("qk_rope_head_dim",)), _first(sources, ("qk_nope_head_dim",))
    if heads is None or positioned is None or plain is None:
        return None
    if name == "kv_b_proj":
        parts = _latent(place, rows, heads)
        return None if parts is None else ((), tuple((head,) for head in parts[0]), ())
    if name not in ("q_b_proj", "q_proj") or rows != heads.queries * (plain + positioned):
        return None
    starts = range(0, rows, plain + positioned)
    queries = tuple(((s, s + plain),) for s in starts)
    return queries, (), tuple(((s + plain, s + plain + positioned),) for s in starts)


def _projection_name(place: Place) -> str:
    last = place.path.rpartition(".")[2]
    if place.attribute == "in_proj_weight":
        return "in_proj"
    return last if place.attribute.endswith("weight") else place.attribute


def _one_after_the_other(heads: Heads) -> tuple[Part, ...]:
    q, kv = heads.queries * heads.size, heads.groups * heads.size
    return ((0, q),), ((q, q + kv),), ((q + kv, q + 2 * kv),)


def _interleaved(heads: Heads) -> tuple[Part, ...]:
    """Per group its queries, then its key, then its value."""
    per_group = heads.queries // heads.groups
    stride = (per_group + 2) * heads.size
    starts = [group * stride for group in range(heads.groups)]
    q_end, k_end = per_group * heads.size, (per_group + 1) * heads.size
    return (
        tuple((s, s + q_end) for s in starts),
        tuple((s + q_end, s + k_end) for s in starts),
        tuple((s + k_end, s + stride) for s in starts),
    )


def _chop(part: Part, size: int) -> tuple[Part, ...]:
    return tuple(((row, row + size),) for low, high, *_ in part for row in range(low, high, size))


def _lies_per_head(place: Place, heads: Heads) -> bool:
    kind = type(_attention(place)).__name__
    if _PER_HEAD.fullmatch(kind):
        return True
    if kind == "FalconAttention":  # multi-query Falcon keeps its one key and value at the end
        return heads.groups > 1
    if kind == "GPTBigCodeAttention":
        return heads.groups > 1
    return False


def _attention(place: Place) -> Any:
    """The module that holds the projection; for ``in_proj_weight`` the owner itself."""
    if place.attribute == "in_proj_weight":
        return place.module
    for module in place.root.modules():
        if any(child is place.module for child in module._modules.values()):
            return module
    return place.module


def _heads(place: Place) -> Heads | None:
    sources = _sources(place)
    queries = _first(sources, _HEADS)
    if queries is None:
        return None
    groups = _first(sources, _GROUPS)
    if groups is None:
        shared = _first(sources, ("multi_query",)) and not _first(sources, ("new_decoder_architecture",))
        groups = 1 if shared else queries
    size = _latent_size(sources) or _first(sources, _SIZES)
    if size is None:
        width = _first(sources, ("embed_dim", "hidden_size", "n_embd", "d_model", "dim"))
        if width is None or width % queries:
            return None
        size = width // queries
    return Heads(queries, groups, size)


def _latent_size(sources: list[Any]) -> int | None:
    """Size of a query of latent attention: with and without position."""
    with_position, without = _first(sources, ("qk_rope_head_dim",)), _first(sources, ("qk_nope_head_dim",))
    return None if with_position is None or without is None else with_position + without


def _sources(place: Place) -> list[Any]:
    """Who may say numbers of heads, the nearest first."""
    attention = _attention(place)
    return [attention, getattr(attention, "config", None), *_configs_above(place)]


def _configs_above(place: Place) -> list[Any]:
    """Configurations of the modules that contain the place, the nearest first."""
    found = []
    for module in place.root.modules():
        config = module.__dict__.get("config")
        if config is not None and any(child is place.module for child in module.modules()):
            found.append(config)
    return found[::-1]


def _first(sources: list[Any], names: tuple[str, ...]) -> int | None:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return int(value)
    return None
