"""What a probe measures and how, checked before anything else happens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_spectral.functional.rank import DEFAULT_RENYI_ORDERS
from lightning_spectral.models.families import Hint
from lightning_spectral.text.arguments import require_choice, require_count

# The paper's code adds this to `sum l^2`, whatever the scale of the activations.
PAPER_EPSILON = 1e-12
SOFT_METHODS = ("exact", "approx")


@dataclass(frozen=True)
class ProbeOptions:
    """Arguments of the callbacks, under the same names; these say what each means.

    Attributes:
        reduce: Add the rows of all ranks; ``False`` measures rank 0's own.
        eigenvalues: Hand every spectrum to all ranks, not only the numbers made of it.
    """

    sites: tuple[str, ...] = ("post",)
    modules: tuple[str, ...] | None = None
    embedding: str | None = None
    hints: tuple[Hint, ...] = ()
    token_fraction: float = 1.0
    num_jackknife_groups: int = 2
    renyi_orders: tuple[float, ...] = DEFAULT_RENYI_ORDERS
    absolute_epsilon: float = 0.0
    with_losses: bool = False
    reduce: bool = True
    soft: str = "exact"
    eigenvalues: bool = True

    def __post_init__(self) -> None:
        if not self.sites or set(self.sites) - {"pre", "post"}:
            raise ValueError(f"`sites` must list `post`, `pre` or both, got {list(self.sites)}.")
        if not 0 < self.token_fraction <= 1:
            raise ValueError(f"`token_fraction` must be in (0, 1], got {self.token_fraction}.")
        require_count("num_jackknife_groups", self.num_jackknife_groups)
        require_choice("soft", self.soft, SOFT_METHODS)
        bad = [order for order in self.renyi_orders if not order > 0 or math.isnan(order)]
        if bad:
            raise ValueError(f"`renyi_orders` must be > 0, got {bad}.")


def conventions_of(options: ProbeOptions, **more: str) -> dict[str, str]:
    """The choices that change a number, for the records."""
    return {
        "covariance": "centred, N-1",
        "epsilon": f"{options.absolute_epsilon:g}",
        "token_fraction": f"{options.token_fraction:g}",
        "reduction": "all_ranks" if options.reduce else "rank0_local",
        **({"jackknife_groups": str(options.num_jackknife_groups)} if options.num_jackknife_groups > 1 else {}),
        **more,
    }
