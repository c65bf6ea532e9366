"""How buckets and metrics are named and coloured wherever a record is drawn: TensorBoard, report, notebook, W&B."""

from __future__ import annotations

from collections.abc import Iterable
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

# by the class's name in run.json or a sweep's label; Okabe and Ito's palette, as in the report
OPTIMIZER_COLORS: Final = {
    "AdamW": "#E69F00",
    "Adam": "#E69F00",
    "adamw": "#E69F00",
    "Muon": "#0072B2",
    "muon": "#0072B2",
    "NorMuon": "#56B4E9",
    "normuon": "#56B4E9",
    "Dion": "#009E73",
    "dion": "#009E73",
    "dion_2": "#009E73",
    "dion_16": "#CC79A7",
    "Lion": "#666666",
    "SGD": "#999999",
}


def ordered_buckets(buckets: Iterable[str]) -> list[str]:
    """Pooled, head, mid, tail, then groups of the user's own by name."""
    known = list(BUCKET_NAMES)
    return sorted(set(buckets), key=lambda name: (known.index(name) if name in known else len(known), name))


def bucket_colors(buckets: Iterable[str]) -> dict[str, str]:
    """A colour for each bucket: the four of a token probe always have the same."""
    own = [bucket for bucket in ordered_buckets(buckets) if bucket not in BUCKET_COLORS]
    spare = {bucket: _SPARE[place % len(_SPARE)] for place, bucket in enumerate(own)}
    return {bucket: BUCKET_COLORS.get(bucket) or spare[bucket] for bucket in ordered_buckets(buckets)}
