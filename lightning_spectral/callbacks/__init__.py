"""Drop-in Lightning callbacks."""

from lightning_spectral.callbacks.spectral_rank import SpectralRankCallback
from lightning_spectral.callbacks.tail_token_probe import TailTokenProbe

__all__ = ["SpectralRankCallback", "TailTokenProbe"]
