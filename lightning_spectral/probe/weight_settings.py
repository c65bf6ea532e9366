"""What of matrices is measured, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_spectral.functional.orthogonalize import coefficient_set
from lightning_spectral.text import did_you_mean
from lightning_spectral.text.arguments import require_count

WHAT = ("weight", "gradient", "momentum", "update")


@dataclass(frozen=True)
class WeightSettings:
    """What is measured; :class:`~lightning_spectral.WeightSpectrumCallback` documents the arguments."""

    every_n_steps: int = 200
    what: Sequence[str] = WHAT
    parameters: Sequence[str] | None = None
    coefficients: str | None = "muon"
    ns_steps: int = 5
    strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.what, str) or not self.what or set(self.what) - set(WHAT):
            wrong = next((one for one in self.what if one not in WHAT), "") if not isinstance(self.what, str) else ""
            close = did_you_mean(wrong, WHAT)
            hint = f"; {close}" if close.endswith("?") else "."
            raise ValueError(f"`what` must be a list from {list(WHAT)}, got {list(self.what)}{hint}")
        if self.coefficients is not None:
            coefficient_set(self.coefficients)
        require_count("ns_steps", self.ns_steps)
        require_count("every_n_steps", self.every_n_steps)
