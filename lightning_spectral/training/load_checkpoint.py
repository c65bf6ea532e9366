"""A finished model from disk, whichever of three kinds its checkpoint is: litgpt, Lightning or Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from torch import Tensor, nn

from lightning_spectral.data.files import refuse_placeholder
from lightning_spectral.gpt.architecture import Architecture, adapt_config, build_gpt
from lightning_spectral.gpt.export import load_final
from lightning_spectral.models.checkpoint_file import read_checkpoint
from lightning_spectral.models.meta import without_memory
from lightning_spectral.models.stacks import find_stacks
from lightning_spectral.models.streamed import SafetensorsFiles, files_of, stream
from lightning_spectral.probe.memory_plan import available_bytes
from lightning_spectral.text import one_line
from lightning_spectral.training.checkpoint_names import progress_of
from lightning_spectral.training.checkpoints import step_of
from lightning_spectral.training.document import named_config

_NUMBERS = {"F64", "F32", "F16", "BF16"}
DEFAULT_MAX_LENGTH = 512  # of a Hugging Face model that does not say


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, ready to run.

    Attributes:
        model: In fp32; token ids in.
        kind: ``litgpt``, ``lightning`` or ``huggingface``.
        max_length: Longest sequence that it takes.
        step: Optimizer steps behind it; ``None`` if neither the checkpoint nor its name says.
        tokens: Training tokens behind it; ``None`` likewise.
        weights: Where they are read from, of a model that does not hold them.
        optimizer: Class name, or ``unknown``.
        tokenizer_dir: Folder of its tokenizer, or ``None``.
    """

    model: nn.Module
    kind: str
    max_length: int
    step: int | None = None
    optimizer: str = "unknown"
    tokenizer_dir: Path | None = None
    tokens: int | None = None
    weights: SafetensorsFiles | None = None

    def on(self, device: torch.device) -> nn.Module:
        """The model on a device, in eval mode; without weights of its own it reads each block's when that runs."""
        if self.weights is None:
            return self.model.eval().to(device)
        stream(self.model.eval(), _blocks(self.model), self.weights, torch.float32, device)
        return self.model


def load_checkpoint(path: Path, *, stream_weights: bool | None = None) -> LoadedModel:
    """The model of a checkpoint of any of the three kinds.

    Args:
        path: File or folder.
        stream_weights: Read the weights of a Hugging Face model block by block in every forward pass, so that one
            block is in memory; default: where all of them would take more than half of what is free.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is none of the kinds, incomplete, or does not fit its own configuration.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at `{path}`.")
    if path.name == "lit_model.pth":
        path = path.parent
    for is_kind, load in _KINDS:
        if is_kind(path):
            loaded, named = load(path, stream_weights), progress_of(path)
            step = named.step if loaded.step is None else loaded.step
            return replace(loaded, step=step, tokens=named.tokens if loaded.tokens is None else loaded.tokens)
    raise ValueError(
        f"`{path}` is no checkpoint that can be read: expected a litgpt folder (`lit_model.pth`, `model_config.yaml`), "
        "a Lightning `.ckpt` file of `lightning-spectral pretrain`, or a Hugging Face folder (`config.json`, "
        "`*.safetensors`)."
    )


def _load_litgpt(folder: Path, stream_weights: bool | None) -> LoadedModel:
    _refuse_streaming(folder, stream_weights)
    if not (folder / "model_config.yaml").is_file():
        raise FileNotFoundError(f"`{folder}` has `lit_model.pth` but no `model_config.yaml`: copy it from the run.")
    try:
        model = load_final(folder)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # any of litgpt's and torch's: the folder may be anybody's
        raise ValueError(f"`{folder / 'model_config.yaml'}` is not litgpt's: {one_line(error)}.") from error
    return LoadedModel(model, "litgpt", model.config.block_size, tokenizer_dir=with_tokenizer(folder))


def _load_lightning(file: Path, stream_weights: bool | None) -> LoadedModel:
    _refuse_streaming(file, stream_weights)
    content = read_checkpoint(file)
    try:
        weights: dict[str, Tensor] = content["state_dict"]
        recipe: dict[str, Any] = content["hyper_parameters"]
        given = dict(recipe["model_config"] or named_config(recipe["model_name"]))
        architecture = Architecture(**recipe["architecture"])
        names = {name.removeprefix("model."): value for name, value in weights.items()}
        given["padded_vocab_size"] = names["lm_head.weight"].shape[0]
        given.setdefault("vocab_size", given["padded_vocab_size"])
        optimizer, train = recipe["optimizer"], recipe["train"]
        optimizer = str(optimizer["class_path"] if isinstance(optimizer, dict) else optimizer).rpartition(".")[2]
        batch, sequence = int(train["global_batch_size"]), train["max_seq_length"]
        step = content.get("global_step", step_of(file))
        step = None if step is None else int(step)
        folders = [recipe.get("tokenizer_dir"), file.parent, file.parent.parent / "final"]
        tokenizer = next((Path(one) for one in folders if one and with_tokenizer(Path(one))), None)
    except KeyError as error:
        raise ValueError(
            f"`{file}` is not a checkpoint of `lightning-spectral pretrain`: it has no {error}. Measure a model of "
            "your own LightningModule with `trainer.validate` and `SpectralRankCallback(on=['validation'])`."
        ) from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(
            f"`{file}` is not a checkpoint of `lightning-spectral pretrain`: {one_line(error)}."
        ) from error
    try:
        model = build_gpt(adapt_config(Config(**given), architecture), architecture, seed=0)
        model.load_state_dict(names)
    except Exception as error:  # any of litgpt's and torch's: the file may be anybody's
        raise ValueError(f"`{file}` does not fit its own recipe: {one_line(error)}.") from error
    tokens = None if step is None else step * batch * (sequence or model.config.block_size)
    return LoadedModel(model, "lightning", model.config.block_size, step, optimizer, tokenizer, tokens)


def _load_hugging_face(folder: Path, stream_weights: bool | None) -> LoadedModel:
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise ValueError(f"`{folder}` is a Hugging Face folder: `pip install transformers` to read it.") from error
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"`{folder}` holds no `*.safetensors`: save it with `model.save_pretrained(folder)`.")
    files = _files(folder)
    if stream_weights or (stream_weights is None and _is_large(folder)):
        streamed = _streamed_hugging_face(folder, files)
        if streamed is not None:
            return streamed
        if stream_weights:
            raise ValueError(
                f"`{folder}` cannot be read block by block: its files do not hold every weight of a block under its "
                "own name and shape. Leave `stream_weights` out."
            )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, trust_remote_code=False,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # any of transformers' and torch's: the folder may be anybody's
        raise _unreadable(folder, error) from error
    _refuse_misfits(folder, report)
    _refuse_codes(folder, model, files)
    model.config.use_cache = False
    max_length = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    return LoadedModel(model.float(), "huggingface", int(max_length), tokenizer_dir=with_tokenizer(folder))


def _files(folder: Path) -> SafetensorsFiles:
    from safetensors import SafetensorError

    try:
        for file in files_of(folder):
            refuse_placeholder(file)
        return SafetensorsFiles(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"`{folder}` cannot be read ({one_line(error).rstrip('.')}): is every file whole?")


def _refuse_misfits(folder: Path, report: dict[str, Any]) -> None:
    """Weights that the model has and the files have not, or in another shape."""
    other = [(str(name), tuple(there), tuple(here)) for name, there, here in report.get("mismatched_keys") or []]
    if other:
        name, there, here = min(other)
        raise ValueError(
            f"`{folder}` does not fit its `config.json`: `{name}` is {there} in its files and {here} by the config "
            f"({len(other)} weight(s) differ)."
        )
    lost = sorted(map(str, report["missing_keys"]))
    if lost:
        raise ValueError(f"`{folder}` lacks {len(lost)} weights of its model, the first is `{lost[0]}`: is it whole?")


def _refuse_codes(folder: Path, model: nn.Module, files: SafetensorsFiles) -> None:
    """Weights stored as integers or in eight bits are codes, which mean numbers only together with scales."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return  # transformers has made numbers of them
    for name, _ in model.named_parameters():
        if name in files.names and files.kind(name) not in _NUMBERS:
            raise ValueError(
                f"`{name}` of `{folder}` is stored as {files.kind(name)}, and `config.json` says no "
                "`quantization_config`: such codes are no weights without their scales. Measure the model they were "
                "made from."
            )


def _is_large(folder: Path) -> bool:
    """Whether the weights, in fp32, take more than half of the memory that is free."""
    in_fp32 = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return in_fp32 > available_bytes() / 2


def _streamed_hugging_face(folder: Path, files: SafetensorsFiles) -> LoadedModel | None:
    """A model that reads its blocks when they run; ``None`` if the files are laid out in another way."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with without_memory():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # any of transformers' and torch's: the folder may be anybody's
        raise _unreadable(folder, error) from error
    if getattr(config, "quantization_config", None) is not None:
        return None  # its files hold codes
    _refuse_codes(folder, model, files)
    model.tie_weights()
    model.config.use_cache = False
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if not _blocks(model) or not all(name in files.names and files.shape(name) == shapes[name] for name in shapes):
        return None
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in files.names and name in model.state_dict():
                buffer.copy_(files(name))
    max_length = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    return LoadedModel(model, "huggingface", int(max_length), tokenizer_dir=with_tokenizer(folder), weights=files)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of every stack."""
    return [block for stack in find_stacks(model).stacks for _, block in stack.blocks]


def _refuse_streaming(path: Path, stream_weights: bool | None) -> None:
    if stream_weights:
        raise ValueError(f"`stream_weights` is for Hugging Face folders with safetensors, and `{path}` is none.")


_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path, bool | None], LoadedModel]], ...] = (
    (lambda path: (path / "lit_model.pth").is_file(), _load_litgpt),
    (lambda path: path.is_file() and path.suffix == ".ckpt", _load_lightning),
    (lambda path: (path / "config.json").is_file(), _load_hugging_face),
)


def with_tokenizer(folder: Path) -> Path | None:
    """The folder, if it holds a tokenizer."""
    return folder if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) else None
