"""Every script ends alike with us and without us: same weights, same losses, and records that an oracle confirms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import losses, models, others, steps
from tests.scripts.harness import Script, compare

SCRIPTS = {**steps.SCRIPTS, **models.SCRIPTS, **losses.SCRIPTS, **others.SCRIPTS}
# in the default run: one of each kind that has broken before; the others are slow together
ALWAYS = (
    "plain", "returns None", "critic on odd batches", "out of memory, retried", "whole model checkpointed", "raises",
    "chunked cross-entropy", "named tuple", "goes on where it stopped", "images", "generate() in validation",
    "class weights", "means of sequences", "head and loss fused", "focal", "loss and generate() in validation",
    "vision transformer",
)  # fmt: skip


def test_there_are_scripts_of_many_kinds() -> None:
    assert len(SCRIPTS) >= 110
    assert not set(ALWAYS) - set(SCRIPTS)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name, script in SCRIPTS.items()
    ],
)
def test_a_script_does_not_notice(tmp_path: Path, script: Script) -> None:
    compare(script, ("rank", "tail", "variable"), tmp_path)
