"""ARCHITECTURE's "where to add things", held: one row in a table is all that a new thing needs."""

from __future__ import annotations

import json
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lightning_spectral
from lightning_spectral import TailTokenProbe, cli, optim
from lightning_spectral.analysis.points import points_of_runs
from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.functional import rank
from lightning_spectral.functional.covariance import empty_moments, update_
from lightning_spectral.models import families, stacks
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import MatrixRule
from lightning_spectral.optim.settings import OrthogonalSettings
from lightning_spectral.probe import measurement, settings
from lightning_spectral.probe.grouping import Grouping
from lightning_spectral.probe.loop import LoopObserver
from lightning_spectral.probe.observe import Observation, plain_host
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.ranks_of import measure
from lightning_spectral.probe.records_of import WindowId, spectral_records
from lightning_spectral.probe.results import SiteResult, WindowResult
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.scalars import detail
from lightning_spectral.records import RunInfo, read_spectral
from lightning_spectral.report import figures
from lightning_spectral.report.scene import ReportFigure
from lightning_spectral.training import document
from tools.metric_docs import BEGIN, END, section


@pytest.fixture
def second_eigenvalue(monkeypatch):
    """A metric that nobody knows but the table."""
    row = rank.RankMetric("second_share", lambda eigs: eigs[..., 1] / eigs.sum(-1), "", "[0, 1/2]", "Second share.")
    monkeypatch.setitem(rank.RANK_METRICS, "second_share", row)


def one_window(seed: int = 0, width: int = 8) -> WindowResult:
    rows = torch.randn(2_000, width, generator=torch.Generator().manual_seed(seed)) * torch.arange(width, 0, -1)
    moments = empty_moments(1, width)
    update_(moments, rows, [len(rows)], None)
    site = SiteResult(0, "h.0.mlp.proj", None, "post", "pooled", 10, "float32", measure(moments))
    return WindowResult([site], [], 1, 0.0)


def test_a_row_of_rank_metrics_reaches_record_tag_and_table(second_eigenvalue, tmp_path):
    records = spectral_records(one_window(), WindowId("run", "train", 0, None), {})
    value = records[0].value("second_share")
    assert value == pytest.approx(49 / 204, rel=0.1)  # variances 64, 49, 36, ..., 1
    assert detail(records, "train")["spectral.second_share.post.pooled/layer_00"] == value
    run = RunFolder(tmp_path, RunInfo("run", "2026-01-01T00:00:00", "Muon"), resume=False, writes=True)
    run.append_spectral(records)
    assert json.loads((tmp_path / "spectral.jsonl").read_text())["second_share"] == value
    table = points_of_runs(load_runs([tmp_path]), metrics=["second_share"])
    assert {point.value for point in table.points} == {value}


def runs_of_three_widths(folder: Path) -> None:
    for width in (8, 16, 32):
        window = one_window(width, width)
        records = spectral_records(window, WindowId(f"run{width}", "train", 10, None), {})
        path = folder / f"run{width}"
        RunFolder(
            path, RunInfo(f"run{width}", "2026-01-01T00:00:00", "Muon", seed=0), resume=False, writes=True
        ).append_spectral(records)


def test_a_row_of_rank_metrics_reaches_csv_column_and_figure(second_eigenvalue, tmp_path, capsys):
    runs_of_three_widths(tmp_path / "runs")
    words = [str(tmp_path / "runs"), "--metrics", "second_share", "--last", "1"]
    assert cli.main(["fit", *words, "--format", "json"]) == 0
    (fit,) = json.loads(capsys.readouterr().out)
    assert fit["metric"] == "second_share"
    # variances D^2, (D-1)^2, ..., 1: shares 49/204, 225/1496, 961/11440 at D = 8, 16, 32; 2,000 rows each
    assert fit["beta"] == pytest.approx(-0.757, abs=0.05)
    assert cli.main(["report", *words, "--out", str(tmp_path / "page")]) == 0
    assert "second_share" in (tmp_path / "page" / "points.csv").read_text()
    assert "second" in (tmp_path / "page" / "figures" / "scaling_laws.svg").read_text()


def test_a_row_of_rank_metrics_reaches_the_docs(second_eigenvalue):
    assert "| `second_share` | Second share. |" in section()


def test_the_docs_have_every_metric():
    text = (Path(document.__file__).parents[2] / "docs" / "numbers.md").read_text()
    rows = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert rows == section(), "run `python tools/metric_docs.py`"


class Floor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.wide(x).relu())


class Decoder(nn.Module):
    """A model whose names nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.floors = nn.ModuleList([Floor(), Floor()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for floor in self.floors:
            x = floor(x)
        return x


def test_a_hint_says_what_to_measure_in_a_model_of_its_own_names(monkeypatch):
    assert {site.name for site in stacks.find_stacks(Decoder()).sites} == {"floors.0.narrow", "floors.1.narrow"}
    monkeypatch.setattr(stacks, "installed_hints", lambda: (families.Hint("nobody's", down="floors.*.wide"),))
    found = stacks.find_stacks(Decoder())
    assert {(site.layer, site.name) for site in found.sites} == {(0, "floors.0.wide"), (1, "floors.1.wide")}


def test_a_grouping_is_a_bucket_rule():
    model, even = Decoder(), Grouping(("even", "odd"), lambda ids: ids % 2)
    probe = SpectralProbe(model, even, ProbeOptions(modules=("floors.*.narrow",)))
    ids = torch.randint(10, (2, 30), generator=torch.Generator().manual_seed(0))
    num_odd = int((ids % 2).sum())
    try:
        with torch.no_grad():
            probe.start(seed=0, training=False)
            model(ids)
            probe.collect()
        sites = probe.end().sites
    finally:
        probe.remove()
    assert {(site.bucket, site.measurement.num_tokens) for site in sites} == {
        ("pooled", 60),
        ("even", 60 - num_odd),
        ("odd", num_odd),
    }


def test_a_row_of_bucket_rules_is_a_choice_of_every_callback_and_loop(monkeypatch, tmp_path):
    rule = settings.BucketRule(lambda chosen, counts: Grouping(("even", "odd"), lambda ids: ids % 2))
    monkeypatch.setitem(settings.BUCKET_RULES, "parity", rule)
    TailTokenProbe(group_by="parity")
    ids = torch.randint(10, (2, 30), generator=torch.Generator().manual_seed(0))
    model = Decoder()
    chosen = settings.ProbeSettings(every_n_steps=1, dirpath=str(tmp_path))
    buckets = settings.BucketSettings(group_by="parity", losses=False)
    loop = LoopObserver(measurement.Measurement(chosen, buckets), name="test")
    loop.attach(model, plain_host(chosen))
    with Observation(loop) as observation:
        model(ids).sum().backward()
        observation.step()
    found = {record.bucket: record.num_tokens for record in read_spectral(tmp_path).records}
    num_odd = int((ids % 2).sum())
    assert found == {"pooled": 60, "even": 60 - num_odd, "odd": num_odd}
    with pytest.raises(ValueError, match=r"`group_by` must be one of \['frequency', 'position', 'parity'\], got 'odd'"):
        TailTokenProbe(group_by="odd")


def test_a_row_of_figures_is_drawn_on_the_page(monkeypatch, tmp_path):
    row = figures.FigureRow("A new figure", lambda scene: ReportFigure(Figure(), "New lead.", "New note."))
    monkeypatch.setitem(figures.FIGURES, "brand_new", row)
    runs_of_three_widths(tmp_path / "runs")
    words = ["--metrics", "hard_rank", "--last", "1", "--out", str(tmp_path / "page")]
    assert cli.main(["report", str(tmp_path / "runs"), *words]) == 0
    assert (tmp_path / "page" / "figures" / "brand_new.svg").is_file()
    assert "A new figure" in next((tmp_path / "page").glob("*.html")).read_text()


class Signs(MatrixRule):
    """Signs of the momentum, as a rule for hidden matrices."""

    def update_matrices(self, inputs_BMN, extra, group):
        return inputs_BMN.sign()


class SignOptimizer(SpectralOptimizer):
    matrix_rules = {"signs": Signs()}
    settings_class = OrthogonalSettings

    def __init__(self, params, lr=0.1, **shared):
        super().__init__(params, lr, "signs", OrthogonalSettings(**shared))


def test_a_matrix_rule_is_an_optimizer():
    model = Decoder()
    before = model.floors[0].wide.weight.detach().clone()
    arguments = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "lr_scale": "spectral", "norm_eps": 0.0}
    optimizer = SignOptimizer(model, lr=0.1, **arguments)
    model(torch.arange(10)).square().sum().backward()
    gradient = model.floors[0].wide.weight.grad.clone()
    optimizer.step()
    step = before - model.floors[0].wide.weight.detach()
    # lr * sqrt(m / n) = 0.1 * sqrt(2) for an 8 x 4 matrix
    torch.testing.assert_close(step, 0.1 * 2**0.5 * gradient.sign())


def test_every_optimizer_has_its_public_names():
    """What ARCHITECTURE asks for beside the file: `optim`, and the package itself."""
    found = set()
    for module in pkgutil.iter_modules(optim.__path__):
        content = vars(import_module(f"lightning_spectral.optim.{module.name}"))
        found |= {
            name
            for name, kind in content.items()
            if isinstance(kind, type) and issubclass(kind, SpectralOptimizer) and not name.startswith("_")
        }
    assert found == set(optim.__all__)
    assert found - {"SpectralOptimizer"} <= set(lightning_spectral.__all__)
    for name in found - {"SpectralOptimizer"}:
        assert getattr(lightning_spectral, name) is getattr(optim, name)


def test_a_file_among_the_recipes_is_a_recipe(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "new.yaml").write_text("model_name: pythia-14m\n")
    monkeypatch.setattr(document, "folder_of_recipes", lambda: tmp_path)
    assert document.find("mine/new") == tmp_path / "mine" / "new.yaml"
    assert cli.main(["pretrain", "--help"]) == 0
    assert "mine/new" in capsys.readouterr().out


def test_a_row_of_verbs_is_a_verb(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "echo", ("tests.test_one_table", "says what it is given"))
    assert cli.main(["echo", "a", "b"]) == 0
    assert capsys.readouterr().out == "a b\n"
    cli.main(["--help"])
    assert "says what it is given" in capsys.readouterr().out


def main(argv: list[str]) -> int:
    print(*argv)
    return 0
