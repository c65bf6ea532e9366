"""The associative memory as a LightningModule: one linear map, any optimizer, the same counts as the solver.

``training_step`` hands the optimizer the exact gradient of the softmax loss over all N outputs, from
:mod:`lightning_spectral.theory.gradient`: memory stays O((N + d) d), and with momentum off one step of an optimizer
stores what one step of the solver stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_spectral.functional.matrix_spectrum import MatrixSpectrum, matrix_spectrum
from lightning_spectral.text.arguments import require_kinds
from lightning_spectral.theory.embeddings import Embeddings
from lightning_spectral.theory.gradient import negative_gradient, negative_gradient_at_zero
from lightning_spectral.theory.problem import MemoryProblem, require_integer
from lightning_spectral.theory.recovery import recovered_mask, recovery_stats

OptimizerFactory = Callable[[nn.Module], Optimizer]
_SPECTRUM = ("effective_rank", "stable_rank", "normalized_entropy", "top10_energy")


def _default_optimizer(module: nn.Module) -> Optimizer:
    from lightning_spectral.optim import Muon

    return Muon(module, lr=1.0, weight_decay=0.0, lr_scale="none", roles={".*": "matrix"})


class AssociativeMemory(pl.LightningModule):
    """One ``nn.Linear`` without bias, started at 0, that is to send v_i to u_i.

    Logs ``memory/loss`` every step, and every ``eval_every_n_steps`` steps ``memory/count``, ``memory/prefix``,
    ``memory/head_recall``, ``memory/tail_recall``, ``memory/mass`` and the spectra of W and of the last update.

    Args:
        d: Features, >= 2.
        n_items: Items N, >= 2.
        alpha: Power of the item frequencies, > 1.
        seed: Of the embeddings (and of the batches of :class:`AssociativeMemoryDataModule`).
        anisotropy: As in :class:`lightning_spectral.theory.problem.MemoryProblem`.
        optimizer: Builds the optimizer from the module that holds the matrix; default: our Muon at learning rate 1.
        eval_every_n_steps: Test all items every n optimizer steps.
        chunk_size: Items whose N scores are held at once.

    Example:
        >>> memory = AssociativeMemory(32, 500, 1.5, optimizer=lambda m: torch.optim.SGD(m.parameters(), 10.0))
        >>> memory.recall().count
        0
    """

    def __init__(
        self,
        d: int = 64,
        n_items: int = 4096,
        alpha: float = 1.5,
        *,
        seed: int = 0,
        anisotropy: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        eval_every_n_steps: int = 1,
        chunk_size: int = 1024,
    ) -> None:
        require_kinds(AssociativeMemory.__init__, locals())
        super().__init__()
        require_integer("eval_every_n_steps", eval_every_n_steps, 1, "it is a number of optimizer steps")
        require_integer("chunk_size", chunk_size, 1, "it is a number of items")
        self.save_hyperparameters(ignore=["optimizer"])
        self.problem = MemoryProblem(d=d, n_items=n_items, alpha=alpha, seed=seed, anisotropy=anisotropy)
        self.memory = nn.Linear(d, d, bias=False)
        nn.init.zeros_(self.memory.weight)
        self.last_update: MatrixSpectrum | None = None
        self._optimizer_factory = optimizer or _default_optimizer
        self._eval_every_n_steps, self._chunk_size = eval_every_n_steps, chunk_size
        self._embeddings: Embeddings | None = None
        self._before: Tensor | None = None
        self._tested_at = -1

    @override
    def configure_optimizers(self) -> Optimizer:
        return self._optimizer_factory(self.memory)

    @property
    def embeddings(self) -> Embeddings:
        """The items, on this module's device; drawn from the seed at first use."""
        if self._embeddings is None or self._embeddings.device != self.device:
            self._embeddings = Embeddings(self.problem, self.device)
        return self._embeddings

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of the batch ``{"items": (R,), "weights": (R,)}``, with its exact gradient."""
        weights = np.zeros(self.problem.n_items)
        weights[batch["items"].cpu().numpy()] = batch["weights"].double().cpu().numpy()
        weight_DD = self.memory.weight
        if bool(weight_DD.detach().any()):
            negative_DD, loss = negative_gradient(self.embeddings, weight_DD.detach(), weights, self._chunk_size)
        else:
            negative_DD = negative_gradient_at_zero(self.embeddings, weights)
            loss = float(np.log(self.problem.n_items))
        self.log("memory/loss", loss, prog_bar=True)
        # a scalar whose value is the loss and whose gradient is the one just computed
        linear = (weight_DD * negative_DD.to(weight_DD.dtype)).sum()
        return loss + linear.detach() - linear

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._before = self.memory.weight.detach().clone()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        last = step == self.trainer.max_steps
        if self._before is None or step == self._tested_at or (step % self._eval_every_n_steps and not last):
            return
        self._tested_at = step
        self.last_update = matrix_spectrum(self.memory.weight.detach() - self._before)
        stats = self.recall()
        for name in ("count", "prefix", "head_recall", "tail_recall", "mass"):
            self.log(f"memory/{name}", float(getattr(stats, name)))
        for of, spectrum in (("weight", matrix_spectrum(self.memory.weight)), ("update", self.last_update)):
            for name in _SPECTRUM:
                value = getattr(spectrum, name)
                if value is not None:
                    self.log(f"memory_spectrum/{name}.{of}", value)

    def recall(self) -> Any:
        """:class:`lightning_spectral.theory.recovery.RecoveryStats` of W as it is, all items tested."""
        mask = recovered_mask(self.embeddings, self.memory.weight.detach())
        return recovery_stats(mask, self.problem.frequencies())


class AssociativeMemoryDataModule(pl.LightningDataModule):
    """Batches of items drawn with probability p_i, the same ones that the solver draws.

    Args:
        n_items: Items N, as in the module.
        alpha: Power of the frequencies, as in the module.
        batch_size: Draws per batch; ``None`` gives every item with weight p_i (population gradient).
        seed: Of the draws; the solver's batches for the same seed.
        num_batches: Batches in an epoch.
    """

    def __init__(
        self,
        n_items: int = 4096,
        alpha: float = 1.5,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        num_batches: int = 1000,
    ) -> None:
        require_kinds(AssociativeMemoryDataModule.__init__, locals())
        super().__init__()
        require_integer("num_batches", num_batches, 1, "an epoch has at least one batch")
        self.save_hyperparameters()
        # the draws do not depend on the features
        self.problem = MemoryProblem(d=2, n_items=n_items, alpha=alpha, batch_size=batch_size, seed=seed)
        self.num_batches = num_batches

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(_Draws(self.problem, self.num_batches), batch_size=None)


class _Draws(IterableDataset[dict[str, Tensor]]):
    def __init__(self, problem: MemoryProblem, num_batches: int) -> None:
        self._problem, self._num_batches = problem, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self._num_batches):
            weights = torch.from_numpy(self._problem.gradient_weights(step))
            items = torch.nonzero(weights)[:, 0]
            yield {"items": items, "weights": weights[items]}
