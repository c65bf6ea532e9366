"""Matrix optimizers that give the same update on one device and under every way to divide a model over ranks."""

from lightning_spectral.optim.adamuon import AdaMuon
from lightning_spectral.optim.adamw import AdamW
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.dion import Dion
from lightning_spectral.optim.dion2 import Dion2, NorDion2
from lightning_spectral.optim.muon import Muon
from lightning_spectral.optim.muonh import MuonH
from lightning_spectral.optim.normuon import NorMuon
from lightning_spectral.optim.soap import SOAP

__all__ = ["SOAP", "AdaMuon", "AdamW", "Dion", "Dion2", "Muon", "MuonH", "NorDion2", "NorMuon", "SpectralOptimizer"]
