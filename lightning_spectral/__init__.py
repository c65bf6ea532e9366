"""Spectral scaling measurement for PyTorch Lightning and litgpt.

Names load on first use, so that reading records or starting TensorBoard needs neither torch nor lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_spectral.analysis.load import load
    from lightning_spectral.callbacks import FabricSpectralProbe, SpectralRankCallback, TailTokenProbe, UpdateAudience
    from lightning_spectral.callbacks.alarm import SpectralAlarm
    from lightning_spectral.callbacks.huggingface import HuggingFaceProbe
    from lightning_spectral.callbacks.qk_clip import QKClipCallback
    from lightning_spectral.callbacks.sentences import SentenceParser
    from lightning_spectral.callbacks.weight_spectrum import WeightSpectrumCallback
    from lightning_spectral.memory.module import AssociativeMemory, AssociativeMemoryDataModule
    from lightning_spectral.memory.recall import FactRecall, FactRecallDataModule
    from lightning_spectral.optim import SOAP, AdaMuon, AdamW, Dion, Dion2, Muon, MuonH, NorDion2, NorMuon
    from lightning_spectral.probe.observe import observe
    from lightning_spectral.records import SpectralRecord, WeightRecord, read_spectral, read_weights
    from lightning_spectral.report.notebook import show

__version__ = "0.1.0"

_HOME_OF = {
    "AdamW": "lightning_spectral.optim",
    "AssociativeMemory": "lightning_spectral.memory.module",
    "AssociativeMemoryDataModule": "lightning_spectral.memory.module",
    "AdaMuon": "lightning_spectral.optim",
    "Dion": "lightning_spectral.optim",
    "Dion2": "lightning_spectral.optim",
    "FabricSpectralProbe": "lightning_spectral.callbacks",
    "FactRecall": "lightning_spectral.memory.recall",
    "FactRecallDataModule": "lightning_spectral.memory.recall",
    "HuggingFaceProbe": "lightning_spectral.callbacks.huggingface",
    "Muon": "lightning_spectral.optim",
    "MuonH": "lightning_spectral.optim",
    "NorDion2": "lightning_spectral.optim",
    "NorMuon": "lightning_spectral.optim",
    "QKClipCallback": "lightning_spectral.callbacks.qk_clip",
    "SOAP": "lightning_spectral.optim",
    "SentenceParser": "lightning_spectral.callbacks.sentences",
    "SpectralAlarm": "lightning_spectral.callbacks.alarm",
    "SpectralRankCallback": "lightning_spectral.callbacks",
    "SpectralRecord": "lightning_spectral.records",
    "TailTokenProbe": "lightning_spectral.callbacks",
    "UpdateAudience": "lightning_spectral.callbacks",
    "WeightRecord": "lightning_spectral.records",
    "WeightSpectrumCallback": "lightning_spectral.callbacks.weight_spectrum",
    "load": "lightning_spectral.analysis.load",
    "observe": "lightning_spectral.probe.observe",
    "read_spectral": "lightning_spectral.records",
    "read_weights": "lightning_spectral.records",
    "show": "lightning_spectral.report.notebook",
}

__all__ = [
    "SOAP",
    "AdaMuon",
    "AdamW",
    "AssociativeMemory",
    "AssociativeMemoryDataModule",
    "Dion",
    "Dion2",
    "FabricSpectralProbe",
    "FactRecall",
    "FactRecallDataModule",
    "HuggingFaceProbe",
    "Muon",
    "MuonH",
    "NorDion2",
    "NorMuon",
    "QKClipCallback",
    "SentenceParser",
    "SpectralAlarm",
    "SpectralRankCallback",
    "SpectralRecord",
    "TailTokenProbe",
    "UpdateAudience",
    "WeightRecord",
    "WeightSpectrumCallback",
    "__version__",
    "load",
    "observe",
    "read_spectral",
    "read_weights",
    "show",
]

if not TYPE_CHECKING:  # a type checker knows the names above, and must not believe in any other

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            from lightning_spectral.text import did_you_mean

            hint = "" if name.startswith("_") else f": {did_you_mean(name, __all__, otherwise='it has')}"
            raise AttributeError(f"module 'lightning_spectral' has no attribute {name!r}{hint}")
        return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
