"""Every script ends alike with us and without us: same weights, same losses, and records that an oracle confirms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import embeddings, inputs, late, libraries, loops, losses, models, others, steps, surgery
from tests.scripts.harness import Script, compare

_MODULES = (steps, models, losses, others, loops, surgery, inputs, libraries, embeddings, late)
SCRIPTS = {name: script for module in _MODULES for name, script in module.SCRIPTS.items()}
# in the default run: one of each kind that has broken before; the others are slow together
ALWAYS = (
    "plain", "returns None", "critic on odd batches", "out of memory, retried", "whole model checkpointed", "raises",
    "chunked cross-entropy", "named tuple", "goes on where it stopped", "images", "generate() in validation",
    "class weights", "means of sequences", "head and loss fused", "focal", "loss and generate() in validation",
    "vision transformer", "uneven accumulation by hand", "traced block", "Whisper", "halves of the batch",
    "bare matrices, compiled", "keywords only",
)  # fmt: skip


def test_there_are_scripts_of_many_kinds() -> None:
    assert len(SCRIPTS) == sum(len(module.SCRIPTS) for module in _MODULES) >= 200
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
