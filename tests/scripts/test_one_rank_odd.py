"""Every kind of script on one of two ranks, the plain script on the other, and no collective but ours.

As in local SGD each rank trains alone, so that any script may stand beside any other: it may skip steps, end early,
raise or hold another model. Whatever rank 1 does, both ranks end as they do without us, and nobody waits for long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_spectral import read_spectral
from lightning_spectral.probe import agreement, collectives
from tests.distributed.harness import run_ranks
from tests.scripts.harness import Outcome, Script, run
from tests.scripts.test_scripts import SCRIPTS
from tests.scripts.toys import Lit

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]
ALWAYS = ("plain", "returns None", "raises", "out of memory, retried", "critic on odd batches", "images")
LIMIT_S = 3.0  # ours, in the place of 20 s


class Local(DDPStrategy):
    """Ranks that share nothing: no averaged gradients, no barrier, every decision is one's own."""

    def _setup_model(self, model: Any) -> Any:
        return model

    def configure_ddp(self) -> None:
        self.model = self._setup_model(self.model)

    def barrier(self, *_: Any, **__: Any) -> None: ...

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor


@contextlib.contextmanager
def short_limits() -> Iterator[None]:
    """Ours are short, and Lightning's question at every batch, whether a rank was told to end, is not asked."""
    init, before, lightnings = (
        agreement.Agreement.__init__,
        collectives.LIMIT_S,
        _TrainingEpochLoop._broadcast_sigterm_tensor,
    )

    def quick(self: Any, name: str, *, limit_s: float = LIMIT_S) -> None:
        init(self, name, limit_s=limit_s)

    agreement.Agreement.__init__, collectives.LIMIT_S = quick, LIMIT_S  # type: ignore[method-assign]
    _TrainingEpochLoop._broadcast_sigterm_tensor = lambda _: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        agreement.Agreement.__init__, collectives.LIMIT_S = init, before  # type: ignore[method-assign]
        _TrainingEpochLoop._broadcast_sigterm_tensor = lightnings  # type: ignore[method-assign]


def both_ways(rank: int, world: int, name: str, path: str) -> dict[str, tuple[Outcome, float]]:
    """Without us and with the probe, on this rank."""
    script = SCRIPTS[name] if rank == 1 else Script(Lit)
    script.options = {**script.options, "devices": world, "use_distributed_sampler": False}
    script.settings = {**script.settings, "dirpath": f"{path}/records"}
    found = {}
    for way in ("without", "tail"):
        script.options["strategy"] = Local()
        began = time.monotonic()
        with short_limits():
            outcome = run(script, way, Path(path) / f"{way}-{rank}")
        found[way] = (outcome, time.monotonic() - began)
    if dist.is_initialized():
        dist.destroy_process_group()  # not to be waited for at the end of the test
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in SCRIPTS]
)
def test_the_other_rank_does_not_notice(tmp_path: Path, name: str) -> None:
    told: list[str] = []
    for rank, found in enumerate(run_ranks(both_ways, 2, name, str(tmp_path), timeout_s=60)):
        (plain, _), (ours, seconds) = found["without"], found["tail"]
        assert seconds < 30
        told += ours.warnings
        if ours.ended.startswith("MisconfigurationException: TailTokenProbe: "):  # said before step 1, on both ranks
            assert ours.step == 0
            assert "rank 1" in ours.ended or rank == 1
            told.append(ours.ended)
            continue
        assert (ours.ended, ours.step) == (plain.ended, plain.step), rank
        for before, after in zip(plain.weights, ours.weights, strict=True):
            assert torch.allclose(before, after, rtol=0, atol=0, equal_nan=True), rank
    folder = tmp_path / "records"
    records = read_spectral(folder).records if (folder / "spectral.jsonl").exists() else []
    assert records or any(text.startswith(("TailTokenProbe", "Misconfiguration")) for text in told), told
    for record in records:
        assert record.hard_rank is not None or record.reason or record.status in ("nonfinite", "no_rows"), record
