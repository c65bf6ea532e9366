"""``UpdateAudience``: whom an update serves, frequent or rare tokens, and whom another rule would have served."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks.audience_matrices import (
    gains_of,
    matrices_of,
    records_of,
    refuse_what_hides_matrices,
    states_of,
)
from lightning_spectral.callbacks.fit_start import BeginsFit
from lightning_spectral.callbacks.trainer_host import folder_of, log_scalars
from lightning_spectral.functional.buckets import frequency_buckets
from lightning_spectral.models.placement import is_dtensor
from lightning_spectral.probe import audience
from lightning_spectral.probe.agreement import Agreement, MissingRankError, wait_limit
from lightning_spectral.probe.audience import RULES, AudienceRecord
from lightning_spectral.probe.audience_passes import (
    GroupGradients,
    group_gradients,
    sharded_group_gradients,
    undisturbed,
)
from lightning_spectral.probe.grouping import load_counts
from lightning_spectral.probe.guard import DeliberateError, Guard
from lightning_spectral.probe.run_folder import new_run_id
from lightning_spectral.probe.schedule import Schedule
from lightning_spectral.probe.settings import STREAM
from lightning_spectral.records import append_lines
from lightning_spectral.text import parse_json
from lightning_spectral.text.arguments import refuses_unknown, require_count, require_kinds, require_run_id

AUDIENCE_FILE = "audience.jsonl"
_WAITING_AT_MOST = 50_000  # records kept in memory while they cannot be written
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


class UpdateAudience(BeginsFit):
    """Measure which tokens gain from each update while a model trains; never changes the training.

    Every ``every_n_steps`` steps, before the optimizer step, the gradients of the mean loss of each group of tokens (by
    the token to be predicted) are taken on the batch of the step before, which the present gradient has not seen: one
    forward and one backward pass a group. After the step they are multiplied with the update that was applied and with
    what other rules make of the same momentum. Writes ``audience.jsonl`` into the run folder and scalars
    ``audience.applied.tail/mlp.proj`` to every logger.

    What goes wrong in it loses a window, with one warning, and a rank without it makes the others stand down: training
    goes on. One device, DDP or FSDP2, where each group takes a forward pass of its own as well and matrices are
    gathered one at a time. FSDP1, which flattens its matrices, and tensor parallelism are refused.

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
        MisconfigurationException: Before step 1, without counts, without a matrix, under FSDP1 or tensor parallelism.

    Example:
        ``Trainer(callbacks=[UpdateAudience(every_n_steps=50, counts="counts.npy")])``
    """

    @refuses_unknown
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
        require_kinds(UpdateAudience.__init__, locals())
        require_count("every_n_steps", every_n_steps)
        if group_by not in ("frequency", "octave"):
            raise ValueError(f"`group_by` must be `frequency` or `octave`, got {group_by!r}.")
        self.rules = audience.check_rules(rules, coefficients, ns_steps)
        self.schedule = Schedule(every_n_steps)
        if isinstance(counts, str) and counts == STREAM:
            raise ValueError(
                "`counts='stream'` is for TailTokenProbe: here pass an array or a file, as `lightning-spectral "
                "count-tokens` writes it."
            )
        self.counts = None if counts is None else load_counts(counts)  # a wrong path fails before any training
        self.group_by = group_by
        self.coefficients, self.ns_steps = coefficients, ns_steps
        self.losses_fn = losses_fn or token_losses
        require_run_id(run_id)
        self.dirpath, self.run_id = dirpath, run_id
        self._groups: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0))
        self._matrices: dict[str, Tensor] = {}
        self._earlier: Any = None  # the batch of the step before
        self._current: Any = None
        self._armed: int | None = None
        self._measured: tuple[GroupGradients, bool] | None = None
        self._tried = False  # to measure the armed step
        self._guard = Guard("UpdateAudience")
        self._agreement: Agreement | None = None
        self._num_asked, self._busy_s = 0, 0.0
        self._waiting: list[str] = []  # lines that could not be written yet
        self._parameters: list[Tensor] = []  # all, as the optimizer knows them
        self._before: dict[str, Tensor] = {}

    @override
    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self.schedule.previous = None  # nothing of an earlier run is carried on
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
        refuse_what_hides_matrices(trainer)
        self._matrices = dict(matrices_of(pl_module))
        if not self._matrices:
            raise MisconfigurationException(
                f"UpdateAudience found no trainable matrix in `{type(pl_module).__name__}` beside embedding and head."
            )
        self._parameters = list(pl_module.parameters())
        if self.run_id is None:
            self.run_id = new_run_id()
        self._guard, self._agreement = Guard("UpdateAudience"), Agreement("UpdateAudience")
        self._num_asked, self._busy_s = 0, 0.0
        mine = [self.schedule.every_n_steps, self.group_by, list(self.rules), list(self._groups[0])]
        answers = self._ask({"arguments": mine})
        if answers is not None and any(answer["arguments"] != mine for answer in answers):
            self._stand_down("ranks have it with other arguments: nothing is measured.")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._current = batch
        if self._matrices and self._armed is None and self.schedule.is_due(trainer.global_step):
            self._armed = trainer.global_step

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._armed is None or self._tried or self._ask({}) is None:
            return
        self._tried = True
        held_out = self._earlier is not None
        batch = self._earlier if held_out else self._current
        names, table_V = self._groups
        matrices = list(self._matrices.values())

        def forward() -> tuple[Tensor, Tensor]:
            with trainer.precision_plugin.forward_context():
                loss_N, target_N = self.losses_fn(pl_module, batch)
            code_N = table_V.to(target_N.device)[target_N.clamp(min=0)]
            return loss_N, torch.where(target_N < 0, -1, code_N)  # padding

        with self._alone("gradients of the groups"):
            with undisturbed(pl_module), torch.enable_grad():
                if any(map(is_dtensor, matrices)):
                    found = sharded_group_gradients(forward, len(names), matrices, self._parameters)
                else:
                    found = group_gradients(forward, len(names), matrices)
            self._before = {name: matrix.detach().clone() for name, matrix in self._matrices.items()}
            self._measured = (found, held_out)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._armed is not None and self._tried and trainer.global_step > self._armed:
            self.schedule.previous = self._armed
            self._close_window(trainer, self._armed)
            self._armed, self._measured, self._tried, self._before = None, None, False, {}
        if self._armed is None:  # else the step of this micro-batch is not over
            self._earlier = batch

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._waiting:
            self._write(Path(self.dirpath or folder_of(trainer)))
        if self._waiting:
            self._guard.say("lost", f"{len(self._waiting)} records are lost: they could not be written.")
            self._waiting = []
        self._matrices, self._parameters, self._before, self._measured, self._armed = {}, [], {}, None, None
        self._earlier, self._current, self._tried = None, None, False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"previous": self.schedule.previous}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.previous = state_dict["previous"]

    def _ask(self, said: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What every rank says, in bounded time; ``None`` where one did not come: nothing more is measured."""
        assert self._agreement is not None
        self._num_asked += 1
        try:
            return self._agreement.exchange(str(self._num_asked), said, limit_s=wait_limit(self._busy_s))
        except MissingRankError as error:
            self._stand_down(f"{error}: the others measure nothing. Add it on every rank.")
            return None

    def _stand_down(self, reason: str) -> None:
        self._guard.say("stood down", reason, on_every_rank=True)
        self._matrices, self._armed, self._tried = {}, None, False

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """An error of this rank's own computing loses the window; sharded matrices are gathered by all, or by none."""
        began = time.monotonic()
        if any(map(is_dtensor, self._matrices.values())):
            yield
            return
        with self._guard(what):
            try:
                yield
                self._busy_s = time.monotonic() - began
            except MisconfigurationException as error:  # what the user has to change, in the first window
                raise DeliberateError(str(error)) from error

    def _close_window(self, trainer: pl.Trainer, step: int) -> None:
        gains = None
        with self._alone("gains of the groups"):
            if self._measured is not None:
                how = (self.rules, self.coefficients, self.ns_steps)
                states = states_of(trainer.optimizers)
                gains = gains_of(self._matrices, self._before, self._measured[0], states, *how)
        answers = self._ask({"measured": gains is not None})
        if answers is None:
            return
        lost = [rank for rank, answer in enumerate(answers) if not answer["measured"]]
        if lost:
            if gains is not None:  # a rank that failed has said so
                ranks = ", ".join(map(str, lost))
                self._guard.say("lost window", f"step {step} is left out: rank(s) {ranks} failed. Training goes on.")
            return
        assert self._measured is not None
        assert gains is not None
        records = records_of(gains, self._matrices, *self._measured, str(self.run_id), step, self._groups[0])
        with self._guard("publishing", "not_logged"):
            self._publish(trainer, records)

    def _publish(self, trainer: pl.Trainer, records: Sequence[AudienceRecord]) -> None:
        scalars = {f"audience.{r.rule}.{r.bucket}/{r.kind}": r.gain for r in records if r.gain is not None}
        scalars |= {f"audience.loss/{r.bucket}": r.loss for r in records if r.loss is not None}
        log_scalars(trainer, scalars, records[0].step if records else None)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._waiting += [json.dumps(record.as_dict()) for record in records]
            self._write(Path(self.dirpath or folder_of(trainer)))

    def _write(self, folder: Path) -> None:
        """Append what waits; an observer ends no training."""
        dropped, self._waiting = self._waiting[:-_WAITING_AT_MOST], self._waiting[-_WAITING_AT_MOST:]
        if dropped:
            self._guard.say("dropped", "records are lost: they could not be written for too long.")
        with self._guard(f"writing to `{folder}`", "not_written"):
            append_lines(folder / AUDIENCE_FILE, self._waiting)
            self._waiting = []


def read_audience(path: str | Path) -> list[AudienceRecord]:
    """Records of an ``audience.jsonl``, or of the folder that holds it; an incomplete last line is left out."""
    path = Path(path)
    path = path / AUDIENCE_FILE if path.is_dir() else path
    records = []
    for line in path.read_bytes().splitlines():
        try:
            records.append(AudienceRecord(**parse_json(line)))
        except (ValueError, TypeError):
            continue
    return records
