"""Records of earlier schemas, read as today's."""

from __future__ import annotations

from typing import Any

_RENAMED_IN_2 = {
    "num_rows": "num_tokens",
    "rows_per_dim": "tokens_per_dim",
    "hard_rank_unbiased": "hard_rank_debiased",
    "soft_rank_unbiased": "soft_rank_debiased",
    "eee": "early_enrichment",
    "keep_share": "token_fraction",
}
_STATUS_RENAMED_IN_2 = {"few_rows": "few_tokens"}


def upgraded(content: dict[str, Any], version: int) -> dict[str, Any]:
    """The fields of a record of ``version`` under today's names; what it did not have is left to the defaults."""
    if version >= 2:
        return content
    renamed = {_RENAMED_IN_2.get(name, name): value for name, value in content.items()}
    if isinstance(renamed.get("conventions"), dict):
        renamed["conventions"] = {
            _RENAMED_IN_2.get(name, name): value for name, value in renamed["conventions"].items()
        }
    if "status" in renamed and isinstance(renamed["status"], str):
        renamed["status"] = _STATUS_RENAMED_IN_2.get(renamed["status"], renamed["status"])
    return renamed
