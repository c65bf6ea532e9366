"""Matrix optimizers that give the same update on one device, DDP, FSDP1 and FSDP2."""

from lightning_spectral.optim.adamw import AdamW
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.dion import Dion
from lightning_spectral.optim.muon import Muon
from lightning_spectral.optim.normuon import NorMuon

__all__ = ["AdamW", "Dion", "Muon", "NorMuon", "SpectralOptimizer"]
