"""What TensorBoard loads at its start. It must never fail: an error here would stop TensorBoard itself."""

from __future__ import annotations

import logging
from typing import Any

try:
    from tensorboard.plugins.base_plugin import TBLoader
except ImportError:  # TensorBoard is not there, or not as we know it; nobody will ask for the loader

    class TBLoader:  # type: ignore[no-redef]
        """Stands in for the missing base class."""


class SpectralLoader(TBLoader):  # type: ignore[misc]
    """Makes the plugin, or leaves TensorBoard without it and says why."""

    def load(self, context: Any) -> Any:
        """The plugin; ``None`` (no tab) and a warning if it cannot be made.

        Args:
            context: TensorBoard's ``TBContext``.
        """
        try:
            from lightning_spectral.tensorboard.plugin import SpectralPlugin

            return SpectralPlugin(context)
        except Exception as error:
            logging.getLogger("tensorboard").warning(
                "lightning-spectral: no tab SPECTRAL, since its plugin could not be loaded (%s: %s); "
                "`pip install -U lightning-spectral` repairs an incomplete installation.",
                type(error).__name__,
                error,
            )
            return None
