"""``UpdateAudience``: whom an update serves, frequent or rare tokens, and whom another rule would have served."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks.trainer_host import folder_of, log_scalars
from lightning_spectral.functional.buckets import frequency_buckets
from lightning_spectral.models.names import clean_names
from lightning_spectral.probe import audience
from lightning_spectral.probe.audience import RULES, AudienceRecord
from lightning_spectral.probe.grouping import load_counts
from lightning_spectral.probe.run_folder import new_run_id
from lightning_spectral.probe.schedule import Schedule

AUDIENCE_FILE = "audience.jsonl"
_HEAD = re.compile(r"(^|\.)(lm_head|head|embed_out|unembed|output_layer)\.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")
TokenLosses = Callable[[pl.LightningModule, Any], tuple[Tensor, Tensor]]


def token_losses(pl_module: pl.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Loss and target of each token of a batch, shape (N,) each: the module's own ``token_losses``, or next tokens.

    Raises:
        MisconfigurationException: The batch is no tensor of token ids (B, T) and the module does not say what to do.
    """
    own = getattr(pl_module, "token_losses", None)
    if own is not None:
        return own(batch)  # type: ignore[no-any-return]
    ids_BT = batch.get("input_ids") if isinstance(batch, dict) else batch
    knows_ids = type(pl_module).forward is not pl.LightningModule.forward
    if not knows_ids or not isinstance(ids_BT, Tensor) or ids_BT.ndim != 2 or ids_BT.is_floating_point():
        raise MisconfigurationException(
            f"UpdateAudience knows batches of token ids (B, T) and a `forward` from ids to logits; here are a "
            f"{type(batch).__name__} and `{type(pl_module).__name__}`: give the module a method `token_losses(batch)` "
            "that returns (losses, targets), or the callback the argument `losses_fn`."
        )
    made = pl_module(ids_BT[:, :-1].long())
    logits_BTV = getattr(made, "logits", made)
    target_N = ids_BT[:, 1:].flatten().long()
    log_p_NV = torch.log_softmax(logits_BTV.flatten(0, 1).float(), -1)
    return -log_p_NV.gather(1, target_N[:, None])[:, 0], target_N


class UpdateAudience(Callback):
    """Measure which tokens gain from each update while a model trains; never changes the training.

    Every ``every_n_steps`` steps, before the optimizer step, the gradients of the mean loss of each group of tokens (by
    the token to be predicted) are taken on the batch of the step before, which the present gradient has not seen: one
    forward and one backward pass a group. After the step they are multiplied with the update that was applied and with
    what other rules make of the same momentum. Writes ``audience.jsonl`` into the run folder and scalars
    ``audience.applied.tail/mlp.proj`` to every logger.

    One device or DDP; sharded parameters (FSDP) are refused.

    Args:
        every_n_steps: Measure the first step and every n-th.
        counts: Occurrences of each token id: a file or an array; default: the datamodule's ``token_counts``.
        group_by: ``frequency`` (head, mid, tail) or ``octave`` of the frequency rank.
        rules: Any of ``applied``, ``momentum``, ``sign``, ``adam`` (where the optimizer keeps second moments),
            ``newton_schulz``, ``polar``.
        coefficients: Newton-Schulz set.
        ns_steps: Its steps.
        losses_fn: ``(module, batch) -> (loss of each token, its target id)``; see :func:`token_losses`.
        dirpath: The folder; default: the logger's or the trainer's.
        run_id: Name of the run.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: Before step 1, without counts, without a matrix, or with sharded parameters.

    Example:
        ``Trainer(callbacks=[UpdateAudience(every_n_steps=50, counts="counts.npy")])``
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        counts: Any = None,
        group_by: Literal["frequency", "octave"] = "frequency",
        rules: Sequence[str] = RULES,
        coefficients: str = "polar_express",
        ns_steps: int = 5,
        losses_fn: TokenLosses | None = None,
        dirpath: str | None = None,
        run_id: str | None = None,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be an integer >= 1, got {every_n_steps!r}.")
        if group_by not in ("frequency", "octave"):
            raise ValueError(f"`group_by` must be `frequency` or `octave`, got {group_by!r}.")
        self.rules = audience.check_rules(rules, coefficients, ns_steps)
        self.schedule = Schedule(every_n_steps)
        self.counts, self.group_by = counts, group_by
        self.coefficients, self.ns_steps = coefficients, ns_steps
        self.losses_fn = losses_fn or token_losses
        self.dirpath, self.run_id = dirpath, run_id
        self._groups: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0))
        self._matrices: dict[str, Tensor] = {}
        self._earlier: Any = None  # the batch of the step before
        self._current: Any = None
        self._armed: int | None = None
        self._measured: tuple[list[list[Tensor] | None], Tensor, Tensor, bool] | None = None
        self._before: dict[str, Tensor] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        source = self.counts if self.counts is not None else getattr(datamodule, "token_counts", None)
        if source is None:
            raise MisconfigurationException(
                "UpdateAudience needs token counts: pass `counts=` (a file or an array; `lightning-spectral "
                "count-tokens` writes one), or give the datamodule `token_counts`."
            )
        try:
            counts_V = load_counts(source).cpu()
            table_V = frequency_buckets(counts_V)
        except ValueError as error:
            raise MisconfigurationException(f"UpdateAudience: {error}") from error
        self._groups = (
            (("head", "mid", "tail"), table_V) if self.group_by == "frequency" else audience.octaves(counts_V)
        )
        self._matrices = dict(_matrices(pl_module))
        if not self._matrices:
            raise MisconfigurationException(
                f"UpdateAudience found no trainable matrix in `{type(pl_module).__name__}` beside embedding and head."
            )
        if any(hasattr(matrix, "full_tensor") for matrix in self._matrices.values()):
            raise MisconfigurationException("UpdateAudience does not support sharded parameters (FSDP); use DDP.")
        if self.run_id is None:
            self.run_id = new_run_id()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._current = batch
        if self._armed is None and self.schedule.is_due(trainer.global_step):
            self._armed = trainer.global_step

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._armed is None or self._measured is not None:
            return
        held_out = self._earlier is not None
        batch = self._earlier if held_out else self._current
        names, table_V = self._groups
        with _undisturbed(pl_module), trainer.precision_plugin.forward_context(), torch.enable_grad():
            loss_N, target_N = self.losses_fn(pl_module, batch)
            code_N = table_V.to(target_N.device)[target_N.clamp(min=0)]
            code_N = torch.where(target_N < 0, -1, code_N)  # padding
            found = audience.group_gradients(loss_N, code_N, len(names), list(self._matrices.values()))
        self._measured = (*found, held_out)
        self._before = {name: matrix.detach().clone() for name, matrix in self._matrices.items()}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._armed is not None and self._measured is not None and trainer.global_step > self._armed:
            step, measured = self._armed, self._measured
            self._armed, self._measured = None, None
            self.schedule.previous = step
            self._publish(trainer, self._records(trainer, step, *measured))
            self._before = {}
        if self._armed is None:  # else the step of this micro-batch is not over
            self._earlier = batch

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._matrices, self._before, self._measured, self._armed = {}, {}, None, None
        self._earlier, self._current = None, None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"previous": self.schedule.previous}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.previous = state_dict["previous"]

    def _records(
        self, trainer: pl.Trainer, step: int, gradients: list[list[Tensor] | None], tokens: Tensor, losses: Tensor,
        held_out: bool,
    ) -> list[AudienceRecord]:  # fmt: skip
        names, (buckets, _) = list(self._matrices), self._groups
        states = _states(trainer.optimizers)
        whole = _sum_over_ranks(torch.stack([tokens, losses]), self._matrices[names[0]].device)
        records: list[AudienceRecord] = []
        for rule in self.rules:
            directions = [self._direction(rule, name, states) for name in names]
            made = audience.summed(gradients, names, directions)
            for kind, gains in made.items():
                weighted = _sum_over_ranks(torch.tensor(gains, dtype=torch.float64) * tokens, whole.device)
                matrices = sum(audience.kind_of(name) == kind for name in names)
                for group, bucket in enumerate(buckets):
                    number = int(whole[0, group])
                    mean = float(weighted[group] / number) if number else None
                    loss = float(whole[1, group] / number) if number else None
                    records.append(
                        AudienceRecord(
                            str(self.run_id), step, kind, rule, bucket, mean, loss, number, matrices, held_out
                        )
                    )
        return records

    def _direction(self, rule: str, name: str, states: dict[int, dict[str, Any]]) -> Tensor | None:
        matrix = self._matrices[name]
        if rule == "applied":
            return self._before[name] - matrix.detach()
        state = states.get(id(matrix), {})
        momentum = next((state[key] for key in _MOMENTUM_KEYS if isinstance(state.get(key), Tensor)), matrix.grad)
        if momentum is None or momentum.shape != matrix.shape or not bool(torch.isfinite(momentum).all()):
            return None
        second = state.get("exp_avg_sq")
        return audience.counterfactual(rule, momentum.detach(), second, self.coefficients, self.ns_steps)

    def _publish(self, trainer: pl.Trainer, records: Sequence[AudienceRecord]) -> None:
        scalars = {f"audience.{r.rule}.{r.bucket}/{r.kind}": r.gain for r in records if r.gain is not None}
        scalars |= {f"audience.loss/{r.bucket}": r.loss for r in records if r.loss is not None}
        log_scalars(trainer, scalars, records[0].step if records else None)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(self.dirpath or folder_of(trainer))
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / AUDIENCE_FILE).open("a") as file:
                file.write("".join(json.dumps(record.as_dict()) + "\n" for record in records))


def read_audience(path: str | Path) -> list[AudienceRecord]:
    """Records of an ``audience.jsonl``, or of the folder that holds it; an incomplete last line is left out."""
    path = Path(path)
    path = path / AUDIENCE_FILE if path.is_dir() else path
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(AudienceRecord(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trainable matrices but embeddings (tied heads among them) and what is called a head."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = clean_names(name for name, _ in model.named_parameters())
    for raw, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and id(parameter) not in embeddings and not _HEAD.search(names[raw])
        if hidden and parameter.requires_grad and parameter.numel():
            yield names[raw], parameter


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """An extra forward that leaves no trace: evaluation mode, no hooks (other callbacks count calls), no randomness."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = [{name: getattr(module, name) for name in _HOOKS} for module in modules]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                module.training = False
                for name in _HOOKS:
                    setattr(module, name, OrderedDict())
            yield
        finally:
            for module, mode, kept in zip(modules, training, hooks, strict=True):
                module.training = mode
                for name, value in kept.items():
                    setattr(module, name, value)


def _states(optimizers: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """State of every parameter by its id."""
    return {
        id(parameter): state
        for optimizer in optimizers
        for parameter, state in getattr(optimizer, "_optimizer", optimizer).state.items()
    }


def _sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum over all processes, on the CPU in fp64; every rank comes here the same number of times."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    sent = values.to(device, torch.float64)
    torch.distributed.all_reduce(sent)
    return sent.cpu()
