"""Drop-in Lightning callbacks; names load on first use, since the factory of this package runs in every Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_spectral.callbacks.fabric import FabricSpectralProbe
    from lightning_spectral.callbacks.spectral_rank import SpectralRankCallback
    from lightning_spectral.callbacks.tail_token_probe import TailTokenProbe
    from lightning_spectral.callbacks.update_audience import UpdateAudience
    from lightning_spectral.callbacks.weight_spectrum import WeightSpectrumCallback

VARIABLE = "LIGHTNING_SPECTRAL"
"""Environment variable that names a ``probe.yaml``, whose callbacks every Trainer and Fabric then gets."""

_HOME_OF = {
    "FabricSpectralProbe": "lightning_spectral.callbacks.fabric",
    "SpectralRankCallback": "lightning_spectral.callbacks.spectral_rank",
    "TailTokenProbe": "lightning_spectral.callbacks.tail_token_probe",
    "UpdateAudience": "lightning_spectral.callbacks.update_audience",
    "WeightSpectrumCallback": "lightning_spectral.callbacks.weight_spectrum",
}

__all__ = ["FabricSpectralProbe", "SpectralRankCallback", "TailTokenProbe", "UpdateAudience", "WeightSpectrumCallback"]


if not TYPE_CHECKING:  # a type checker knows the names above, and must not believe in any other

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'lightning_spectral.callbacks' has no attribute {name!r}")
        return getattr(import_module(_HOME_OF[name]), name)
