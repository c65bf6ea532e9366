from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from lightning_spectral.functional.buckets import sort_by_group
from lightning_spectral.functional.covariance import empty_moments, update_
from lightning_spectral.metrics import SpectralRank, StreamingCovariance, streaming
from lightning_spectral.probe.loss_calls import Scored
from lightning_spectral.probe.losses import BucketLosses
from lightning_spectral.probe.ranks_of import measure


def test_covariance_by_group_in_any_batches():
    rows, groups = torch.randn(300, 6, dtype=torch.float64), torch.randint(-1, 3, (300,))
    metric = StreamingCovariance(width=6, num_groups=3, dtype=torch.float64)
    for part in torch.arange(300).split(37):
        metric.update(rows[part], groups[part])
    ours = metric.compute()
    for group in range(3):
        oracle = np.cov(rows[groups == group].numpy(), rowvar=False)
        np.testing.assert_allclose(ours[group].numpy(), oracle, rtol=1e-10, atol=1e-12)


def test_one_group_and_fp32_unless_said():
    metric = StreamingCovariance(width=3)
    metric.update(torch.eye(3))
    covariance = metric.compute()
    assert covariance.shape == (1, 3, 3)
    assert metric.scatter_GP.dtype == torch.float32
    torch.testing.assert_close(covariance[0], torch.eye(3, dtype=torch.float64) / 2 - 1 / 6)


def test_reset_and_pickle():
    metric = SpectralRank(width=4)
    metric.update(torch.randn(50, 4))
    again = pickle.loads(pickle.dumps(metric))
    assert again.compute()["soft_rank"] == metric.compute()["soft_rank"]
    metric.reset()
    assert float(metric.count_G.sum()) == 0


def test_a_forward_pass_sees_its_batch_once_and_adds_it_to_the_rest():
    """``full_state_update`` would run every product twice; what is measured has no gradient, and says so."""
    seen = []

    class Counting(StreamingCovariance):
        def update(self, rows_ND, groups_N=None):
            seen.append(len(rows_ND))
            super().update(rows_ND, groups_N)

    metric = Counting(width=3)
    rows = torch.randn(12, 3, requires_grad=True)
    metric.update(rows[:5])
    batch = metric(rows[5:])
    assert seen == [5, 7]
    torch.testing.assert_close(batch[0], rows[5:].detach().double().T.cov(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric.compute()[0], rows.detach().double().T.cov(), rtol=1e-5, atol=1e-6)
    assert metric.is_differentiable is batch.requires_grad is False
    other = Counting(width=3)
    other.update(rows[:5])
    metric.merge_state(other)
    expected = torch.cat([rows, rows[:5]]).detach().double().T.cov()
    torch.testing.assert_close(metric.compute()[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [None, "call's"])
def test_ranks_are_added_in_the_group_that_was_named_last(given, monkeypatch):
    added = []
    monkeypatch.setattr(streaming, "reduce_", lambda moments, process_group: added.append((moments, process_group)))
    metric = StreamingCovariance(width=3, process_group="metric's")
    metric._sync_dist(process_group=given)
    ((moments, group),) = added
    assert group == (given or "metric's")
    assert moments.scatter_GP is metric.scatter_GP  # in place


def test_rows_without_a_valid_group_are_refused():
    metric = StreamingCovariance(width=2, num_groups=2)
    with pytest.raises(ValueError, match=r"largest group 2"):
        metric.update(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="one group"):
        metric.update(torch.zeros(3, 2), torch.tensor([0, 1]))


def test_sorting_drops_the_excluded_and_spares_one_group_the_sort():
    sizes, order = sort_by_group(torch.tensor([1, -1, 0, 1, 0]), 3)
    assert (sizes, order.tolist()) == ([2, 2, 0], [2, 4, 0, 3])
    assert sort_by_group(torch.tensor([1, 1]), 3) == ([0, 2, 0], None)
    with pytest.raises(ValueError, match=r"\[0, 3\), got a largest group 3"):
        sort_by_group(torch.tensor([1, 3]), 3)


def moments_of_shards(rows: torch.Tensor, num_jackknife_groups: int):
    moments = empty_moments(num_jackknife_groups, rows.shape[1], dtype=torch.float64)
    shards = torch.arange(len(rows)) * num_jackknife_groups // len(rows)
    update_(moments, rows, *sort_by_group(shards, num_jackknife_groups))
    return moments


def test_shards_do_not_change_the_rank():
    rows = torch.randn(2000, 12, dtype=torch.float64) * torch.linspace(1, 3, 12)
    whole, split = measure(moments_of_shards(rows, 1)), measure(moments_of_shards(rows, 5), range(5))
    assert split.hard_rank == pytest.approx(whole.hard_rank, rel=1e-10)
    assert split.soft_rank == pytest.approx(whole.soft_rank, rel=1e-10)
    assert whole.hard_rank_ci is None
    assert split.hard_rank_ci[0] < split.hard_rank < split.hard_rank_ci[1]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """100 sequences of 8 equal-mean tokens each: rows within a sequence are correlated, shards are not."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 3, 8, dtype=torch.float64)
    truth = float((2 * scale**2).sum() ** 2 / (2 * scale**2).square().sum())
    hits, reps = 0, 60
    for _ in range(reps):
        shared = torch.randn(100, 1, 8, generator=generator, dtype=torch.float64)
        own = torch.randn(100, 8, 8, generator=generator, dtype=torch.float64)
        rows = ((shared + own) * scale).flatten(0, 1)
        low, high = measure(moments_of_shards(rows, 10), range(10)).hard_rank_ci
        hits += low <= truth <= high
    # finite-sample bias (1/PR_N = 1/PR + 1/N, N effective about 100-400) costs a few points of 95 %
    assert 0.80 <= hits / reps <= 1.0


def test_half_split_correction_removes_most_of_the_soft_ranks_bias():
    generator = torch.Generator().manual_seed(1)
    width, scale = 64, torch.arange(1, 65, dtype=torch.float64) ** -0.25
    p = scale**2 / (scale**2).sum()
    truth = float(torch.exp(-(p * p.log()).sum()))
    plain, corrected = [], []
    for _ in range(8):
        rows = torch.randn(2 * width, width, generator=generator, dtype=torch.float64) * scale
        result = measure(moments_of_shards(rows, 2), range(2))
        plain.append(result.soft_rank / truth)
        corrected.append(result.soft_rank_debiased / truth)
    assert np.mean(plain) < 0.90
    assert 0.97 < np.mean(corrected) < 1.03


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        (torch.zeros(0, 4), "empty"),
        (torch.zeros(1, 4), "degenerate"),
        (torch.ones(50, 4), "degenerate"),
        (torch.full((50, 4), torch.nan), "nonfinite"),
        (torch.randn(50, 4), "few_tokens"),
    ],
)
def test_bad_data_is_a_status(rows, status):
    result = measure(moments_of_shards(rows.double(), 1))
    assert result.status == status
    assert (result.hard_rank is None) == (status != "few_tokens")


def test_bucket_losses_equal_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    codes = torch.randint(-1, 2, (3, 7), generator=generator)
    targets[0, 0] = -100
    scored = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    right = (logits.argmax(-1) == targets).flatten()
    codes_N = torch.where(targets.flatten() >= 0, codes.flatten(), -1)
    losses = BucketLosses(2)
    for part in (slice(0, 14), slice(14, None)):
        ones = torch.ones(len(right[part]), dtype=torch.float64)
        losses.add(Scored(scored[part].double(), right[part].double(), ones, targets.flatten()[part]), codes_N[part])
    names = ("a", "b", "pooled")
    for code, found in enumerate(losses.result(names)[:2]):
        count, loss, accuracy = found.num_tokens, found.loss, found.accuracy
        chosen = (codes == code) & (targets >= 0)
        assert count == int(chosen.sum())
        assert loss == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits[chosen], targets[chosen])), rel=1e-6
        )
        assert accuracy == pytest.approx(float((logits[chosen].argmax(-1) == targets[chosen]).double().mean()))
    assert losses.result(names)[2].num_tokens == int(((codes >= 0) & (targets >= 0)).sum())
    assert [found.status for found in BucketLosses(1).result(("a", "pooled"))] == ["not_matched"] * 2


def test_a_loss_that_is_no_number_says_so():
    """Class weights of zero were a division by zero, a diverged loss was `ok`."""
    losses = BucketLosses(3)
    ones, ids = torch.ones(3, dtype=torch.float64), torch.tensor([0, 1, 2])
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    losses.add(Scored(torch.tensor([2.0, 0.0, math.nan], dtype=torch.float64), ones, weights, ids), ids)
    found = losses.result(("a", "b", "c", "pooled"))
    assert [(one.status, one.num_tokens) for one in found] == [
        ("ok", 1), ("degenerate", 1), ("nonfinite", 1), ("nonfinite", 3)
    ]  # fmt: skip
    assert (found[0].loss, found[1].loss, found[1].accuracy) == (2.0, None, 1.0)
