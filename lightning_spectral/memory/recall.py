"""Factual recall in a trained network: power-law facts, an MLP or one attention block, any optimizer, under a Trainer.

Fact i is asked by its key and answered by its value; keys and values are frozen Gaussian vectors, the network between
them is trained. Modules have the names of GPT-2 (``wte``, ``h.0.mlp.c_fc``, ``h.0.mlp.c_proj``, ``lm_head``), so that
every callback of this package measures it as it measures a language model: ``TailTokenProbe`` gives the ranks of its
hidden layer for frequent and rare facts.
"""

# B facts of a batch, T tokens of a question, N facts

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_spectral.text.arguments import require_kinds
from lightning_spectral.theory.problem import MemoryProblem, power_law, require_integer

OptimizerFactory = Callable[[nn.Module], Optimizer]
NETWORKS = ("mlp", "attention")
_CHUNK = 1024


class _Mlp(nn.Module):
    def __init__(self, d: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, d, bias=False)
        nn.init.normal_(self.c_fc.weight, std=d**-0.5, generator=generator)
        nn.init.zeros_(self.c_proj.weight)

    @override
    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTD)))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """One causal head over subject and relation; starts as their mean."""

    def __init__(self, d: int, generator: torch.Generator) -> None:
        super().__init__()
        self.c_attn = nn.Linear(d, 2 * d, bias=False)
        self.c_proj = nn.Linear(d, d, bias=False)
        nn.init.normal_(self.c_attn.weight, std=d**-0.5, generator=generator)
        nn.init.zeros_(self.c_proj.weight)

    @override
    def forward(self, x_BTD: Tensor) -> Tensor:
        query_BTD, key_BTD = self.c_attn(x_BTD).chunk(2, -1)
        mixed_BTD = F.scaled_dot_product_attention(query_BTD, key_BTD, x_BTD, is_causal=True)
        return mixed_BTD + self.c_proj(mixed_BTD)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, d: int, hidden: int, attends: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.attn = _Attention(d, generator) if attends else None
        self.mlp = _Mlp(d, hidden, generator)

    @override
    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mlp(x_BTD if self.attn is None else self.attn(x_BTD))  # type: ignore[no-any-return]


def _default_optimizer(module: nn.Module) -> Optimizer:
    from lightning_spectral.optim import Muon

    return Muon(module, lr=0.02, weight_decay=0.0)


class FactRecall(pl.LightningModule):
    """A network that is to answer ``num_facts`` questions whose frequencies fall as ``rank^-alpha``.

    Logs ``recall/loss`` every step; every ``eval_every_n_steps`` steps, all facts tested: ``recall/count`` (d_t),
    ``recall/mass`` (top-1 accuracy), ``recall/tail`` (of the last third of the mass) and, per octave of frequency rank,
    ``recall_octave/00`` (rank 1), ``01`` (2 and 3), ``02`` (4 to 7), ...

    Args:
        d: Features of keys and values.
        hidden: Features of the hidden layer; ``None`` is 4 d.
        num_facts: N.
        alpha: Power of the frequencies, > 0.
        network: ``mlp``: one token per question. ``attention``: a subject and one of ``num_relations`` relations.
        num_relations: Relations; every subject has all of them.
        seed: Of keys, values and the network's first weights.
        optimizer: Builds the optimizer from the module; default: our Muon at learning rate 0.02.
        num_steps: The learning rate falls linearly to zero over them; ``None`` leaves it constant.
        eval_every_n_steps: Test all facts every n optimizer steps.

    Raises:
        ValueError: If a number is out of its range or ``network`` is unknown.

    Example:
        >>> FactRecall(8, num_facts=32, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1)).recall().sum().item()
        0
    """

    def __init__(
        self,
        d: int = 64,
        *,
        hidden: int | None = None,
        num_facts: int = 4096,
        alpha: float = 1.2,
        network: str = "mlp",
        num_relations: int = 4,
        seed: int = 0,
        optimizer: OptimizerFactory | None = None,
        num_steps: int | None = None,
        eval_every_n_steps: int = 10,
    ) -> None:
        require_kinds(FactRecall.__init__, locals())
        super().__init__()
        require_integer("num_facts", num_facts, 2, "with a single fact every map recalls it")
        require_integer("hidden", hidden if hidden is not None else 4 * d, 2, "it is a number of features")
        require_integer("eval_every_n_steps", eval_every_n_steps, 1, "it is a number of optimizer steps")
        require_integer("num_relations", num_relations, 1, "a subject has at least one relation")
        if network not in NETWORKS:
            raise ValueError(f"`network` must be one of {', '.join(NETWORKS)}, got {network!r}.")
        MemoryProblem(d=d, n_items=num_facts, alpha=alpha, allow_flat=True)  # checks them
        self.save_hyperparameters(ignore=["optimizer"])
        self.relations = num_relations if network == "attention" else 0
        self.frequencies = power_law(num_facts, alpha)
        generator = torch.Generator().manual_seed(seed)
        subjects = math.ceil(num_facts / num_relations) if self.relations else num_facts
        self.subjects = subjects
        self.wte = nn.Embedding(max(subjects + self.relations, num_facts), d)
        self.wte.weight = nn.Parameter(torch.randn(self.wte.weight.shape, generator=generator), requires_grad=False)
        self.lm_head = nn.Linear(d, num_facts, bias=False)
        self.lm_head.weight = nn.Parameter(torch.randn(num_facts, d, generator=generator) / math.sqrt(d), False)
        self.h = nn.ModuleList([_Block(d, hidden or 4 * d, network == "attention", generator)])
        self._optimizer_factory = optimizer or _default_optimizer
        self._num_steps, self._every = num_steps, eval_every_n_steps
        self._tested_at = -1

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer_factory(self.h)
        if self._num_steps is None:
            return optimizer
        total = self._num_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / total, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def question(self, fact_B: Tensor) -> Tensor:
        """Tokens that ask for each fact, shape (B, T): the fact's own, or its subject and its relation."""
        if not self.relations:
            return fact_B[:, None]
        return torch.stack([fact_B // self.relations, self.subjects + fact_B % self.relations], 1)

    @override
    def forward(self, token_BT: Tensor) -> Tensor:
        """Logits over all facts after the last token of each question, shape (B, N)."""
        x_BTD = self.wte(token_BT)
        for block in self.h:
            x_BTD = block(x_BTD)
        return self.lm_head(x_BTD[:, -1])  # type: ignore[no-any-return]

    def token_losses(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each question and the fact it asks for, each shape (B,): what ``UpdateAudience`` asks for."""
        log_p_BN = torch.log_softmax(self.forward(self.question(batch)), -1)
        return -log_p_BN.gather(1, batch[:, None])[:, 0], batch

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch of facts, shape (B,)."""
        loss = F.cross_entropy(self(self.question(batch)), batch)
        self.log("recall/loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step == self._tested_at or (step % self._every and step != self.trainer.max_steps):
            return
        self._tested_at = step
        self.log_dict(self.measures())

    def measures(self) -> dict[str, float]:
        """What is logged about all facts."""
        mask = self.recall().cpu().numpy()
        tail = np.cumsum(self.frequencies) - self.frequencies >= 2 / 3
        made = {
            "recall/count": float(mask.sum()),
            "recall/mass": float(self.frequencies[mask].sum()),
            "recall/tail": float(self.frequencies[mask & tail].sum() / self.frequencies[tail].sum()),
        }
        octave_N = np.floor(np.log2(np.arange(1, len(mask) + 1))).astype(int)
        for octave in range(octave_N[-1] + 1):
            made[f"recall_octave/{octave:02d}"] = float(mask[octave_N == octave].mean())
        return made

    @torch.no_grad()
    def recall(self) -> Tensor:
        """Whether each fact's own value scores strictly highest, shape (N,)."""
        won = []
        for fact_B in torch.arange(len(self.frequencies), device=self.device).split(_CHUNK):
            score_BN = self._quietly(self.question(fact_B))
            own_B = score_BN.gather(1, fact_B[:, None])[:, 0].clone()
            score_BN.scatter_(1, fact_B[:, None], -torch.inf)
            won.append(own_B > score_BN.amax(1))
        return torch.cat(won)

    def _quietly(self, token_BT: Tensor) -> Tensor:
        """As :meth:`forward`, outside of ``__call__``: the hooks of callbacks see training batches only."""
        return self.forward(token_BT)


class FactRecallDataModule(pl.LightningDataModule):
    """Batches of facts drawn with their frequencies.

    Args:
        num_facts: N, as in the module.
        alpha: As in the module.
        batch_size: Draws a batch.
        num_batches: Batches of an epoch.
        seed: Of the draws.
        num_relations: As in the module for ``network="attention"``, else 0: what ``token_counts`` counts.
    """

    def __init__(
        self,
        num_facts: int = 4096,
        alpha: float = 1.2,
        *,
        batch_size: int = 2048,
        num_batches: int = 40,
        seed: int = 0,
        num_relations: int = 0,
    ) -> None:
        require_kinds(FactRecallDataModule.__init__, locals())
        super().__init__()
        require_integer("num_facts", num_facts, 2, "with a single fact every map recalls it")
        require_integer("num_batches", num_batches, 1, "an epoch has at least one batch")
        self.save_hyperparameters()
        self.problem = MemoryProblem(
            d=2, n_items=num_facts, alpha=alpha, batch_size=batch_size, seed=seed, allow_flat=True
        )
        self.num_batches, self.num_relations = num_batches, num_relations

    @property
    def token_counts(self) -> Tensor:
        """Occurrences of each input token in 10^9 questions, for callbacks that sort tokens by frequency."""
        counts = self.problem.frequencies() * 1e9
        if not self.num_relations:
            return torch.from_numpy(np.ceil(counts)).long()
        facts = np.arange(len(counts))
        subjects = math.ceil(len(counts) / self.num_relations)
        made = np.zeros(max(subjects + self.num_relations, len(counts)))
        np.add.at(made, facts // self.num_relations, counts)
        np.add.at(made, subjects + facts % self.num_relations, counts)
        return torch.from_numpy(np.ceil(made)).long()

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(_Draws(self.problem, self.num_batches), batch_size=None)


class _Draws(Dataset[Tensor]):
    """One batch per step, each a function of its number alone: ranks and resumed runs draw what they should."""

    def __init__(self, problem: MemoryProblem, num_batches: int) -> None:
        self._problem, self._num_batches = problem, num_batches

    def __len__(self) -> int:
        return self._num_batches

    @override
    def __getitem__(self, step: int) -> Tensor:
        if not 0 <= step < self._num_batches:
            raise IndexError(step)
        rng = np.random.default_rng([self._problem.seed, step])
        size, frequencies = self._problem.batch_size, self._problem.frequencies()
        return torch.from_numpy(rng.choice(len(frequencies), size, p=frequencies))
