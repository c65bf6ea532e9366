"""A LightningModule around litgpt's GPT: next-token loss, one optimizer, litgpt's learning rate.

The model is built in ``configure_model``, so that every strategy gets it in the way it wants, and its initial weights
depend only on config, architecture and seed. Nothing here knows about probes: they hook the GPT inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from litgpt.config import Config
from litgpt.model import GPT, GptNeoxMLP, LLaMAMLP
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_spectral import optim
from lightning_spectral.gpt.architecture import Architecture, adapt_config, build_gpt
from lightning_spectral.gpt.clipping import clip_by_norm
from lightning_spectral.gpt.learning_rate import LRPlan
from lightning_spectral.lightning_private import accumulates
from lightning_spectral.models.checkpoint_file import read_checkpoint
from lightning_spectral.models.placement import is_dtensor
from lightning_spectral.text import did_you_mean, import_class

OptimizerSpec = str | Mapping[str, Any]


class LitGPT(pl.LightningModule):
    """litgpt's GPT for ``Trainer.fit``; a batch is a LongTensor (B, T + 1), as litgpt's data modules give it.

    Args:
        config: litgpt's model config, or its fields.
        optimizer: Name in ``torch.optim``, or ``{class_path, init_args}``, as in litgpt.
        architecture: Changes to the model that litgpt's config cannot say.
        lr_plan: Learning rate over the run; ``None`` keeps it constant.
        tie_embeddings: Use one matrix for token embedding and head.
        max_seq_length: Longest sequence, at most ``config.block_size``.
        initial_checkpoint: ``lit_model.pth`` to start from.
        seed: Initial weights.
        recipe: What to save as hyper-parameters, as plain values.

    Raises:
        ValueError: If config, architecture or optimizer cannot be used.
    """

    def __init__(
        self,
        config: Config | dict[str, Any],
        *,
        optimizer: OptimizerSpec = "AdamW",
        architecture: Architecture | None = None,
        lr_plan: LRPlan | None = None,
        tie_embeddings: bool = False,
        max_seq_length: int | None = None,
        initial_checkpoint: Path | None = None,
        seed: int = 42,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture or Architecture()
        self.config = adapt_config(Config(**config) if isinstance(config, dict) else config, self.architecture)
        if max_seq_length and max_seq_length > self.config.block_size:
            raise ValueError(
                f"`train.max_seq_length` is {max_seq_length}, but the model attends to {self.config.block_size} "
                "tokens: lower it or raise `model_config.block_size`."
            )
        optimizer_class(optimizer)  # a wrong name must fail before any work
        self.model: GPT | None = None
        self._optimizer = optimizer
        self._lr_plan = lr_plan
        self._tie_embeddings = tie_embeddings
        self._max_seq_length = max_seq_length
        self._initial_checkpoint = initial_checkpoint
        self._seed = seed
        self._losses: list[Tensor] = []
        self.save_hyperparameters(recipe or {})

    def configure_model(self) -> None:
        """Build the GPT, load what it starts from, and shard it where the strategy asks for that."""
        if self.model is not None:
            return
        model = build_gpt(self.config, self.architecture, seed=self._seed)
        if self._tie_embeddings:
            model.transformer.wte.weight = model.lm_head.weight
        if self._max_seq_length:
            model.max_seq_length = self._max_seq_length
        if self._initial_checkpoint is not None:
            load_weights(model, self._initial_checkpoint)
        if self.device_mesh is not None:
            shard(model, self.device_mesh, getattr(self.trainer.strategy, "num_replicas", 1))
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        assert self.model is not None, "configure_model builds the model; Trainer calls it"
        logits: Tensor = self.model(input_ids)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the next token."""
        loss = self._loss(batch)
        self._losses.append(loss.detach())
        if not accumulates(self.trainer):
            # the loss of the whole optimizer step, not of its last micro-batch
            self.log("loss", torch.stack(self._losses).mean(), prog_bar=True, sync_dist=self.trainer.world_size > 1)
            self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
            self._losses.clear()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the held-out loss, averaged over tokens."""
        loss = self._loss(batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=batch.shape[0], sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer, with the learning rate set before every step."""
        assert self.model is not None
        optimizer = build_optimizer(self._optimizer, self.model, fused=self.device.type == "cuda")
        if self._lr_plan is None:
            return optimizer
        plan, base_lr = self._lr_plan, float(optimizer.defaults["lr"])
        scheduler = LambdaLR(optimizer, lambda step: plan.factor(step, base_lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning does; under FSDP1 by the wrapped model, which alone knows the norm; DTensors by their meshes."""
        root = self.trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel) and gradient_clip_algorithm in (None, "norm"):
            if gradient_clip_val:
                root.clip_grad_norm_(gradient_clip_val)
            return
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and any(map(is_dtensor, self.parameters())):
            clip_by_norm(self.parameters(), gradient_clip_val)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _loss(self, batch: Tensor) -> Tensor:
        if not isinstance(batch, Tensor):
            raise ValueError(
                f"pretraining needs batches of token ids, shape (B, T + 1); the data module gives "
                f"{type(batch).__name__}. litgpt's instruction data sets (JSON, Alpaca ...) are for fine-tuning."
            )
        length = min(batch.shape[1] - 1, self._max_seq_length or self.config.block_size)
        logits = self(batch[:, :length].contiguous().long())
        targets = batch[:, 1 : length + 1].contiguous().long()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


_OURS = {*optim.__all__} - {"AdamW", "SpectralOptimizer"}  # what a bare name means; AdamW stays torch's, as in litgpt


def optimizer_class(spec: OptimizerSpec) -> type[Optimizer]:
    """The class that an optimizer entry of a recipe names.

    Raises:
        ValueError: If there is no such class, or it does not know one of the ``init_args``.
    """
    path, init_args = _optimizer_parts(spec)
    name = path.rpartition(".")[2]
    try:
        found = import_class(path, bare_names_in="torch.optim" if path not in _OURS else "lightning_spectral.optim")
    except ImportError as error:
        raise ValueError(
            f"no optimizer `{path}` ({error}): give a name in torch.optim, such as AdamW, or a class path, such as "
            "lightning_spectral.optim.Muon."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"`{path}` is not a torch optimizer.")
    known = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        unknown = sorted(set(init_args) - set(known))
        if unknown:
            hint = did_you_mean(unknown[0], [name for name in known if name != "params"], otherwise="it knows")
            raise ValueError(f"`optimizer.init_args` has `{unknown[0]}`, which {name} does not know; {hint}")
    return found


def build_optimizer(spec: OptimizerSpec, model: torch.nn.Module, *, fused: bool = False) -> Optimizer:
    """Instantiate a recipe's optimizer on a model.

    Our own optimizers get the parameters with their names, since they route by role; others get litgpt's bare list.

    Raises:
        ValueError: As :func:`optimizer_class`.
    """
    found = optimizer_class(spec)
    init_args = dict(_optimizer_parts(spec)[1])
    if fused and "fused" in inspect.signature(found).parameters:
        init_args.setdefault("fused", True)
    named = found.__module__.startswith("lightning_spectral.")
    return found(model.named_parameters() if named else model.parameters(), **init_args)


def _optimizer_parts(spec: OptimizerSpec) -> tuple[str, Mapping[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ValueError(f"`optimizer` must be a name or have a `class_path`, got {spec!r}.")
    return spec["class_path"], spec.get("init_args") or {}


def load_weights(model: GPT, checkpoint: Path) -> None:
    """Fill a GPT from litgpt's ``lit_model.pth`` (either form: bare weights, or under ``model``).

    Raises:
        ValueError: If the file is not such a checkpoint or does not fit the model.
    """
    content = read_checkpoint(checkpoint)
    try:
        model.load_state_dict(content.get("model", content))
    except (RuntimeError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"`{checkpoint}` does not fit the model: {' '.join(line.strip() for line in lines[:3])}"
        ) from error


def shard(model: GPT, mesh: Any, num_replicas: int = 1) -> None:
    """Feed-forward networks in slices over ``tensor_parallel``; FSDP2 over ``data_parallel``, a group per block.

    Args:
        model: The model, whole.
        mesh: With the two axes.
        num_replicas: Copies of the weights among the data-parallel ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    if mesh["tensor_parallel"].size() > 1:
        for block in model.transformer.h:
            for network in (part for part in block.mlp.modules() if isinstance(part, (GptNeoxMLP, LLaMAMLP))):
                names = [name for name, child in network.named_children() if isinstance(child, torch.nn.Linear)]
                sliced: dict[str, ParallelStyle] = {
                    name: RowwiseParallel() if name == "proj" else ColwiseParallel() for name in names
                }
                parallelize_module(network, mesh["tensor_parallel"], sliced)
    data_parallel = mesh["data_parallel"]
    if num_replicas > 1:
        sizes = (num_replicas, data_parallel.size() // num_replicas)
        data_parallel = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("replicate", "shard"))
    if data_parallel.size() > 1 or mesh["tensor_parallel"].size() == 1:  # one rank too: its checkpoints are of shards
        for block in model.transformer.h:
            fully_shard(block, mesh=data_parallel)
        fully_shard(model, mesh=data_parallel)
