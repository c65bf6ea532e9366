"""The associative memory as a LightningModule, and the experiments of ``lightning-spectral memory``."""
