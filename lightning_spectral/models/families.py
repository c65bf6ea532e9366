"""Where a decoder's feed-forward network is tapped: one row a family, matched by module names.

``post`` is the INPUT of the down projection (after the nonlinearity), ``pre`` the OUTPUT of the up projection. A name's
``{layer}`` and ``{expert}`` are numbers. To support another model, add a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_spectral.models.names import clean_name
from lightning_spectral.models.stacks import Site


@dataclass(frozen=True)
class ModelFamily:
    """Names of one kind of decoder, as suffixes of the full module name.

    Attributes:
        name: For messages.
        post: Down projections; a pattern with ``{layer}`` and maybe ``{expert}``.
        pre: Up projections before the nonlinearity, in order of preference.
        embedding: Token embedding.
        head: Output projection to the vocabulary.
        router: Module whose output says which tokens an expert gets, relative to the expert's own block.
    """

    name: str
    post: str
    pre: tuple[str, ...]
    embedding: str
    head: str
    router: str | None = None


FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily(
        "litgpt",
        post="transformer.h.{layer}.mlp.proj",
        pre=("transformer.h.{layer}.mlp.fc", "transformer.h.{layer}.mlp.fc_1"),
        embedding="transformer.wte",
        head="lm_head",
    ),
    ModelFamily(
        "litgpt MoE",
        post="transformer.h.{layer}.mlp.experts.{expert}.proj",
        pre=("transformer.h.{layer}.mlp.experts.{expert}.fc_1",),
        embedding="transformer.wte",
        head="lm_head",
        router="transformer.h.{layer}.mlp.gate",
    ),
    ModelFamily(
        "litgpt MoE, shared expert",
        post="transformer.h.{layer}.mlp.shared_experts.proj",
        pre=("transformer.h.{layer}.mlp.shared_experts.fc_1",),
        embedding="transformer.wte",
        head="lm_head",
    ),
    ModelFamily(
        "Hugging Face GPT-2",
        post="h.{layer}.mlp.c_proj",
        pre=("h.{layer}.mlp.c_fc",),
        embedding="wte",
        head="lm_head",
    ),
    ModelFamily(
        "Hugging Face LLaMA, Mistral, Qwen, Gemma",
        post="layers.{layer}.mlp.down_proj",
        pre=("layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.gate_up_proj"),
        embedding="embed_tokens",
        head="lm_head",
    ),
    ModelFamily(
        "Hugging Face GPT-NeoX (Pythia)",
        post="layers.{layer}.mlp.dense_4h_to_h",
        pre=("layers.{layer}.mlp.dense_h_to_4h",),
        embedding="embed_in",
        head="embed_out",
    ),
    ModelFamily(
        "Hugging Face Falcon, BLOOM",
        post="h.{layer}.mlp.dense_4h_to_h",
        pre=("h.{layer}.mlp.dense_h_to_4h",),
        embedding="word_embeddings",
        head="lm_head",
    ),
    ModelFamily(
        "Hugging Face Phi",
        post="layers.{layer}.mlp.fc2",
        pre=("layers.{layer}.mlp.fc1",),
        embedding="embed_tokens",
        head="lm_head",
    ),
    ModelFamily(
        "Hugging Face OPT",
        post="layers.{layer}.fc2",
        pre=("layers.{layer}.fc1",),
        embedding="embed_tokens",
        head="lm_head",
    ),
    ModelFamily(
        "torch.nn.TransformerEncoder / Decoder",
        post="layers.{layer}.linear2",
        pre=("layers.{layer}.linear1",),
        embedding="embedding",
        head="head",
    ),
)


@dataclass(frozen=True)
class TappedModel:
    """What :func:`resolve` found.

    Attributes:
        sites: Every place to measure, by layer.
        embedding: Token embedding: its input are the ids that really flow.
        head: Output projection, or ``None``.
        root: Innermost module that holds the embedding and all sites; its forward is one pass. The head may lie
            outside it.
    """

    sites: tuple[Site, ...]
    embedding: nn.Module
    head: nn.Module | None
    root: nn.Module


def resolve(
    model: nn.Module,
    *,
    sites: Sequence[str] = ("post",),
    modules: Sequence[str] | None = None,
    embedding: str | None = None,
) -> TappedModel:
    """Find the feed-forward sites, the token embedding and the head of a model.

    Args:
        model: Any module that holds a decoder, wrapped or not.
        sites: ``post``, ``pre`` or both.
        modules: Globs of down projections, for a model that no :data:`FAMILIES` row describes.
        embedding: Glob of the token embedding, where it is not the model's only or largest one.

    Raises:
        ValueError: If nothing matches; the message says what was looked for and how to name it.
    """
    unknown = set(sites) - {"pre", "post"}
    if unknown or not sites:
        raise ValueError(f"`sites` must name `post`, `pre` or both, got {list(sites)}.")
    named = {clean_name(name): module for name, module in model.named_modules() if clean_name(name)}
    found = _named_sites(named, modules, sites) if modules else _family_sites(named, sites)
    if not found:
        raise ValueError(
            f"No feed-forward site found in `{type(model).__name__}`. Known families: "
            f"{', '.join(family.name for family in FAMILIES)}. Name the down projections yourself: "
            "`modules=['*.ffn.down']`, or add a ModelFamily row."
        )
    token_embedding_name, token_embedding = _embedding(named, embedding, found)
    head = _head(named)
    root = _common_root(model, [site.name for site in found] + [token_embedding_name])
    with_widths = [replace(site, width=declared_width(site.module, site.site)) for site in sorted(found, key=_order)]
    return TappedModel(tuple(with_widths), token_embedding, head, root)


def declared_width(module: nn.Module, site: str) -> int | None:
    """Features of a site as its module declares them (``Linear``, Hugging Face's ``Conv1D``), or ``None``."""
    names = ("in_features", "nx") if site == "post" else ("out_features", "nf")
    widths = [getattr(module, name, None) for name in names]
    return next((width for width in widths if isinstance(width, int)), None)


def _family_sites(named: dict[str, nn.Module], sites: Iterable[str]) -> list[Site]:
    found: dict[tuple[str, str], Site] = {}
    for family in FAMILIES:
        pattern = _pattern(family.post)
        for name, module in named.items():
            match = pattern.search(name)
            if match is None or (name, "post") in found:
                continue
            prefix, numbers = name[: match.start()], match.groupdict()
            expert = None if numbers.get("expert") is None else int(numbers["expert"])
            stack = prefix + family.post.partition(".{layer}")[0]
            site = Site(name, int(numbers["layer"]), "post", module, expert, stack=stack)
            if family.router:
                site = _with_router(site, named, prefix + family.router.format(**numbers))
            up_names = [prefix + up.format(**numbers) for up in family.pre]
            if "post" in sites:
                found[name, "post"] = site
            if "pre" in sites:
                up_name = next((up for up in up_names if up in named), None)
                if up_name is None:
                    raise ValueError(f"`{name}` has no up projection among {up_names}: measure `sites=['post']` only.")
                found[up_name, "pre"] = replace(site, name=up_name, site="pre", module=named[up_name])
    return list(found.values())


def _named_sites(named: dict[str, nn.Module], globs: Sequence[str], sites: Sequence[str]) -> list[Site]:
    if "pre" in sites:
        raise ValueError("`modules=[...]` names down projections: the pre site needs a ModelFamily row.")
    names = [name for name in named if any(fnmatchcase(name, glob) for glob in globs)]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            examples = [name for name, module in named.items() if isinstance(module, nn.Linear)][:6]
            raise ValueError(f"No module matches `{glob}`. Linear modules here: {examples}.")
    indices = [re.findall(r"\d+", name) for name in names]
    own = [int(numbers[0]) if numbers else -1 for numbers in indices]
    layers = own if len(set(own)) == len(own) and -1 not in own else range(len(names))
    return [Site(name, layer, "post", named[name], stack="") for name, layer in zip(names, layers, strict=True)]


def _with_router(site: Site, named: dict[str, nn.Module], router: str) -> Site:
    block = named[router.rpartition(".")[0]]
    config = getattr(block, "config", None)
    return replace(site, router=named[router], num_experts_per_token=int(getattr(config, "n_expert_per_token", 1) or 1))


def _embedding(named: dict[str, nn.Module], glob: str | None, sites: Sequence[Site]) -> tuple[str, nn.Module]:
    if glob is not None:
        for name, module in named.items():
            if fnmatchcase(name, glob):
                return name, module
        raise ValueError(f"No module matches the embedding `{glob}`.")
    for family in FAMILIES:
        if _pattern(family.post).search(sites[0].name):
            for name, module in named.items():
                if name == family.embedding or name.endswith("." + family.embedding):
                    return name, module
    tables = {name: module for name, module in named.items() if isinstance(module, nn.Embedding)}
    if not tables:
        raise ValueError("No token embedding found: name it, `embedding='*.tok_emb'`.")
    return max(tables.items(), key=lambda item: int(item[1].num_embeddings))


def _head(named: dict[str, nn.Module]) -> nn.Module | None:
    for ending in dict.fromkeys(family.head for family in FAMILIES):
        for name, module in named.items():
            if name == ending or name.endswith("." + ending):
                return module
    return None


def _common_root(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The innermost module whose clean name is a parent of all names; of its wrappers, the outermost."""
    parts = [name.split(".") for name in names]
    common: list[str] = []
    for level in zip(*(path[:-1] for path in parts), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    for depth in range(len(common), -1, -1):
        prefix = ".".join(common[:depth])
        for name, module in model.named_modules():
            # ModuleList and the like are containers without a forward of their own
            if clean_name(name) == prefix and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                return module
    return model


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(rf"(?:(?<=\.)|^){escaped}$")


def _order(site: Site) -> tuple[int, int, str]:
    return (site.layer, -1 if site.expert is None else site.expert, site.site)
