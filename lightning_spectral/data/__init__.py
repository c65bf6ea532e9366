"""Text -> tokenizer, counts, blocks in a fixed order; the data modules load on first use (they need litgpt)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_spectral.data.modules import HubText, StateOfTheUnion, TextFiles, TokenFiles
    from lightning_spectral.data.text_blocks import TextBlocks

__all__ = ["HubText", "StateOfTheUnion", "TextBlocks", "TextFiles", "TokenFiles"]


if not TYPE_CHECKING:  # a type checker knows the names above, and must not believe in any other

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'lightning_spectral.data' has no attribute {name!r}")
        from lightning_spectral.data import modules, text_blocks

        return getattr(text_blocks if name == "TextBlocks" else modules, name)
