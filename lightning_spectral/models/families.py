"""Hints where structure alone is ambiguous: words in names, and rows that users add for models of their own.

A row names the down projections of one kind of model by a glob; in the blocks where it matches it is used instead of
structure. Give rows by argument (``hints=[...]`` of every callback and of ``observe``), or let a package bring them
under the entry point ``lightning_spectral.models``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

ENTRY_POINT = "lightning_spectral.models"

# Words in the path of a module below its block, or in the name of its class.
# What mixes positions: attention, and recurrences and state spaces, whose projections look like a network's.
_ATTENTION = re.compile(
    r"att(entio)?n|(^|_)mha($|_)|self_att|cross_att|retention|mamba|temporal_block|recurrent_?block|"
    r"(^|_)(rg_?)?(lru|ssm|gru|lstm)($|_)",
    re.IGNORECASE,
)
_FEED_FORWARD = re.compile(
    r"(^|_)(mlp|ffn?|ffwd|moe)\d*($|_)|mlp|ffn|feed_?forward|experts?|dense(relu|act|gated)|layerff|positionwise|"
    r"channel_mix|swiglu|geglu",
    re.IGNORECASE,
)
_ATTENTION_LEAF = re.compile(
    r"^(w?[qkvo]|[qkvo]_(proj|lin|net)|(q|k|v|o|out)_?proj|w_?qkv|(qkv|kv|q_?kv)(_?proj)?|query|key|value|query_key_value|"
    r"c_attn|in_proj|(q|kv)_[ab]_proj(_with_mqa)?|to_(q|k|v|kv|qkv|out)|att(n|ention)?_?\w*)$",
    re.IGNORECASE,
)
_DOWN_LEAF = re.compile(
    r"down|(^|_)(fc_?2|w_?2|wo|proj|c_proj|fc_out|ff_out|linear_?2|lin_?2|dense_?2|layer_?2|dense_4h_to_h|out(put)?|net_?2|"
    r"output_dense|pwconv2)$",
    re.IGNORECASE,
)
_NOT_MEASURED = re.compile(
    r"lora|adapter|bottleneck|prompt_encoder|prefix_encoder|(position|pos)_bias|cpb_mlp|rel(ative)?_pos", re.IGNORECASE
)

_UP_LEAF = re.compile(r"(^|_)(gate|up)($|_)", re.IGNORECASE)
_OTHER_TABLE = re.compile(r"pos(ition)?(_|s|$|e)|wpe|type|segment", re.IGNORECASE)


@dataclass(frozen=True)
class Hint:
    """Names of one kind of model, for what structure does not find or finds wrongly.

    Attributes:
        name: For messages.
        down: Glob of the down projections' full paths, e.g. ``*.trunk.*.contract``.
        up: Glob of the up projections, or empty: found by structure.

    Raises:
        ValueError: If it names no down projections.
    """

    name: str
    down: str
    up: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.down, str) and self.down and isinstance(self.up, str)):
            raise ValueError(f"`hints`: each names down projections by a glob, got {self.down!r}, {self.up!r}.")


def as_hints(values: Iterable[Hint | Mapping[str, str] | str] | None) -> tuple[Hint, ...]:
    """Rows as users write them.

    Args:
        values: Each a :class:`Hint`, a mapping with ``down`` and perhaps ``up`` and ``name`` (YAML), or ``DOWN`` or
            ``DOWN,UP`` (command line).

    Raises:
        ValueError: If one is none of these; the message says what was seen.
    """
    if isinstance(values, (str, Mapping, Hint)) or (values is not None and not isinstance(values, Iterable)):
        values = [values]
    return tuple(_as_hint(value) for value in values or ())


def _as_hint(value: object) -> Hint:
    if isinstance(value, Hint):
        return value
    if isinstance(value, str) and value.count(",") <= 1:
        down, _, up = value.partition(",")
        return Hint(down.strip(), down.strip(), up.strip())
    if isinstance(value, Mapping) and "down" in value and not set(value) - {"name", "down", "up"}:
        return Hint(str(value.get("name") or value["down"]), value["down"], value.get("up") or "")
    raise ValueError(
        "`hints`: each is a mapping with `down` (a glob of down projections) and perhaps `up` and `name`, or "
        f"`DOWN,UP`, got {value!r}."
    )


@cache
def installed_hints() -> tuple[Hint, ...]:
    """Rows of installed packages. One whose entry point cannot be loaded is left out: it may be of another model."""
    found: list[Hint] = []
    for entry in entry_points(group=ENTRY_POINT):
        try:
            loaded = entry.load()
        except Exception:  # noqa: S112 - a broken package must not end a run that does not need it
            continue
        rows: Iterable[object] = [loaded] if isinstance(loaded, Hint) else loaded
        found += [row for row in rows if isinstance(row, Hint)]
    return tuple(found)


@cache
def kind_of(name: str, class_name: str) -> str:
    """``attention``, ``feed_forward`` or empty, by the last part of a path and the class of a module below a block."""
    for word in (name, class_name):
        attention, feed_forward = _ATTENTION.search(word), _FEED_FORWARD.search(word)
        if attention and not feed_forward:
            return "attention"
        if feed_forward and not attention:
            return "feed_forward"
    return ""


def is_attention_leaf(name: str) -> bool:
    """Whether a linear module beside others is attention's, by its own name."""
    return _ATTENTION_LEAF.match(name) is not None


def is_down_leaf(name: str) -> bool:
    """Whether a linear module is a down projection, by its own name."""
    return _DOWN_LEAF.search(name) is not None and _UP_LEAF.search(name) is None


@cache
def is_not_measured(name: str) -> bool:
    """Whether a part of a path says that what follows is beside the network: adapters, prompts, biases of positions."""
    return _NOT_MEASURED.search(name) is not None


def is_other_table(name: str) -> bool:
    """Whether a table is of positions or segments rather than of tokens, by its name."""
    return _OTHER_TABLE.search(name.rpartition(".")[2]) is not None
