import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_spectral.callbacks.weight_spectrum import WeightSpectrumCallback
from lightning_spectral.functional.flattening import flattening, spectrum_flattening
from lightning_spectral.functional.matrix_spectrum import matrix_spectrum
from lightning_spectral.optim import Muon
from lightning_spectral.probe.matrix_spectra import _singular_values
from lightning_spectral.probe.weight_spectra import _choose, _displays
from lightning_spectral.records import read_weights


class Net(pl.LightningModule):
    def __init__(self, optimizer="adam"):
        super().__init__()
        self.name = optimizer
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 11)

    def training_step(self, batch, batch_idx):
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x).relu()
        return nn.functional.cross_entropy(self.head(x), batch)

    def configure_optimizers(self):
        if self.name == "adam":
            return torch.optim.Adam(self.parameters(), 1e-2)
        return torch.optim.SGD(self.parameters(), 1e-2)

    def train_dataloader(self):
        return DataLoader(torch.arange(40) % 11, batch_size=8)


def fit(tmp_path, callbacks, optimizer="adam", **options):
    torch.manual_seed(0)
    model = Net(optimizer)
    trainer = pl.Trainer(
        max_steps=4, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(model)
    return model, trainer


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_records_of_every_matrix_and_nothing_changes(tmp_path):
    plain, _ = fit(tmp_path, [])
    measured, trainer = fit(tmp_path, [WeightSpectrumCallback(2, dirpath=str(tmp_path))])
    for a, b in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(a, b)
    records = read_weights(tmp_path).records
    assert {record.parameter for record in records} == {"blocks.0.weight", "blocks.1.weight", "head.weight"}
    assert {record.what for record in records} == {"weight", "gradient", "momentum", "update"}
    assert {record.step for record in records} == {0, 2, 3}
    assert len(records) == 3 * 4 * 3
    assert {record.layer for record in records} == {0, 1, None}
    last = next(r for r in records if (r.step, r.parameter, r.what) == (3, "head.weight", "weight"))
    truth = matrix_spectrum(measured.head.weight)
    assert last.effective_rank == pytest.approx(truth.effective_rank, rel=1e-9)
    assert last.stable_rank == pytest.approx(truth.stable_rank, rel=1e-9)
    assert all(r.flattened_share is not None for r in records if r.what in ("gradient", "momentum"))
    assert "spectral_weights/effective_rank.update" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_the_update_is_the_one_that_was_applied(tmp_path):
    fit(tmp_path, [WeightSpectrumCallback(1, dirpath=str(tmp_path))], optimizer="sgd")
    records = {(r.step, r.parameter, r.what): r for r in read_weights(tmp_path).records}
    assert not any(key[2] == "momentum" for key in records)
    for step in range(4):
        gradient, update = (records[step, "blocks.0.weight", what] for what in ("gradient", "update"))
        # fp32 weights of size 0.4 hold an update of size 1e-3 to 3e-5
        assert update.frobenius == pytest.approx(0.01 * gradient.frobenius, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_accumulated_gradients_make_one_window(tmp_path):
    fit(tmp_path, [WeightSpectrumCallback(1, what=["gradient"], dirpath=str(tmp_path))], accumulate_grad_batches=2)
    assert len(read_weights(tmp_path).records) == 3 * 4


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_patterns_choose_and_nothing_matched_is_an_error(tmp_path):
    fit(tmp_path, [WeightSpectrumCallback(1, what=["weight"], parameters=["blocks.1.*"], dirpath=str(tmp_path))])
    assert {record.parameter for record in read_weights(tmp_path).records} == {"blocks.1.weight"}
    with pytest.raises(MisconfigurationException, match="parameters"):
        fit(tmp_path, [WeightSpectrumCallback(1, parameters=["nothing"], dirpath=str(tmp_path))])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"what": ["activation"]}, "what"),
        ({"what": "weight"}, "what"),
        ({"coefficients": "best"}, "coefficients"),
        ({"ns_steps": 0}, "ns_steps"),
    ],
)
def test_bad_arguments_are_named(arguments, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        WeightSpectrumCallback(**arguments)


def test_flattening_finds_the_reach_of_five_steps():
    sigma = torch.tensor([1.0, 0.1, 1e-2, 1e-3, 1e-4], dtype=torch.float64)
    five = spectrum_flattening(sigma, "muon", 5)
    assert five.share == pytest.approx(3 / 5)  # 3.4445^-5 = 1/485 lies between 1e-2 and 1e-3
    assert spectrum_flattening(sigma, "muon", five.steps_needed).share == 1
    assert five.steps_needed > 5
    assert flattening(torch.eye(4), "muon", 5).share == 1
    assert flattening(torch.diag(sigma), "muon", 5) == five
    for bad in (torch.zeros(3, 3), torch.full((2, 2), float("nan")), torch.ones(3)):
        with pytest.raises(ValueError, match="`matrix`"):
            flattening(bad)
    with pytest.raises(ValueError, match="`steps`"):
        flattening(torch.eye(2), steps=0)


def test_a_child_named_module_keeps_its_name():
    net = torch.nn.ModuleDict(
        {"fc": torch.nn.Linear(2, 2, bias=False), "module": torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)})}
    )
    net["submodule"] = torch.nn.Linear(2, 2, bias=False)
    root = torch.nn.ModuleDict({"net": net})
    names = [name for name, _ in _choose(root, None)]
    assert names == ["net.fc.weight", "net.module.fc.weight", "net.submodule.weight"]


class Experts(nn.Module):
    """Three experts of one projection, kept as (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.is_transposed = True
        self.up_proj = nn.Parameter(torch.randn(3, 6, 8))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 2, 1, 3
        self.qkv = nn.Linear(6, 12, bias=False)


class Views(Net):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Attention()])
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([Attention()])
        self.experts = Experts()

    def training_step(self, batch, batch_idx):
        x = self.embed(batch)
        for side in (self.encoder, self.decoder):
            x = x + side.layers[0].qkv(x)[:, :6].tanh() * side.layers[0].qkv(x)[:, 6:]
        x = x + torch.einsum("bn,enm->bm", x, self.experts.up_proj)[:, :6]
        return super().training_step(batch, batch_idx) + nn.functional.cross_entropy(self.head(x), batch)

    def configure_optimizers(self):
        return self.make(self)


@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.parametrize("split", ["none", "heads", None])
def test_the_matrices_of_the_optimizer_are_measured_one_by_one(tmp_path, split):
    torch.manual_seed(0)
    model = Views((lambda m: Muon(m, split=split)) if split else lambda m: torch.optim.SGD(m.parameters(), 0.1))
    trainer = pl.Trainer(
        max_steps=1, callbacks=[WeightSpectrumCallback(1, dirpath=str(tmp_path), strict=True)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model)
    records = {r.parameter: r for r in read_weights(tmp_path).records if r.what == "weight"}
    experts = [records[f"experts.up_proj[{i}]"] for i in range(3)]
    for record, matrix in zip(experts, model.experts.up_proj.detach(), strict=True):
        assert (record.rows, record.columns) == (8, 6)
        assert record.frobenius == pytest.approx(float(matrix.norm()), rel=1e-6)
    fused = model.encoder.layers[0].qkv.weight.detach()
    if split == "heads":
        for i, head in enumerate(fused.split(3)):
            record = records[f"encoder.layers.0.qkv.weight[{i}]"]
            assert (record.rows, record.columns) == (3, 6)
            assert record.effective_rank == pytest.approx(matrix_spectrum(head).effective_rank, rel=1e-6)
    else:
        assert records["encoder.layers.0.qkv.weight"].rows == 12


def test_two_stacks_with_the_same_layers_have_tags_of_their_own():
    names = [
        "encoder.layers.3.fc.weight",
        "decoder.layers.3.fc.weight",
        "decoder.layers.3.cross.weight[2]",
        "head.weight",
    ]
    assert list(_displays(names).values()) == [
        "encoder.layers.layer_03.fc",
        "decoder.layers.layer_03.fc",
        "layer_03.cross[2]",
        "head",
    ]


@pytest.mark.parametrize("where", ["torch.linalg.svdvals", "torch.Tensor.double"])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("none left"), torch.linalg.LinAlgError("no")])
def test_a_matrix_that_cannot_be_solved_is_an_answer_to_the_ranks_that_wait(where, error, monkeypatch):
    def fails(*given, **named):
        raise error

    monkeypatch.setattr(where, fails)
    assert len(_singular_values(torch.ones(3, 2))) == 0
