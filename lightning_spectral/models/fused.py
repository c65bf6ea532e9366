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

_FUSED = re.compile(r"^(qkv|qkv_proj|c_attn|query_key_value|wqkv|in_proj|attn_qkv|qkv_net)$", re.IGNORECASE)
_GATE_UP = re.compile(r"^(gate_up_proj|w12|gate_up|fc_gate_up)$")
_SINGLE = re.compile(r"^(q|k|v|query|key|value|[qkv]_proj|[qkv]_lin|wq|wk|wv)$", re.IGNORECASE)
# q, k and v of a head lie beside each other: (heads, 3, head size)
_PER_HEAD = re.compile(r"GPTNeoX\w*Attention|BloomAttention|PersimmonAttention|GPTNeoXJapanese\w*")


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
    if _GATE_UP.match(name) and rows % 2 == 0 and type(place.module).__name__ != "GptOssExperts":  # interleaved there
        return ((0, rows // 2),), ((rows // 2, rows),)
    if views.stack > 1 or not (_FUSED.match(name) or (by_head and _SINGLE.match(name))):
        return None
    heads = _heads(place)
    if heads is None:
        return None
    if _SINGLE.match(name):
        return _chop(((0, rows),), heads.size) if rows % heads.size == 0 else None
    if rows != (heads.queries + 2 * heads.groups) * heads.size:
        return None
    parts = _interleaved(heads) if _lies_per_head(place, heads) else _one_after_the_other(heads)
    if not by_head:
        return parts
    return tuple(single for part in parts for single in _chop(part, heads.size))


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
    if rows != (heads.queries + 2 * heads.groups) * heads.size:
        return None
    q, k, _ = _interleaved(heads) if _lies_per_head(place, heads) else _one_after_the_other(heads)
    return _chop(q, heads.size), _chop(k, heads.size)


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
    return tuple(((row, row + size),) for low, high in part for row in range(low, high, size))


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
    attention = _attention(place)
    sources = [attention, getattr(attention, "config", None), *_configs_above(place)]
    queries = _first(sources, _HEADS)
    if queries is None:
        return None
    groups = _first(sources, _GROUPS)
    if groups is None:
        shared = _first(sources, ("multi_query",)) and not _first(sources, ("new_decoder_architecture",))
        groups = 1 if shared else queries
    size = _first(sources, _SIZES)
    if size is None:
        width = _first(sources, ("embed_dim", "hidden_size", "n_embd", "d_model", "dim"))
        if width is None or width % queries:
            return None
        size = width // queries
    return Heads(queries, groups, size)


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
