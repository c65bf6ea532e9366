"""Ranks of a finished model on any text, without a training loop: the records of a run, at stage ``measure``.

A checkpoint is a folder in litgpt's format (``lit_model.pth``), a Lightning ``.ckpt`` of this package's ``pretrain``,
or a Hugging Face folder (``config.json`` and safetensors).

Axes: S sequences, B of them in a batch, T positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_spectral.data.corpus import Corpus, documents
from lightning_spectral.data.encode import Encoder
from lightning_spectral.models.families import Hint, as_hints
from lightning_spectral.models.stacks import find_stacks, num_ids
from lightning_spectral.probe.grouping import check_vocabulary, load_counts
from lightning_spectral.probe.host import Host
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.observer import Observer
from lightning_spectral.probe.run_folder import new_run_id
from lightning_spectral.probe.settings import MEASURE, BucketSettings, ProbeSettings
from lightning_spectral.records import LossRecord, SpectralRecord, read_losses
from lightning_spectral.text import one_line
from lightning_spectral.text.arguments import require_count
from lightning_spectral.training.load_checkpoint import LoadedModel, load_checkpoint, with_tokenizer

DEFAULT_NUM_TOKENS = 65_536
DEFAULT_SEQ_LENGTH = 512
SHARES = (0.33, 0.67)


@dataclass(frozen=True)
class Measured:
    """Records of one checkpoint, as they were written to ``folder``."""

    checkpoint: Path
    folder: Path
    spectral: list[SpectralRecord]
    losses: list[LossRecord]
    notes: list[str] = field(default_factory=list)


def measure_checkpoint(
    checkpoint: str | Path,
    corpus: Corpus,
    folder: str | Path,
    *,
    counts: str | Path | None = None,
    tokenizer_dir: Path | None = None,
    num_tokens: int = DEFAULT_NUM_TOKENS,
    seq_length: int | None = None,
    batch_size: int = 8,
    sites: Sequence[str] = ("post",),
    modules: Sequence[str] | None = None,
    hints: Sequence[Hint | dict[str, str] | str] | None = None,
    num_jackknife_groups: int = 2,
    device: str = "auto",
    memory_limit_mib: float | None = None,
    stream_weights: bool | None = None,
    resume: bool = False,
    labels: dict[str, str] | None = None,
) -> Measured:
    """Run a checkpoint over text and write its records to ``folder``.

    Args:
        checkpoint: litgpt folder, Lightning ``.ckpt`` of ``pretrain``, or Hugging Face folder.
        corpus: Text; its first ``num_tokens`` tokens are measured, none held out.
        folder: Run folder to write; an earlier one there is moved to ``previous/``.
        counts: Token counts that say what HEAD and TAIL are; default: counted on the measured text itself.
        tokenizer_dir: Default: the checkpoint's own.
        num_tokens: How many tokens to measure, in whole sequences.
        seq_length: Default: what the model takes, at most 512.
        batch_size: Sequences per forward pass.
        sites: ``post``, ``pre`` or both.
        modules: Globs of down projections to measure instead of all.
        hints: As in ``SpectralRankCallback``.
        num_jackknife_groups: As in ``SpectralRankCallback``: at least 2 for unbiased ranks, 8 for useful intervals.
        device: ``auto``, ``cpu`` or ``cuda``.
        memory_limit_mib: As in ``SpectralRankCallback``: where all rows do not fit, an even sample of them is kept.
        stream_weights: Hold one block's weights at a time (Hugging Face folders); default: where all are too many.
        resume: Add to the records that are in ``folder``: another step of the same model on the same text.
        labels: Of the run, for analysis; default: the checkpoint's name.

    Raises:
        ValueError: If checkpoint, tokenizer, counts and text do not fit together.
        FileNotFoundError: If one of them is not there.
    """
    _refuse_below_one(num_tokens=num_tokens, batch_size=batch_size, seq_length=seq_length)
    checkpoint = Path(checkpoint).expanduser()
    loaded = load_checkpoint(checkpoint, stream_weights=stream_weights)
    encoder = _encoder(checkpoint, tokenizer_dir or loaded.tokenizer_dir)
    tokens, length = _sequences(corpus, encoder, num_tokens, _length(seq_length, loaded, checkpoint))
    vocab = _vocabulary(loaded.model, modules, as_hints(hints), tokens, checkpoint)
    table, notes = _counts(counts, tokens, vocab, encoder.vocab_size)
    chosen: dict[str, Any] = {"sites": tuple(sites), "modules": modules, "memory_limit_mib": memory_limit_mib}
    chosen |= {"hints": hints, "num_jackknife_groups": num_jackknife_groups, "labels": _labels(labels, checkpoint)}
    measurement = _measurement(table, _facts(counts, corpus, loaded), **chosen)
    same = asked(corpus, counts=counts, num_tokens=num_tokens, seq_length=seq_length, **chosen)
    hparams = {"data": corpus.names, "num_tokens": len(tokens) - 1, "seq_length": length, "asked": same}
    host = _host(folder, loaded, checkpoint, hparams, resume)
    spectral = _run(loaded, measurement, host, tokens, length, batch_size, _device(device))
    return Measured(checkpoint, Path(folder), spectral, _losses_of(folder, loaded.step), notes)


def _losses_of(folder: str | Path, step: int | None) -> list[LossRecord]:
    return [record for record in read_losses(folder).records if record.step == step]


def _labels(given: dict[str, str] | None, checkpoint: Path) -> dict[str, str]:
    return {"checkpoint": checkpoint.name} if given is None else given


def _facts(counts: str | Path | None, corpus: Corpus, loaded: LoadedModel) -> dict[str, str]:
    """What a reader of the records must know of where they come from."""
    return {
        "counts": "measured text" if counts is None else str(counts),
        "text": corpus.names[0],
        "step": "unknown" if loaded.step is None else "known",
    }


def _measurement(table: Any, facts: dict[str, str], **chosen: Any) -> Measurement:
    """One window over the text by frequency; strict, for there is no training to be kept from harm."""
    if chosen["modules"] is not None:
        chosen["modules"] = list(chosen["modules"])
    settings = ProbeSettings(on=(MEASURE,), strict=True, **chosen)
    return Measurement(settings, BucketSettings(counts=table, head_share=SHARES[0], mid_share=SHARES[1]), facts)


def asked(corpus: Corpus, **options: Any) -> dict[str, str]:
    """What records of one run folder have in common: the text and what is measured on it, as text."""
    names = ("counts", "num_tokens", "seq_length", "sites", "num_jackknife_groups")
    defaults = {name: inspect.signature(measure_checkpoint).parameters[name].default for name in names}
    chosen = {name: options.get(name, defaults[name]) for name in names}
    spelled = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in chosen.items()}
    return {"text": corpus.fingerprint(), **{name: str(value) for name, value in spelled.items()}}


def _refuse_below_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None:
            require_count(name, count)


def _length(wanted: int | None, loaded: LoadedModel, checkpoint: Path) -> int:
    length = wanted or min(loaded.max_length, DEFAULT_SEQ_LENGTH)
    if length > loaded.max_length:
        raise ValueError(f"`seq_length` is {length}, but `{checkpoint}` takes {loaded.max_length} tokens: lower it.")
    return length


def _host(folder: str | Path, loaded: LoadedModel, checkpoint: Path, hparams: dict[str, Any], resume: bool) -> Host:
    return Host(
        folder=Path(folder),
        resume=resume,
        run_id=new_run_id(),
        describe={
            "optimizer": loaded.optimizer,
            "hparams": {"checkpoint": str(checkpoint.absolute()), "kind": loaded.kind, **hparams},
        },
    )


def _sequences(corpus: Corpus, encoder: Encoder, num_tokens: int, length: int) -> tuple[NDArray[np.int64], int]:
    """Whole sequences of the text's first tokens, and the token after the last; and their length."""
    tokens = _tokens(corpus, encoder, max(num_tokens // length, 1) * length + 1)
    num_sequences = (len(tokens) - 1) // length
    if num_sequences < 1:
        raise ValueError(
            f"the text has {len(tokens)} tokens, one sequence needs {length + 1}: give more, or lower `seq_length`."
        )
    return tokens[: num_sequences * length + 1], length


def _encoder(checkpoint: Path, tokenizer_dir: Path | None) -> Encoder:
    if tokenizer_dir is None or with_tokenizer(tokenizer_dir) is None:
        raise FileNotFoundError(
            f"no `tokenizer.json` or `tokenizer.model` in `{tokenizer_dir or checkpoint}`: name the folder of the "
            "tokenizer that the model was trained with (`tokenizer_dir`)."
        )
    try:
        return Encoder(tokenizer_dir)
    except Exception as error:  # whatever the tokenizer's own readers raise
        raise ValueError(f"the tokenizer in `{tokenizer_dir}` cannot be read: {one_line(error)}.") from error


def _tokens(corpus: Corpus, encoder: Encoder, enough: int) -> NDArray[np.int64]:
    parts: list[NDArray[Any]] = []
    found = 0
    for text in documents(corpus):
        parts.append(encoder([text + encoder.separator]))
        found += len(parts[-1])
        if found >= enough:
            break
    if not found:
        raise ValueError(f"`data`: there is no text in {corpus.where}.")
    return np.concatenate(parts)[:enough].astype(np.int64)


def _vocabulary(
    model: nn.Module,
    modules: Sequence[str] | None,
    hints: Sequence[Hint],
    tokens: NDArray[np.int64],
    checkpoint: Path,
) -> int:
    """Ids that the model embeds, at least those of the tokens."""
    vocab = num_ids(find_stacks(model, modules=modules, hints=hints).embedding)
    if vocab is None:
        raise ValueError(f"`{checkpoint}` embeds no token ids: it is no model of text.")
    if int(tokens.max(initial=0)) >= vocab:
        raise ValueError(
            f"the tokenizer gives ids up to {int(tokens.max())}, but `{checkpoint}` embeds {vocab}: use the tokenizer "
            "that it was trained with (`tokenizer_dir`)."
        )
    return vocab


def _counts(
    source: str | Path | None, tokens: NDArray[np.int64], vocab: int, num_known: int
) -> tuple[torch.Tensor, list[str]]:
    if source is None:
        counts = torch.from_numpy(np.bincount(tokens, minlength=vocab))
        return counts, [
            f"HEAD, MID and TAIL are those of the {len(tokens):,} measured tokens themselves (no counts given)."
        ]
    counts = load_counts(source)
    check_vocabulary(len(counts), vocab, num_known)
    return counts, [f"HEAD, MID and TAIL by `{source}`."]


def _run(
    loaded: LoadedModel,
    measurement: Measurement,
    host: Host,
    tokens: NDArray[np.int64],
    length: int,
    batch_size: int,
    device: torch.device,
) -> list[SpectralRecord]:
    """One evaluation over the tokens, by the observer that every loop has."""
    model = loaded.on(device)
    ids_SL = torch.from_numpy(tokens[:-1]).view(-1, length)
    targets_SL = torch.from_numpy(tokens[1:]).view(-1, length)
    records: list[SpectralRecord] = []
    host.published = lambda found, result: records.extend(found)
    observer = Observer(measurement, name="measure")
    observer.attach(model, host, trains=False)
    finished = False
    try:
        with torch.no_grad():
            observer.begin_evaluation(MEASURE)
            for ids_BT, targets_BT in zip(ids_SL.split(batch_size), targets_SL.split(batch_size), strict=True):
                batch = {"input_ids": ids_BT.to(device), "labels": targets_BT.to(device)}
                observer.begin_evaluation_batch()
                output = model(batch["input_ids"])
                logits = getattr(output, "logits", output)
                # the observer sees it
                nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
                observer.end_evaluation_batch(batch)
        observer.end_evaluation(loaded.step, loaded.tokens)
        finished = True
    finally:
        observer.detach(finished=finished)
    return records


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"`device` is `{name}`, but this machine has no CUDA device: use `cpu`.")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be auto, cpu, cuda or one GPU, such as cuda:1, got `{name}`.") from error
