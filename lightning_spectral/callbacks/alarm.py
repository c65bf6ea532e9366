"""An alarm when a rank leaves a share of the width, of the untrained network's rank, or of its own past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import median
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_spectral.callbacks.trainer_host import log_scalars
from lightning_spectral.functional.rank import RANK_METRICS
from lightning_spectral.lightning_private import state_key
from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.settings import Site, Stage
from lightning_spectral.records import (
    ALARMS_FILE,
    POOLED,
    AlarmRecord,
    SpectralRecord,
    append_records,
    known_keys,
    read_alarms,
)
from lightning_spectral.text import did_you_mean
from lightning_spectral.text.arguments import require_count, require_kinds


class SpectralAlarm(Callback):
    """Watches the median over layers of one rank, and says when it leaves what you allow.

    Needs a :class:`~lightning_spectral.TailTokenProbe` (or, for ``bucket="pooled"``, a
    :class:`~lightning_spectral.SpectralRankCallback`) in the same Trainer: it looks at their windows, measures nothing.
    An alarm is one warning, one line in ``alarms.jsonl`` (marked in TensorBoard's tab SPECTRAL), ``1`` in the scalar
    ``spectral_alarm/<metric>.<bucket>``, a call of ``on_alarm``, and the end of training if ``stop``. It is raised once
    for as long as the rank stays beyond the threshold.

    Args:
        metric: ``hard_rank``, ``soft_rank`` or another rank of the records.
        bucket: ``tail``, ``mid``, ``head``, ``pooled`` or a group of your own.
        below: Alarm when the rank is less than this share of the reference.
        above: Alarm when it is more than this share; give one of the two.
        relative_to: The reference: FFN ``width`` D, the rank of the ``untrained`` network (window of step 0), or the
            highest (for ``above``: lowest) rank in the ``past`` of this run.
        patience: Windows in a row that must be beyond the threshold.
        site: ``post`` or ``pre``.
        stage: Stage whose windows are looked at.
        on_alarm: Called with the :class:`~lightning_spectral.records.AlarmRecord`, on every rank.
        stop: End the training.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if nothing in the Trainer measures the bucket.

    Example::

        Trainer(callbacks=[TailTokenProbe(counts="stream"), SpectralAlarm(bucket="tail", below=0.5, patience=3)])
    """

    def __init__(
        self,
        metric: str = "hard_rank",
        *,
        bucket: str = "tail",
        below: float | None = None,
        above: float | None = None,
        relative_to: Literal["width", "untrained", "past"] = "untrained",
        patience: int = 1,
        site: Site = "post",
        stage: Stage = "train",
        on_alarm: Callable[[AlarmRecord], Any] | None = None,
        stop: bool = False,
    ) -> None:
        require_kinds(SpectralAlarm.__init__, locals())
        if (below is None) == (above is None):
            raise ValueError(f"give one of `below` and `above`, got below={below!r}, above={above!r}.")
        threshold = below if below is not None else above
        if threshold is None or not threshold > 0:
            raise ValueError(f"`{'below' if above is None else 'above'}` must be a share > 0, got {threshold!r}.")
        require_count("patience", patience)
        known = (*RANK_METRICS, "hard_rank_debiased", "soft_rank_debiased", "asymmetry")
        if metric not in known:
            raise ValueError(f"unknown `metric` {metric!r}: {did_you_mean(metric, known)}")
        self.metric, self.bucket, self.site, self.stage = metric, bucket, site, stage
        self.threshold, self.is_floor, self.relative_to = float(threshold), above is None, relative_to
        self.patience, self.on_alarm, self.stop = patience, on_alarm, stop
        self._reference: float | None = None
        self._beyond = self._unjudged = 0
        self._judged_step: int | None = None
        self._said: set[str] = set()

    @cached_property  # Lightning asks for it at every hook
    def state_key(self) -> str:  # type: ignore[override]
        """Several alarms of one Trainer are told apart by what they watch."""
        side = "below" if self.is_floor else "above"
        watched = {"metric": self.metric, "bucket": self.bucket, "site": self.site, "stage": self.stage}
        return state_key(self, **watched, **{side: self.threshold}, relative_to=self.relative_to)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"reference": self._reference, "beyond": self._beyond}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reference, self._beyond = state_dict["reference"], state_dict["beyond"]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        others = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
        needed = "SpectralRankCallback or TailTokenProbe" if self.bucket == POOLED else "TailTokenProbe"
        if not any(name in others for name in needed.split(" or ")):
            raise MisconfigurationException(
                f"SpectralAlarm watches the bucket `{self.bucket}`, which nothing in this Trainer measures: "
                f"add a {needed} to its callbacks (it has {', '.join(others)})."
            )

    def on_spectral_window(self, trainer: pl.Trainer, records: Sequence[SpectralRecord]) -> None:
        """Judge one window; called by the measuring callbacks on every rank with the same records."""
        mine = [r for r in records if (r.stage, r.site, r.bucket) == (self.stage, self.site, self.bucket)]
        step = records[0].step if records else None
        if not mine or step is None or step == self._judged_step:
            return
        self._judged_step = step  # two callbacks may both measure the bucket
        judged = [record for record in mine if record.status == "ok" and record.value(self.metric)]
        if not judged:
            self._could_not_judge(trainer, mine[0])
            return
        self._unjudged = 0
        value = median(float(record.value(self.metric) or 0.0) for record in judged)
        reference = self._reference_for(value, step, judged)
        if reference is None:
            why = "no window at step 0 was measured: there is no untrained network to compare with."
            self._say_once(trainer, "untrained", why)
            return
        limit = self.threshold * reference
        is_beyond = value < limit if self.is_floor else value > limit
        self._beyond = self._beyond + 1 if is_beyond else 0
        raised = self._beyond == self.patience
        tag = f"spectral_alarm/{self.metric}.{self.bucket}"
        log_scalars(trainer, {tag: float(self._beyond >= self.patience)}, step)
        if raised:
            self._raise(trainer, self._record(mine[0].run_id, step, value, reference))

    def _reference_for(self, value: float, step: int, judged: Sequence[SpectralRecord]) -> float | None:
        if self.relative_to == "width":
            return float(median(record.width for record in judged))
        if self.relative_to == "untrained":
            self._reference = value if step == 0 else self._reference
            return self._reference
        before = self._reference if self._reference is not None else value
        self._reference = max(before, value) if self.is_floor else min(before, value)
        return self._reference

    def _record(self, run_id: str, step: int, value: float, reference: float) -> AlarmRecord:
        names = {"width": "the width D", "untrained": "the untrained network's", "past": "its best so far"}
        side, lasting = "below" if self.is_floor else "above", f", for {self.patience} windows"
        text = (
            f"{self.metric} of bucket {self.bucket} is {value:.4g} at step {step}: {value / reference:.2f} of "
            f"{names[self.relative_to]} ({reference:.4g}), {side} the {self.threshold:g} allowed"
            f"{lasting if self.patience > 1 else ''}"
        )
        return AlarmRecord(
            run_id=run_id,
            stage=self.stage,
            step=step,
            metric=self.metric,
            site=self.site,
            bucket=self.bucket,
            value=value,
            reference=reference,
            relative_to=self.relative_to,
            threshold=self.threshold,
            message=text,
        )

    def _raise(self, trainer: pl.Trainer, alarm: AlarmRecord) -> None:
        trainer.should_stop = trainer.should_stop or self.stop
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            folder = getattr(callback, "run_folder", None)
            if isinstance(folder, RunFolder) and folder.writes:
                path = folder.path / ALARMS_FILE
                known = known_keys(read_alarms(path).records) if path.exists() else set()
                append_records(path, [alarm] if alarm.key not in known else [])
                break
        self._say(trainer, f"{alarm.message}{'; training stops' if self.stop else ''}.")
        if self.on_alarm is not None:
            self.on_alarm(alarm)

    def _could_not_judge(self, trainer: pl.Trainer, record: SpectralRecord) -> None:
        self._unjudged += 1
        if self._unjudged == max(self.patience, 2):
            self._say_once(
                trainer,
                "unjudged",
                f"{self._unjudged} windows in a row have no {self.metric} of bucket {self.bucket} to judge (status "
                f"`{record.status}`, N/D = {record.tokens_per_dim:.2g}): measure more tokens per window.",
            )

    def _say_once(self, trainer: pl.Trainer, cause: str, text: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            self._say(trainer, text)

    def _say(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            warn(f"SpectralAlarm: {text}")
