"""Spectral scaling measurement for PyTorch Lightning and litgpt.

Names load on first use, so that reading records or starting TensorBoard needs neither torch nor lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME_OF = {
    "FabricSpectralProbe": "lightning_spectral.callbacks",
    "read_weights": "lightning_spectral.records",
    "WeightRecord": "lightning_spectral.records",
    "WeightSpectrumCallback": "lightning_spectral.callbacks.weight_spectrum",
    "AssociativeMemoryDataModule": "lightning_spectral.associative_memory",
    "AssociativeMemory": "lightning_spectral.associative_memory",
    "NorMuon": "lightning_spectral.optim",
    "Muon": "lightning_spectral.optim",
    "Dion": "lightning_spectral.optim",
    "AdamW": "lightning_spectral.optim",
    "SpectralRankCallback": "lightning_spectral.callbacks",
    "TailTokenProbe": "lightning_spectral.callbacks",
    "SpectralRecord": "lightning_spectral.records",
    "read_spectral": "lightning_spectral.records",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_spectral' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
