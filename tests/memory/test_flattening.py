"""``newton-schulz --checkpoint``: names, the run's own optimizer and settings, one verdict, clear refusals."""

import pytest
import torch

from lightning_spectral.cli import main
from lightning_spectral.memory.fit import read_results
from lightning_spectral.optim import AdamW, Dion, Muon


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(13, 8)
        self.up = torch.nn.Linear(8, 12, bias=False)
        self.down = torch.nn.Linear(12, 8, bias=False)
        self.lm_head = torch.nn.Linear(8, 13, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.down(self.up(self.wte(tokens)).relu()))


def trained(make):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = make(model)
    model(torch.arange(12)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def checkpoint(path, make, lightning=True):
    model, optimizer = trained(make)
    state = optimizer.state_dict()
    names = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": names, "optimizer_states": [state]} if lightning else state, path)
    return model, optimizer


def judge(path, tmp_path, *arguments):
    code = main(["memory", "newton-schulz", "--checkpoint", str(path), *arguments, "--out", str(tmp_path / "out")])
    return code, read_results(tmp_path / "out") if code == 0 else []


def test_a_run_is_judged_by_its_own_iteration(tmp_path, capsys):
    model, optimizer = checkpoint(tmp_path / "a.ckpt", lambda m: Muon(m, lr=0.01, orthogonalize="muon", steps=3))
    code, rows = judge(tmp_path / "a.ckpt", tmp_path)
    assert code == 0
    assert {row["matrix"] for row in rows} == {"up.weight", "down.weight"}  # as the optimizer was given them
    assert {(row["optimizer"], row["coefficients"], row["ns_steps"]) for row in rows} == {("muon", "muon", 3)}
    assert all(row["own_settings"] for row in rows)
    text = capsys.readouterr().out
    assert text.count("this run's muon with 3 muon steps flattens") == 1
    # the right momentum under the right name
    buffers = {
        tuple(s["momentum_buffer"].shape): s["momentum_buffer"]
        for s in optimizer.state.values()
        if "momentum_buffer" in s
    }
    for row in rows:
        sigma = torch.linalg.svdvals(buffers[tuple(row["shape"])].double())
        assert row["smallest_singular_value"] == pytest.approx(float(sigma[-1] / sigma.norm()))
        assert tuple(row["shape"]) == tuple(model.get_parameter(row["matrix"].removeprefix("model.")).shape)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda m: AdamW(m, lr=0.01), "adam"),
        (lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), "adam"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9), "sgd"),
        (lambda m: Dion(m, lr=0.01), "dion"),
    ],
)
def test_an_optimizer_without_iteration_is_named(make, kind, tmp_path, capsys):
    checkpoint(tmp_path / "a.ckpt", make)
    code, rows = judge(tmp_path / "a.ckpt", tmp_path, "--ns-steps", "5")
    assert code == 0
    names = {row["matrix"].removeprefix("model.") for row in rows}  # ours knows names, torch's takes the model's
    assert names == {"up.weight", "down.weight"}  # no embedding, no head
    assert not any(row["own_settings"] for row in rows)
    assert f"this run used {kind}, which runs no Newton-Schulz iteration" in capsys.readouterr().out


def test_a_bare_optimizer_state_has_the_optimizers_names(tmp_path):
    checkpoint(tmp_path / "a.ckpt", lambda m: Muon(m, lr=0.01), lightning=False)
    _, rows = judge(tmp_path / "a.ckpt", tmp_path)
    assert {row["matrix"] for row in rows} == {"up.weight", "down.weight"}
    assert {(row["coefficients"], row["ns_steps"]) for row in rows} == {("polar_express", 5)}


def test_other_settings_are_judged_where_they_are_asked_for(tmp_path):
    checkpoint(tmp_path / "a.ckpt", lambda m: Muon(m, lr=0.01))
    _, rows = judge(tmp_path / "a.ckpt", tmp_path, "--coefficients", "cubic", "muon", "--ns-steps", "2", "7")
    assert len(rows) == 2 * 2 * 2
    assert not any(row["own_settings"] for row in rows)


def test_torch_s_muon_is_known(tmp_path):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    checkpoint(tmp_path / "a.ckpt", lambda m: torch.optim.Muon([m.up.weight, m.down.weight], ns_steps=4))
    _, rows = judge(tmp_path / "a.ckpt", tmp_path)
    assert {(row["optimizer"], row["coefficients"], row["ns_steps"]) for row in rows} == {("muon", "muon", 4)}


def test_weights_are_refused_unless_asked_for(tmp_path, capsys):
    torch.save(Tiny().state_dict(), tmp_path / "weights.pth")
    assert judge(tmp_path / "weights.pth", tmp_path)[0] == 2
    assert "never orthogonalised" in capsys.readouterr().err
    code, rows = judge(tmp_path / "weights.pth", tmp_path, "--as-gradient")
    assert code == 0
    assert {row["matrix"] for row in rows} == {"up.weight", "down.weight"}
    assert not any(row["is_momentum"] for row in rows)


class Foreign:
    pass


@pytest.mark.parametrize("kind", ["text", "missing", "object", "empty"])
def test_files_that_cannot_be_judged_are_named_in_our_own_words(kind, tmp_path, capsys):
    path = tmp_path / "README.md"
    if kind == "text":
        path.write_text("# A README\n\nnothing here\n")
    elif kind == "object":
        torch.save({"model": Foreign()}, path)
    elif kind == "empty":
        torch.save({"step": 3}, path)
    assert judge(path, tmp_path)[0] == 2
    error = capsys.readouterr().err
    assert "`--checkpoint`" in error
    assert str(path) in error
    assert "weights_only" not in error
    assert len(error.splitlines()) == 1
    expected = {
        "text": "no file of `torch.save`",
        "missing": "no checkpoint at",
        "object": "Foreign",
        "empty": "holds no matrix",
    }
    assert expected[kind] in error
