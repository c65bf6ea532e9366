"""``LIGHTNING_SPECTRAL=probe.yaml`` measures a transformers Trainer and an Accelerate loop that know nothing of us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lightning_spectral.callbacks import VARIABLE, autoload
from lightning_spectral.records import read_run, read_spectral

ROOT = Path(__file__).parents[2]
GROUP = "torch.backends"

MODEL = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader
from tests.scripts.toys import LM, ids, cross_entropy

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = LM()
    def forward(self, input_ids, labels=None):
        return {"loss": cross_entropy(self.net(input_ids)[:, :-1], input_ids[:, 1:])}

model, batches = Model(), list(ids(40, 16).split(8))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
"""
ACCELERATE = (
    MODEL
    + """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, optimizer)
for batch in batches:
    accelerator.backward(model(batch)["loss"])
    optimizer.step()
    optimizer.zero_grad()
accelerator.end_training()
"""
)
TRAINER = (
    MODEL
    + """
from transformers import Trainer, TrainingArguments
class InOrder(Trainer):
    def get_train_dataloader(self):
        return DataLoader([{"input_ids": batch} for batch in batches], batch_size=None)
arguments = TrainingArguments(
    output_dir="out", max_steps=5, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
    disable_tqdm=True, max_grad_norm=0.0,
)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
InOrder(model, arguments, optimizers=(optimizer, schedule)).train()
"""
)
WEIGHTS = "\ntorch.save(model.state_dict(), 'weights.pt')\n"


def entry_point() -> str:
    section = (ROOT / "pyproject.toml").read_text().split(f'[project.entry-points."{GROUP}"]')[1]
    return section.split('"')[1]  # tomllib is of Python 3.11


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of metadata as an installation leaves it; one that is there already does no harm."""
    info = tmp_path / "site" / "lightning_spectral_of_this_tree-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-spectral-of-this-tree\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nlightning-spectral = {entry_point()}\n")
    return info.parent


def run(script: str, folder: Path, site: Path, measured: bool) -> str:
    folder.mkdir()
    spec = {"class_path": "SpectralRankCallback", "init_args": {"every_n_steps": 2, "dirpath": str(folder / "records")}}
    (folder / "probe.yaml").write_text(yaml.safe_dump({"callbacks": [spec]}))
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}
    environment.pop(VARIABLE, None)
    if measured:
        environment[VARIABLE] = str(folder / "probe.yaml")
    done = subprocess.run(
        [sys.executable, "-c", script + WEIGHTS], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow  # two imports of transformers or accelerate in processes of their own
@pytest.mark.parametrize(("library", "script"), [("transformers", TRAINER), ("accelerate", ACCELERATE)])
def test_a_script_that_knows_nothing_of_us_is_measured(
    tmp_path: Path, installed: Path, library: str, script: str
) -> None:
    import torch

    pytest.importorskip(library)
    pytest.importorskip("accelerate")
    run(script, tmp_path / "without", installed, measured=False)
    told = run(script, tmp_path / "with", installed, measured=True)
    assert "Nothing is measured" not in told
    records = [r for r in read_spectral(tmp_path / "with" / "records").records if r.layer == 0]
    assert [(r.step, r.num_tokens) for r in records] == [(step, 8 * 16) for step in (0, 2, 4)]
    assert all(r.hard_rank for r in records)
    assert read_run(tmp_path / "with" / "records").finished is True
    assert not (tmp_path / "without" / "records").exists()
    plain, ours = (torch.load(tmp_path / name / "weights.pt") for name in ("without", "with"))
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_without_the_variable_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = list(sys.meta_path)
    autoload.start()
    assert sys.meta_path == before


def test_the_module_is_patched_when_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_library.py").write_text("class Loop:\n    def run(self):\n        return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[tuple[str, int]] = []

    def patch(module: ModuleType) -> None:
        autoload._then(module.Loop, "run", lambda own, result: seen.append((type(own).__name__, result)))

    monkeypatch.setattr(sys, "meta_path", [autoload._Waits({"late_library": patch}), *sys.meta_path])
    import late_library  # type: ignore[import-not-found]

    monkeypatch.setenv(VARIABLE, "x")
    assert late_library.Loop().run() == 1
    assert seen == [("Loop", 1)]
    assert type(late_library.__loader__).__module__ == "_frozen_importlib_external"  # pickles and reloads as ever


def test_an_error_of_ours_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop:
        def run(self) -> int:
            return 1

    def fails(own: object, result: object) -> None:
        raise ZeroDivisionError("ours")

    autoload._then(Loop, "run", fails)
    monkeypatch.setenv(VARIABLE, "x")
    with pytest.warns(UserWarning, match="ours"):
        assert Loop().run() == 1


def test_torch_calls_that_group() -> None:
    import torch

    assert f'"{GROUP}"' in Path(torch.__file__).read_text()
