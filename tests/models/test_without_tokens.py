"""Models that read no token ids: pooled ranks of all rows, whatever their leading shape, and intervals over samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral import observe, read_spectral
from lightning_spectral.models.stacks import find_stacks

D, F, SAMPLES = 8, 12, 10


class Network(nn.Module):
    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, F), nn.Linear(F, width)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Attending(nn.Module):
    """Attention along the second-to-last axis, then a network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj, self.mlp = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D), Network()

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Convolving(nn.Module):
    """A depthwise convolution, then a network over channels kept last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.mlp = nn.Conv2d(D, D, 3, padding=1, groups=D), nn.LayerNorm(D), Network()

    def forward(self, x):
        return x + self.mlp(self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1)))


class Windows(Attending):
    """Attention inside windows of two: the block itself gets whole samples."""

    def forward(self, x):
        windows = x.reshape(-1, 2, D)
        return super().forward(windows).reshape(x.shape)


class Flat(nn.Module):
    """Two networks whose four projections lie beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Conv1d(D, D, 3, padding=1)
        self.first_up, self.first_down = nn.Linear(D, F), nn.Linear(F, D)
        self.second_up, self.second_down = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        x = x + self.first_down(self.first_up(self.mix(self.norm(x).mT).mT).relu())
        return x + self.second_down(self.second_up(x).relu())


class Model(nn.Module):
    def __init__(self, stem: nn.Module, block: Callable[[], nn.Module], shape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.shape, self.blocks = stem, shape, nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        x = self.shape(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x


class Perceptron(nn.Module):
    """No list of blocks at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, F), nn.ReLU(), nn.Linear(F, F), nn.ReLU(), nn.Linear(F, 1))

    def forward(self, x):
        return self.net(x)


def tokens_of_image(x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([x.new_ones(len(x), 1, D), x], 1)


@dataclass(frozen=True)
class Case:
    """How the model is built, one input, rows of a sample, what is measured."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows_of_a_sample: int
    sites: tuple[str, ...] = ("blocks.0.mlp.down", "blocks.1.mlp.down")
    options: dict = field(default_factory=dict)


def patches() -> nn.Module:
    return nn.Conv2d(3, D, 4, stride=4)


CASES = {
    "image, patches and a class row": Case(lambda: Model(patches(), Attending, tokens_of_image), (3, 16, 16), 17),
    "image, channels last": Case(lambda: Model(patches(), Convolving, lambda x: x.movedim(1, -1)), (3, 16, 16), 16),
    "image, attention in windows": Case(
        lambda: Model(patches(), Windows, lambda x: x.flatten(2).transpose(1, 2)), (3, 16, 16), 16
    ),
    "video": Case(
        lambda: Model(nn.Conv3d(3, D, (2, 4, 4), (2, 4, 4)), Attending, lambda x: x.movedim(1, -1).flatten(2, 3)),
        (3, 4, 8, 8),
        8,
    ),
    "audio": Case(
        lambda: Model(nn.Conv1d(1, D, 5, stride=5), Attending, lambda x: x.transpose(1, 2)), (1, 60), 12
    ),
    "time series, every channel apart": Case(
        lambda: Model(nn.Linear(4, D), Attending, lambda x: x), (3, 5, 4), 15
    ),
    "two networks beside each other": Case(
        lambda: Model(nn.Linear(4, D), Flat, lambda x: x),
        (15, 4),
        15,
        tuple(f"blocks.{n}.{name}_down" for n in (0, 1) for name in ("first", "second")),
    ),
    "table, a row a column": Case(lambda: Model(nn.Linear(1, D), Attending, lambda x: x), (7, 1), 7),
    "table, a network by glob": Case(Perceptron, (5,), 1, ("net.2", "net.4"), {"modules": ["net.2", "net.4"]}),
    "rays and their samples": Case(lambda: Model(nn.Linear(3, D), lambda: Pure(), lambda x: x), (6, 3), 6,
                                   ("blocks.0.down", "blocks.1.down")),
}  # fmt: skip


class Pure(Network):
    """A network and nothing else: the only list that there is counts all the same."""

    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize("name", CASES)
def test_ranks_rows_and_samples(name, tmp_path):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    seen: dict[str, Tensor] = {}
    for path in case.sites:
        hook = lambda _, args, path=path: seen.update({path: args[0].detach().double().flatten(0, -2)})  # noqa: E731
        model.get_submodule(path).register_forward_pre_hook(hook)
    with observe(model, 1, out=tmp_path, num_jackknife_groups=2, **case.options) as probe:
        model(torch.randn(SAMPLES, *case.shape)).square().mean().backward()
        probe.step()
    records = {record.module: record for record in read_spectral(tmp_path).records}
    assert set(records) == set(case.sites)
    for path, record in records.items():
        assert record.num_tokens == len(seen[path]) == SAMPLES * case.rows_of_a_sample
        assert record.num_sequences == SAMPLES
        assert record.bucket == "pooled"
        eigenvalues = torch.linalg.eigvalsh(torch.cov(seen[path].T))
        expected = float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
        assert record.hard_rank == pytest.approx(expected, rel=1e-4)  # sums in fp32
        if record.num_tokens > 2 * record.width:
            assert record.hard_rank_ci_low < record.hard_rank_ci_high


def test_buckets_are_refused_where_there_are_no_ids(tmp_path):
    model = CASES["audio"].build()
    assert find_stacks(model).embedding is None
    with observe(model, 1, out=tmp_path, counts=torch.ones(9)) as probe:
        model(torch.randn(SAMPLES, 1, 60)).square().mean().backward()
        probe.step()
    records = read_spectral(tmp_path).records
    assert {record.status for record in records if record.bucket != "pooled"} == {"not_matched"}
    assert {record.num_tokens for record in records if record.bucket == "pooled"} == {SAMPLES * 12}
