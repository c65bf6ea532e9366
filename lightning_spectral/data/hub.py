"""A data set of the Hugging Face hub, or a folder that ``datasets.load_dataset`` reads, as a stream of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lightning_spectral.data.corpus import Corpus, texts_of
from lightning_spectral.data.files import digest_of, files_below, refuse_placeholder
from lightning_spectral.text import one_line

_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes beside the tables


@dataclass(frozen=True)
class HubCorpus(Corpus):
    """Splits of a data set; nothing is downloaded but what is read.

    Attributes:
        dataset: ``owner/name``, or a folder.
        config: Configuration of the data set, if it has several.
        split: What is trained on.
        held_out_split: What is validated on; empty for every 18th block of ``split``.
        revision: Commit, tag or branch.
    """

    files: tuple[Path, ...] = ()
    dataset: str = ""
    config: str | None = None
    split: str = "train"
    held_out_split: str = ""
    revision: str | None = None

    @property
    def where(self) -> str:
        """Where it is, for a message."""
        return f"split `{self.split}` of the data set `{self.dataset}`"

    @property
    def names(self) -> list[str]:
        """What it is made of."""
        return [f"{self.dataset}:{self.config or ''}:{self.split}"]

    @property
    def has_held_out(self) -> bool:
        """Whether a split is validated on."""
        return bool(self.held_out_split)

    def pieces(self, *, held_out: bool = False) -> Iterator[tuple[int, str]]:
        """Documents in the order of the data set.

        Raises:
            ValueError: If it cannot be read, or has no such split or column.
        """
        split = self.held_out_split if held_out else self.split
        try:
            yield from enumerate(texts_of(self._rows(split), self.text_column, f"{self.dataset} ({split})"))
        except Exception as error:  # of `datasets`, the hub, its HTTP client: each has its own
            offline = " Without a network give a folder of text, or what the cache of `datasets` holds."
            raise ValueError(
                f"cannot read split `{split}` of the data set `{self.dataset}`: {one_line(error).rstrip('.')}."
                f"{'' if Path(self.dataset).is_dir() else offline}"
            ) from error

    def _rows(self, split: str) -> Iterable[dict[str, object]]:
        """Rows of a split, as a stream; a folder of ``save_to_disk`` is mapped into memory."""
        import datasets

        folder = Path(self.dataset)
        if not any((folder / name).is_file() for name in _SAVED):
            return datasets.load_dataset(  # type: ignore[no-any-return]
                self.dataset, self.config, split=split, revision=self.revision, streaming=True
            )
        saved = datasets.load_from_disk(self.dataset)
        if not isinstance(saved, datasets.DatasetDict):
            saved = {str(saved.split or "train"): saved}
        if split not in saved:
            raise ValueError(f"its splits are {', '.join(saved)}")
        return saved[split]  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """SHA-256 over names and the commit, or over the files of a folder: another state of it is another corpus."""
        parts = [self.dataset, self.config or "", self.split, self.held_out_split, self.text_column, self._state()]
        return sha256("\0".join(parts).encode()).hexdigest()

    def _state(self) -> str:
        folder = Path(self.dataset)
        if folder.is_dir():
            files = files_below(folder)
            for file in files:
                refuse_placeholder(file)
            return ",".join(f"{file.relative_to(folder)}:{digest_of(file)}" for file in files)
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.dataset, revision=self.revision).sha)
        except Exception:  # offline, in the words of whatever client the hub uses: what the cache of `datasets` holds
            return self.revision or "main"
