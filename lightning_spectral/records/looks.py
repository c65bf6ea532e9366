"""How buckets and metrics are named and coloured wherever a record is drawn: TensorBoard, report, notebook, W&B."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import cycle
from typing import Final

BUCKET_NAMES: Final = {"pooled": "ALL", "head": "HEAD", "mid": "MID", "tail": "TAIL"}
# Paul Tol's bright scheme, safe for colour-blind readers, readable on white and on TensorBoard's dark grey
BUCKET_COLORS: Final = {"pooled": "#7A7A7A", "head": "#4477AA", "mid": "#228833", "tail": "#EE6677"}
_SPARE: Final = ("#AA3377", "#66CCEE", "#CCBB44", "#8B6F3E", "#7A5195")

METRIC_NAMES: Final = {
    "soft_rank": "soft rank",
    "hard_rank": "hard rank",
    "hard_rank_debiased": "hard rank, debiased",
    "soft_rank_debiased": "soft rank, debiased",
    "asymmetry": "asymmetry ln(soft / hard)",
    "spectral_entropy": "spectral entropy (nats)",
    "early_enrichment": "early enrichment",
    "top_share": "share of the largest mode",
    "tokens_per_dim": "tokens per dimension N/D",
    "loss": "loss (nats)",
    "accuracy": "top-1 accuracy",
}

# family of optimizers -> (colour, matplotlib's marker, name that people read); Okabe and Ito's palette, safe for
# colour-blind readers; yellow is left out (unreadable on white)
OPTIMIZERS: Final = {
    "adamw": ("#E69F00", "o", "AdamW"),
    "muon": ("#0072B2", "s", "Muon"),
    "normuon": ("#56B4E9", "D", "NorMuon"),
    "dion 1/2": ("#009E73", "^", "Dion (1/2)"),
    "dion 1/16": ("#CC79A7", "v", "Dion (1/16)"),
    "dion 1/4": ("#8B6F3E", "P", "Dion (1/4)"),
    "dion 1/8": ("#7A5195", "X", "Dion (1/8)"),
    "dion": ("#009E73", "^", "Dion"),
    "lion": ("#666666", "*", "Lion"),
    "sgd": ("#000000", "h", "SGD"),
}
# (colour, marker) of optimizers that the table does not know, in the order in which they come
SPARE_LOOKS: Final = (("#D55E00", "p"), ("#444444", "<"), ("#2F4B7C", ">"), ("#A05195", "H"), ("#665191", "8"))


def family(label: str) -> tuple[str, str]:
    """Key of :data:`OPTIMIZERS` and the rest of a label: ``dion_1_16`` -> (``dion 1/16``, ``""``)."""
    text = label.strip().replace("_", " ")
    found = re.match(r"dion\W*(?:r\W*)?\(?1\s*[/ ]\s*(\d+)\)?(.*)", text, re.IGNORECASE)
    if found and f"dion 1/{found[1]}" in OPTIMIZERS:
        return f"dion 1/{found[1]}", found[2].strip()
    for key in sorted((key for key in OPTIMIZERS if " " not in key), key=len, reverse=True):
        if re.match(rf"{key}(?![a-z])", text, re.IGNORECASE):
            return key, text[len(key) :].strip()
    return "", text


def optimizer_colors(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each optimizer (its class or its label in a sweep): the known ones always have the same."""
    spare = cycle(color for color, _ in SPARE_LOOKS)
    named = {label: family(label)[0] for label in dict.fromkeys(labels)}
    return {label: OPTIMIZERS[base][0] if base else next(spare) for label, base in named.items()}


def bucket_name(bucket: str) -> str:
    """What people read: ALL, HEAD, MID, TAIL, or the name of a group of their own."""
    return BUCKET_NAMES.get(bucket, bucket)


def metric_name(metric: str) -> str:
    """What people read, in lower case."""
    return METRIC_NAMES.get(metric, metric)


def ordered_buckets(buckets: Iterable[str]) -> list[str]:
    """Pooled, head, mid, tail, then groups of the user's own by name."""
    known = list(BUCKET_NAMES)
    return sorted(set(buckets), key=lambda name: (known.index(name) if name in known else len(known), name))


def bucket_colors(buckets: Iterable[str]) -> dict[str, str]:
    """A colour for each bucket: the four of a token probe always have the same."""
    own = [bucket for bucket in ordered_buckets(buckets) if bucket not in BUCKET_COLORS]
    spare = {bucket: _SPARE[place % len(_SPARE)] for place, bucket in enumerate(own)}
    return {bucket: BUCKET_COLORS.get(bucket) or spare[bucket] for bucket in ordered_buckets(buckets)}
