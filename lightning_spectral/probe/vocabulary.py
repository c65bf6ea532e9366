"""What a model says about its vocabulary."""

from __future__ import annotations

from torch import nn

from lightning_spectral.models.sites import Found
from lightning_spectral.models.stacks import num_ids
from lightning_spectral.probe.grouping import Grouping


def num_known_ids(model: nn.Module) -> int | None:
    """Ids of the tokenizer, where a model says how many of those that it embeds are padding (litgpt)."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    padded = [config for config in configs if hasattr(config, "padded_vocab_size")]
    return getattr(padded[0], "vocab_size", None) if padded else None


def vocabulary_sizes(found: Found, grouping: Grouping) -> set[int]:
    """Widths that logits over the vocabulary can have."""
    sizes = [grouping.vocab_size, num_ids(found.embedding)]
    sizes.append(getattr(found.head, "out_features", None))
    return {size for size in sizes if isinstance(size, int)}
