"""Ranks of a finished model on any text, without a training loop: the records of a run, at stage ``measure``.

A checkpoint is a folder in litgpt's format (``lit_model.pth``), a Lightning ``.ckpt`` of this package's ``pretrain``,
or a Hugging Face folder (``config.json`` and safetensors).

Axes: S sequences, B of them in a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from litgpt.config import Config
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_spectral.architecture import Architecture, adapt_config, build_gpt
from lightning_spectral.callbacks.grouping import Grouping, by_frequency, check_vocabulary, load_counts
from lightning_spectral.callbacks.options import ProbeOptions, conventions_of
from lightning_spectral.callbacks.probe import SpectralProbe
from lightning_spectral.callbacks.run_folder import RunFolder, new_run_id, package_versions
from lightning_spectral.callbacks.to_records import WindowId, loss_records, spectral_records
from lightning_spectral.checkpoints import step_of
from lightning_spectral.corpus import Corpus, documents
from lightning_spectral.export import load_final
from lightning_spectral.models.families import resolve
from lightning_spectral.recipe import named_config
from lightning_spectral.records import LossRecord, RunInfo, SpectralRecord
from lightning_spectral.tokens import Encoder

DEFAULT_NUM_TOKENS = 65_536
DEFAULT_SEQ_LENGTH = 512
SHARES = (0.33, 0.67)


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, ready to run.

    Attributes:
        model: In fp32, in eval mode; token ids in.
        kind: ``litgpt``, ``lightning`` or ``huggingface``.
        max_length: Longest sequence that it takes.
        step: Optimizer steps behind it; ``None`` if the checkpoint does not say.
        optimizer: Class name, or ``unknown``.
        tokenizer_dir: Folder of its tokenizer, or ``None``.
    """

    model: nn.Module
    kind: str
    max_length: int
    step: int | None = None
    optimizer: str = "unknown"
    tokenizer_dir: Path | None = None


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
    num_shards: int = 1,
    device: str = "auto",
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
        batch_size: Sequences a forward pass.
        sites: ``post``, ``pre`` or both.
        modules: Globs of down projections, for a model of no known family.
        num_shards: As in ``SpectralRankCallback``: more than 1 gives intervals.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: If checkpoint, tokenizer, counts and text do not fit together; the message says what to do.
        FileNotFoundError: If one of them is not there.
    """
    if num_tokens < 1 or batch_size < 1 or (seq_length is not None and seq_length < 1):
        raise ValueError(
            f"`num_tokens`, `batch_size` and `seq_length` must be >= 1, got {num_tokens}, {batch_size}, {seq_length}."
        )
    checkpoint = Path(checkpoint).expanduser()
    loaded = load_checkpoint(checkpoint)
    length = seq_length or min(loaded.max_length, DEFAULT_SEQ_LENGTH)
    if length > loaded.max_length:
        raise ValueError(f"`seq_length` is {length}, but `{checkpoint}` takes {loaded.max_length} tokens: lower it.")
    encoder = _encoder(checkpoint, tokenizer_dir or loaded.tokenizer_dir)
    tokens = _tokens(corpus, encoder, max(num_tokens // length, 1) * length + 1)
    vocab = _vocabulary(loaded.model, modules)
    if int(tokens.max(initial=0)) >= vocab:
        raise ValueError(
            f"the tokenizer gives ids up to {int(tokens.max())}, but `{checkpoint}` embeds {vocab}: use the tokenizer "
            "that it was trained with (`tokenizer_dir`)."
        )
    num_sequences = (len(tokens) - 1) // length
    if num_sequences < 1:
        raise ValueError(f"the text has {len(tokens)} tokens, one sequence needs {length + 1}: lower `seq_length`.")
    tokens = tokens[: num_sequences * length + 1]
    grouping, notes = _grouping(counts, tokens, vocab, encoder.vocab_size)
    options = ProbeOptions(
        sites=tuple(sites),
        modules=None if modules is None else tuple(modules),
        num_shards=num_shards,
        with_losses=True,
    )
    conventions = conventions_of(
        options,
        group_by="frequency",
        attribute_to="input",
        shares=f"{SHARES[0]:g}/{SHARES[1]:g}",
        counts=str(counts) if counts is not None else "measured text",
        step="known" if loaded.step is not None else "unknown, written as 0",
        text=str(corpus.files[0]),
    )
    result = _run(loaded.model, grouping, options, tokens, length, batch_size, _device(device))
    info = RunInfo(
        run_id=new_run_id(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        optimizer=loaded.optimizer,
        hparams={
            "checkpoint": str(checkpoint.absolute()),
            "kind": loaded.kind,
            "data": [str(file) for file in corpus.files[:8]],
            "num_tokens": num_sequences * length,
            "seq_length": length,
        },
        versions=package_versions(),
        labels={"checkpoint": checkpoint.name},
        conventions=conventions,
    )
    run_folder = RunFolder(folder, info, resume=False, writes=True)
    window = WindowId(info.run_id, "measure", loaded.step or 0, None)
    spectral, losses = spectral_records(result, window, conventions), loss_records(result, window)
    run_folder.append_spectral(spectral)
    run_folder.append_losses(losses)
    return Measured(checkpoint, Path(folder), spectral, losses, notes)


def load_checkpoint(path: Path) -> LoadedModel:
    """The model of a checkpoint of any of the three kinds.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is none of the kinds, torn, or does not fit its own configuration.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at `{path}`.")
    if path.name == "lit_model.pth":
        path = path.parent
    for is_kind, load in _KINDS:
        if is_kind(path):
            return load(path)
    raise ValueError(
        f"`{path}` is no checkpoint that can be read: expected a litgpt folder (`lit_model.pth`, `model_config.yaml`), "
        "a Lightning `.ckpt` file of `lightning-spectral pretrain`, or a Hugging Face folder (`config.json`, "
        "`*.safetensors`)."
    )


def _load_litgpt(folder: Path) -> LoadedModel:
    if not (folder / "model_config.yaml").is_file():
        raise FileNotFoundError(f"`{folder}` has `lit_model.pth` but no `model_config.yaml`: copy it from the run.")
    try:
        model = load_final(folder)
    except ValueError:
        raise
    except (TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"`{folder / 'model_config.yaml'}` is not litgpt's: {_one_line(error)}.") from error
    except Exception as error:  # a torn zip or pickle raises anything
        raise ValueError(f"`{folder / 'lit_model.pth'}` cannot be read ({_one_line(error)}): is it whole?") from error
    number = folder.name.removeprefix("step-")
    step = int(number) if folder.name.startswith("step-") and number.isdigit() else None
    return LoadedModel(model, "litgpt", model.config.block_size, step, tokenizer_dir=_with_tokenizer(folder))


def _load_lightning(file: Path) -> LoadedModel:
    try:
        # our own checkpoints hold tensors and plain values only: nothing in them needs to be executed
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        weights: dict[str, Tensor] = content["state_dict"]
        recipe: dict[str, Any] = content["hyper_parameters"]
        given = dict(recipe["model_config"] or named_config(recipe["model_name"]))
        architecture = Architecture(**recipe["architecture"])
        names = {name.removeprefix("model."): value for name, value in weights.items()}
        given["padded_vocab_size"] = names["lm_head.weight"].shape[0]
        given.setdefault("vocab_size", given["padded_vocab_size"])
    except KeyError as error:
        raise ValueError(
            f"`{file}` is not a checkpoint of `lightning-spectral pretrain`: it has no {error}. Measure a model of "
            "your own LightningModule with `trainer.validate` and `SpectralRankCallback(on=['validation'])`."
        ) from error
    except Exception as error:  # a torn zip or pickle raises anything
        raise ValueError(f"`{file}` cannot be read ({_one_line(error)}): is it whole?") from error
    model = build_gpt(adapt_config(Config(**given), architecture), architecture, seed=0)
    try:
        model.load_state_dict(names)
    except RuntimeError as error:
        raise ValueError(f"`{file}` does not fit its own recipe: {_one_line(error)}.") from error
    tokenizer = next(
        (
            folder
            for folder in (recipe.get("tokenizer_dir"), file.parent, file.parent.parent / "final")
            if folder and _with_tokenizer(Path(folder))
        ),
        None,
    )
    optimizer = recipe["optimizer"]
    optimizer = optimizer if isinstance(optimizer, str) else optimizer["class_path"]
    step = content.get("global_step", step_of(file))
    return LoadedModel(
        model,
        "lightning",
        model.config.block_size,
        step,
        optimizer.rpartition(".")[2],
        None if tokenizer is None else Path(tokenizer),
    )


def _load_hugging_face(folder: Path) -> LoadedModel:
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise ValueError(f"`{folder}` is a Hugging Face folder: `pip install transformers` to read it.") from error
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"`{folder}` holds no `*.safetensors`: save it with `model.save_pretrained(folder)`.")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"`{folder}` cannot be read ({_one_line(error)}): is every file whole?") from error
    if report["missing_keys"] or report.get("mismatched_keys"):
        lost = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
        raise ValueError(f"`{folder}` lacks {len(lost)} weights of its model, the first is `{lost[0]}`: is it whole?")
    model.config.use_cache = False
    max_length = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQ_LENGTH
    return LoadedModel(model.float(), "huggingface", int(max_length), tokenizer_dir=_with_tokenizer(folder))


_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], LoadedModel]], ...] = (
    (lambda path: (path / "lit_model.pth").is_file(), _load_litgpt),
    (lambda path: path.is_file() and path.suffix == ".ckpt", _load_lightning),
    (lambda path: (path / "config.json").is_file(), _load_hugging_face),
)


def _with_tokenizer(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) else None


def _encoder(checkpoint: Path, tokenizer_dir: Path | None) -> Encoder:
    if tokenizer_dir is None or _with_tokenizer(tokenizer_dir) is None:
        raise FileNotFoundError(
            f"no `tokenizer.json` or `tokenizer.model` in `{tokenizer_dir or checkpoint}`: name the folder of the "
            "tokenizer that the model was trained with (`tokenizer_dir`)."
        )
    try:
        return Encoder(tokenizer_dir)
    except Exception as error:  # whatever the tokenizer's own readers raise
        raise ValueError(f"the tokenizer in `{tokenizer_dir}` cannot be read: {_one_line(error)}.") from error


def _tokens(corpus: Corpus, encoder: Encoder, enough: int) -> NDArray[np.int64]:
    parts: list[NDArray[Any]] = []
    found = 0
    for text in documents(corpus):
        parts.append(encoder([text + encoder.separator]))
        found += len(parts[-1])
        if found >= enough:
            break
    if not found:
        raise ValueError(f"the {len(corpus.files)} file(s) at `{corpus.files[0]}` hold no text.")
    return np.concatenate(parts)[:enough].astype(np.int64)


def _vocabulary(model: nn.Module, modules: Sequence[str] | None) -> int:
    embedding: Any = resolve(model, modules=modules).embedding
    return int(embedding.num_embeddings)


def _grouping(
    source: str | Path | None, tokens: NDArray[np.int64], vocab: int, num_known: int
) -> tuple[Grouping, list[str]]:
    if source is None:
        counts = torch.from_numpy(np.bincount(tokens, minlength=vocab))
        notes = [f"HEAD, MID and TAIL are those of the {len(tokens):,} measured tokens themselves (no counts given)."]
    else:
        counts, notes = load_counts(source), [f"HEAD, MID and TAIL by `{source}`."]
        check_vocabulary(len(counts), vocab, num_known)
    return by_frequency(counts, head_share=SHARES[0], mid_share=SHARES[1], attribute_to="input"), notes


def _run(
    model: nn.Module,
    grouping: Grouping,
    options: ProbeOptions,
    tokens: NDArray[np.int64],
    length: int,
    batch_size: int,
    device: torch.device,
) -> Any:
    model.eval().to(device)
    ids_SL = torch.from_numpy(tokens[:-1]).view(-1, length)
    targets_SL = torch.from_numpy(tokens[1:]).view(-1, length)
    probe = SpectralProbe(model, grouping, options)
    try:
        with torch.no_grad():
            for ids_BT, targets_BT in zip(ids_SL.split(batch_size), targets_SL.split(batch_size), strict=True):
                probe.start(seed=0)
                model(ids_BT.to(device))
                probe.collect(targets_BT=targets_BT.to(device))
        return probe.end()
    finally:
        probe.remove()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"`device` is `{name}`, but this machine has no CUDA device: use `cpu`.")
    return torch.device(name)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:240] + " ..."
