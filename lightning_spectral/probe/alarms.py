"""When a rank has left what is allowed, said in any loop: rules that judge windows, and what an alarm then does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from lightning_spectral.functional.rank import RANK_METRICS
from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.settings import Site, Stage
from lightning_spectral.records import (
    ALARMS_FILE,
    AlarmRecord,
    SpectralRecord,
    append_records,
    known_keys,
    read_alarms,
)
from lightning_spectral.text import did_you_mean
from lightning_spectral.text.arguments import refuses_unknown, require_count, require_kinds

_OWN = "SpectralAlarm"
_NAMES = {"width": "the width D", "untrained": "the untrained network's", "past": "its best so far"}


@dataclass
class Voice:
    """Where an alarm is heard in one loop.

    Attributes:
        folder: The run's, if it is open.
        tell: Warns the user; silent on every rank but the first.
        log: Sends scalars to the loop's loggers; called on every rank.
        stopping: What follows an alarm with ``stop=True``.
    """

    folder: RunFolder | None = None
    tell: Callable[[str], None] = warn
    log: Callable[[Scalars, int | None], None] = lambda scalars, step: None
    stopping: str = "training stops"


class AlarmRule:
    """The rule of a :class:`~lightning_spectral.SpectralAlarm`, which documents the arguments; no loop is known here.

    Raises:
        ValueError: If an argument is out of range.
    """

    @refuses_unknown
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
        require_kinds(AlarmRule.__init__, locals())
        if (below is None) == (above is None):
            raise ValueError(f"give one of `below` and `above`, got below={below!r}, above={above!r}.")
        threshold = below if below is not None else above
        if threshold is None or not threshold > 0:
            raise ValueError(f"`{'below' if above is None else 'above'}` must be a share > 0, got {threshold!r}.")
        require_count("patience", patience)
        if below is not None and below > 1 and relative_to != "untrained":
            raise ValueError(
                f"`below={below!r}` of the {relative_to} holds always: it is a share (0.5 is half), not a percentage."
            )
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

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        return {"reference": self._reference, "beyond": self._beyond}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._reference, self._beyond = state_dict["reference"], state_dict["beyond"]

    def require_measured(self, measurements: Iterable[Measurement], remedy: str) -> None:
        """Refuse a rule that would never be heard.

        Args:
            measurements: What is measured beside it.
            remedy: How its bucket is measured in this loop.

        Raises:
            ValueError: If nothing measures its bucket, site or stage; with what is measured.
        """
        found = list(measurements)
        buckets = list(dict.fromkeys(name for one in found for name in one.bucket_names))
        if self.bucket not in buckets:
            near = did_you_mean(self.bucket, buckets, otherwise="measured are")
            hint = f": {near}" if near.endswith("?") else f", which nothing here measures: {remedy}"
            raise ValueError(f"{_OWN} watches the bucket `{self.bucket}`{hint}")
        found = [one for one in found if self.bucket in one.bucket_names]
        wanted = {"site": (self.site, "sites"), "stage": (self.stage, "on")}
        for name, (value, argument) in wanted.items():
            given = [_listed(getattr(one.settings, argument)) for one in found]
            if not any(value in values for values in given):
                raise ValueError(
                    f"{_OWN} watches the {name} `{value}`, which is not measured here: `{argument}` is {given[0]}, "
                    f"`{argument}={[*given[0], value]}` measures it."
                )

    def judge(self, records: Sequence[SpectralRecord], voice: Voice) -> AlarmRecord | None:
        """Judge one window; every rank must call it with the same records.

        Args:
            records: Of one window.
            voice: Where it is said.

        Returns:
            The alarm, if it is raised now.
        """
        mine = [r for r in records if (r.stage, r.site, r.bucket) == (self.stage, self.site, self.bucket)]
        step = records[0].step if records else None
        if not mine or step is None or step == self._judged_step:
            return None
        self._judged_step = step  # two callbacks may both measure the bucket
        if step == 0:  # a run begins
            self._reference, self._beyond = None, 0
        judged = [record for record in mine if record.status == "ok" and record.value(self.metric)]
        if not judged:
            self._could_not_judge(voice, mine[0])
            return None
        self._unjudged = 0
        value = median(float(record.value(self.metric) or 0.0) for record in judged)
        reference = self._reference_for(value, step, judged)
        if reference is None:
            why = "no window at step 0 was measured: there is no untrained network to compare with."
            self._say_once(voice, "untrained", why)
            return None
        limit = self.threshold * reference
        is_beyond = value < limit if self.is_floor else value > limit
        self._beyond = self._beyond + 1 if is_beyond else 0
        voice.log({f"spectral_alarm/{self.metric}.{self.bucket}": float(self._beyond >= self.patience)}, step)
        if self._beyond != self.patience:
            return None
        return self._raise(voice, self._record(mine[0].run_id, step, value, reference))

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
        side, lasting = "below" if self.is_floor else "above", f", for {self.patience} windows"
        text = (
            f"{self.metric} of bucket {self.bucket} is {value:.4g} at step {step}: {value / reference:.2f} of "
            f"{_NAMES[self.relative_to]} ({reference:.4g}), {side} the {self.threshold:g} allowed"
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

    def _raise(self, voice: Voice, alarm: AlarmRecord) -> AlarmRecord:
        if voice.folder is not None and voice.folder.writes:
            path = voice.folder.path / ALARMS_FILE
            known = known_keys(read_alarms(path).records) if path.exists() else set()
            append_records(path, [alarm] if alarm.key not in known else [])
        voice.tell(f"{_OWN}: {alarm.message}{f'; {voice.stopping}' if self.stop else ''}.")
        if self.on_alarm is not None:
            self.on_alarm(alarm)
        return alarm

    def _could_not_judge(self, voice: Voice, record: SpectralRecord) -> None:
        self._unjudged += 1
        if self._unjudged == max(self.patience, 2):
            self._say_once(
                voice,
                "unjudged",
                f"{self._unjudged} windows in a row have no {self.metric} of bucket {self.bucket} to judge (status "
                f"`{record.status}`, N/D = {record.tokens_per_dim:.2g}): measure more tokens per window.",
            )

    def _say_once(self, voice: Voice, cause: str, text: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            voice.tell(f"{_OWN}: {text}")


class Alarms:
    """The rules of a loop that has no callbacks of Lightning's.

    Args:
        rules: :class:`~lightning_spectral.SpectralAlarm` or :class:`AlarmRule`.
        measurement: What the loop measures.
        remedy: How it measures buckets.
        stopping: What follows an alarm with ``stop=True``.

    Attributes:
        should_stop: Whether an alarm with ``stop=True`` has been raised.

    Raises:
        ValueError: If one of them is no rule, or would never be heard.
    """

    def __init__(
        self,
        rules: Sequence[AlarmRule],
        measurement: Measurement,
        *,
        remedy: str = "give `counts=`.",
        stopping: str = "`should_stop` is set",
    ) -> None:
        if not isinstance(rules, (list, tuple)) or not all(isinstance(rule, AlarmRule) for rule in rules):
            raise ValueError(f"`alarms` must be a list of SpectralAlarm, got {rules!r:.80}.")
        self.rules, self.should_stop, self.stopping = list(rules), False, stopping
        for rule in self.rules:
            if rule.stage != "train":
                raise ValueError(f"{_OWN} watches the stage `{rule.stage}`: in this loop only `train` is measured.")
            rule.require_measured([measurement], remedy)

    def judge(self, records: Sequence[SpectralRecord], host: Host, folder: RunFolder | None) -> None:
        """Judge one window; every rank must call it with the same records."""
        voice = Voice(folder, host.tell, host.log if host.is_first else _unheard, self.stopping)
        for rule in self.rules:
            alarm = rule.judge(records, voice)
            self.should_stop = self.should_stop or (alarm is not None and rule.stop)

    def state_dict(self) -> dict[str, Any]:
        """States of the rules, in their order."""
        return {"alarms": [rule.state_dict() for rule in self.rules]} if self.rules else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; rules that were not there then begin anew."""
        for rule, saved in zip(self.rules, state.get("alarms", ()), strict=False):
            rule.load_state_dict(saved)


def _unheard(scalars: Scalars, step: int | None) -> None:
    """Rank 0 logs it."""


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
