import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional.flattening import flattening, spectrum_flattening
from lightning_spectral.functional.orthogonalize import (
    COEFFICIENTS,
    apply_to_singular_values,
    coefficient_rows,
    coefficient_set,
    flattened_share,
    newton_schulz,
    normalize_singular_values,
    orthogonalize,
    polar_express,
    polar_express_rows,
    polar_svd,
    smoothed_sign,
    steps_to_flatten,
    turbo,
    turbo_rows,
)

SHAPES = [(8, 8), (16, 64), (64, 16), (128, 512), (256, 256), (256, 1024), (1024, 256)]


def matrix_with(spectrum: str, m: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if spectrum == "gaussian":
        return gaussian
    left, _, right = torch.linalg.svd(gaussian, full_matrices=False)
    rank = min(m, n)
    sigma = {
        "power_law": 1 / torch.arange(1, rank + 1, dtype=torch.float64),
        "kappa_1e4": torch.logspace(0, -4, rank, dtype=torch.float64),
        "kappa_10": torch.logspace(0, -1, rank, dtype=torch.float64),
    }[spectrum]
    return left * sigma @ right


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_resolved_singular_value_ends_in_the_documented_band(name):
    chosen = COEFFICIENTS[name]
    sigma = torch.logspace(math.log10(chosen.resolves), 0, 200_001, dtype=torch.float64).clamp(max=1.0)
    image = apply_to_singular_values(name, None, sigma)
    low, high = chosen.band
    assert low <= image.min()
    assert image.max() <= high
    # `resolves` is not needlessly high: a twentieth below it is outside the band
    assert float(apply_to_singular_values(name, None, torch.tensor(0.95 * chosen.resolves).double())) < low


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["gaussian", "power_law", "kappa_1e4"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_values_of_the_result_follow_the_scalar_map(name, spectrum, shape):
    matrix = matrix_with(spectrum, *shape)
    result = newton_schulz(matrix, name, steps=None, dtype=torch.float32)
    entering = normalize_singular_values(torch.linalg.svdvals(matrix), name)
    expected = apply_to_singular_values(name, None, entering).sort(descending=True).values
    found = torch.linalg.svdvals(result.double())
    # fp32: 1e-7 per product, amplified by the slope at zero (8 * 4^4 for five steps, 3.4^8 for ten)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    low, high = COEFFICIENTS[name].band
    resolved = (entering >= COEFFICIENTS[name].resolves).double().mean()
    assert float(((found > low - 2e-3) & (found < high + 2e-3)).double().mean()) >= float(resolved) - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["gaussian", "power_law", "kappa_1e4"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_band_holds_at_768_by_3072(name, spectrum):
    test_singular_values_of_the_result_follow_the_scalar_map(name, spectrum, (768, 3072))


@pytest.mark.parametrize(
    ("spectrum", "shape"), [("gaussian", (256, 1024)), ("power_law", (256, 1024)), ("kappa_10", (96, 96))]
)
def test_six_polar_express_steps_reach_the_polar_factor(spectrum, shape):
    matrix = matrix_with(spectrum, *shape)
    assert distance(polar_express(matrix, 6, torch.float32), polar_svd(matrix)) < 1e-3


@pytest.mark.parametrize("spectrum", ["gaussian", "power_law"])
def test_the_schatten_normaliser_beats_the_frobenius_one_at_equal_steps(spectrum):
    matrix = matrix_with(spectrum, 256, 512)
    exact = polar_svd(matrix)
    tight, loose = (
        distance(newton_schulz(matrix, name, 5), exact) for name in ("polar_express", "polar_express_frobenius")
    )
    assert tight < 0.6 * loose


def test_cans_is_the_widest_interval_that_five_steps_bring_into_its_band():
    """Both ends of its band are reached, and small values are lifted further than by sets with a narrower one."""
    rows = coefficient_rows("cans")
    slope = math.prod(a for a, _, _ in rows)
    assert slope > math.prod(a for a, _, _ in coefficient_rows("polar_express_frobenius"))  # a wider band lifts further
    assert slope > 3.4445**5
    image = apply_to_singular_values("cans", 5, torch.linspace(5.3e-4, 1, 400_001, dtype=torch.float64))
    assert float(image.min()) == pytest.approx(0.7, abs=2e-3)
    assert float(image.max()) == pytest.approx(1.3, abs=2e-3)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
@pytest.mark.parametrize("spectrum", ["gaussian", "power_law"])
def test_turbo_is_the_polar_factor_of_the_preconditioned_matrix(spectrum, shape):
    matrix = matrix_with(spectrum, *shape)
    wide = matrix if shape[0] <= shape[1] else matrix.mT
    scaled = wide / (wide @ wide.mT).abs().sum(1, keepdim=True).sqrt()
    sigma = torch.linalg.svdvals(scaled)
    assert sigma[0] <= 1  # Gershgorin
    result = turbo(matrix)
    result = result if shape[0] <= shape[1] else result.mT
    image = apply_rows(turbo_rows(), sigma)
    u, _, v = torch.linalg.svd(scaled, full_matrices=False)
    torch.testing.assert_close(result, u @ image.diag() @ v, rtol=0, atol=1e-9)
    assert float((image[sigma >= 6.1e-3] - 1).abs().max()) <= 0.06
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(turbo(matrix * scale), turbo(matrix), rtol=1e-9, atol=1e-12)


def apply_rows(rows, sigma):
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def test_turbo_is_closer_than_five_steps_where_rows_are_nearly_orthogonal():
    matrix = matrix_with("gaussian", 64, 1024)
    exact = polar_svd(matrix)
    assert distance(turbo(matrix), exact) < distance(newton_schulz(matrix, "polar_express_frobenius"), exact)


def test_bf16_stays_near_the_band():
    for spectrum in ("gaussian", "power_law"):
        result = polar_express(matrix_with(spectrum, 256, 1024).float(), 5, torch.bfloat16)
        sigma = torch.linalg.svdvals(result.double())
        assert sigma.max() < 1.06 + 0.02  # bf16 keeps 8 bits: 2^-8 per product, three products in the last step
        assert sigma.min() > 0.94 - 0.02


PAIRED = [(24, 60), (60, 24), (3, 24, 60), (3, 60, 24)]  # one side at least twice the other


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("steps", range(7))
@pytest.mark.parametrize("shape", PAIRED)
@pytest.mark.parametrize("name", ["polar_express", "muon", "cans", "cubic"])
def test_two_steps_on_one_gram_matrix_are_two_steps(name, shape, steps, overwrite):
    """In fp64 the product form equals the definition, one row of coefficients after another."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = newton_schulz(matrix, name, 0)
    if coefficient_set(name).normalizer == "schatten4" and steps:
        gram = expected @ expected.mT
        expected = expected / gram.square().sum((-2, -1), keepdim=True) ** 0.25
    for a, b, c in coefficient_rows(name, steps):
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    found = newton_schulz(matrix.clone(), name, steps, overwrite=overwrite)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("shape", "pairs"), [((8, 15), 0), ((8, 16), 2), ((16, 8), 2), ((8, 17), 2), ((8, 8), 0)])
def test_steps_share_a_gram_matrix_from_a_side_of_twice_the_other_on(shape, pairs, monkeypatch):
    iteration = import_module("lightning_spectral.functional.iteration")
    calls, two_steps = [], iteration._two_steps
    monkeypatch.setattr(iteration, "_two_steps", lambda *given: calls.append(1) or two_steps(*given))
    newton_schulz(torch.randn(shape), "muon", 5)
    assert len(calls) == pairs  # of five steps the first goes alone


def hard_matrix(kind: str) -> torch.Tensor:
    """128 x 512 matrices on which three steps on one Gram matrix in bf16 end far outside the band, or nearly so."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(128, 512, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    order = torch.arange(1, 129, dtype=torch.float64)
    return {
        "slow decay": left * order**-1 @ right,
        "fast decay": left * order**-2 @ right,
        "half rank": noise[:, :64] @ right[:64],
        "one direction": 30 * left[:, :1] @ right[:1] + 1e-3 * noise,
        "two large rows": torch.cat([100 * noise[:2], noise[2:]]),
        "dead rows": torch.cat([noise[:32], torch.zeros(96, 512)]),
        "nearly constant": 1 + 0.01 * noise,
        "orthogonal": left @ right,
    }[kind]


@pytest.mark.parametrize("steps", [5, 8])
@pytest.mark.parametrize(
    "kind",
    [
        "slow decay",
        "fast decay",
        "half rank",
        "one direction",
        "two large rows",
        "dead rows",
        "nearly constant",
        "orthogonal",
    ],
)
def test_pairs_in_bf16_stay_in_the_band_where_eigenvalues_turn_negative(kind, steps):
    matrix = hard_matrix(kind)
    paired, alone = (newton_schulz(matrix, "polar_express", steps, torch.bfloat16, eps=eps) for eps in (0.0, 1e-30))
    assert float(torch.linalg.matrix_norm(paired.double(), 2)) < 1.06 + 0.03
    exact = polar_svd(matrix)
    assert distance(paired.double(), exact) < distance(alone.double(), exact) + 0.03


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16), (1, 9), (96, 40), (256, 64), (300, 7)])
@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-5, 1.0, 1e15])
def test_muon_with_eps_equals_torch_bit_for_bit_at_every_scale_and_tall(shape, scale):
    from torch.optim._muon import _zeropower_via_newtonschulz

    for seed in range(3):
        matrix = matrix_with("gaussian", *shape, seed=seed).float() * scale
        theirs = _zeropower_via_newtonschulz(matrix.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert torch.equal(newton_schulz(matrix, "muon", 5, torch.bfloat16, eps=1e-7), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_no_scale_of_the_input_changes_a_digit_or_gives_nan(name, dtype):
    matrix = matrix_with("gaussian", 12, 20).to(dtype)
    expected = newton_schulz(matrix, name, steps=None)
    stacked = newton_schulz(torch.stack([matrix, matrix]), name, steps=None)
    for exponent in (-149, -148, -140, -133, -100, -60, -30, 0, 30, 60, 100, 120):
        scaled = (matrix.double() * 2.0**exponent).to(dtype)
        one, two = newton_schulz(scaled, name, None), newton_schulz(torch.stack([scaled, matrix]), name, None)
        assert one.isfinite().all()
        assert two.isfinite().all()
        if exponent > -100:  # below, entries become subnormal and lose digits
            assert torch.equal(one, expected)
            assert torch.equal(two, stacked)
    assert not newton_schulz(torch.zeros(4, 4, dtype=dtype), name).any()


def test_scaling_on_a_device_that_must_not_be_asked_gives_the_same_digits(monkeypatch):
    module = import_module("lightning_spectral.functional.orthogonalize")  # not the function of that name

    matrix = matrix_with("gaussian", 12, 20).float()
    expected = newton_schulz(matrix, "muon")
    monkeypatch.setattr(module, "_SAFE_NORMS", (math.inf, 0.0))
    assert torch.equal(newton_schulz(matrix, "muon"), expected)
    assert torch.equal(newton_schulz(matrix.clone(), "muon", overwrite=True), expected)


def test_polar_express_rows_are_minimax_and_nested():
    rows = polar_express_rows(8)
    assert polar_express_rows(5) == rows[:5]
    # the published first row for l = 1e-3 without the safety margin, arXiv:2505.16932
    assert polar_express_rows(1, safety=1.0, cushion=0.02407327424182761)[0] == pytest.approx(
        (8.28721201814563, -23.595886519098837, 17.300387312530933), rel=1e-6
    )
    # equal error at both ends of the reachable interval: nothing better exists for an odd quintic
    image = apply_to_singular_values(
        "polar_express_frobenius", 5, torch.linspace(1e-3, 1, 100_001, dtype=torch.float64)
    )
    assert float(1 - image.min()) == pytest.approx(float(image.max() - 1), abs=1e-6)


@pytest.mark.parametrize("method", [*COEFFICIENTS, "turbo", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_matrices(method, dtype):
    shapes = [(5, 7), (1, 9), (9, 1), (1, 1), (3, 400), (400, 3)]
    zeros = orthogonalize([torch.zeros(s, dtype=dtype) for s in shapes], method)
    assert all(torch.equal(z, torch.zeros_like(z)) for z in zeros)
    low, high = {"svd": (1.0, 1.0), "turbo": (0.94, 1.06)}.get(method) or COEFFICIENTS[method].band
    for shape in shapes[1:]:
        (result,) = orthogonalize([matrix_with("gaussian", *shape).to(dtype)], method)
        assert result.shape == shape
        sigma = torch.linalg.svdvals(result.double())
        assert low - 0.03 < sigma.min()  # bf16 products
        assert sigma.max() < high + 0.03


def test_orthogonalize_batches_like_one_by_one_and_leaves_its_input():
    matrices = [
        matrix_with("gaussian", *shape, seed=i).float() for i, shape in enumerate([*SHAPES[:4] * 3, (400, 300)])
    ]
    before = [matrix.clone() for matrix in matrices]
    together = orthogonalize(matrices, dtype=torch.float32)
    alone = orthogonalize(matrices, dtype=torch.float32, batch=False)
    for one, other, matrix, old in zip(together, alone, matrices, before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)  # fp32, another order of summation
        assert torch.equal(matrix, old)
    assert torch.equal(orthogonalize(matrices, "identity")[2], matrices[2])
    assert orthogonalize([]) == []


def test_tiny_and_huge_matrices_give_the_same_direction():
    matrix = matrix_with("gaussian", 12, 20).float()
    expected = polar_express(matrix)
    for scale in (1e-18, 1e15):
        torch.testing.assert_close(polar_express(matrix * scale), expected, atol=1e-4, rtol=0)


def test_polar_svd_and_smoothed_sign():
    matrix = matrix_with("kappa_10", 7, 12)
    exact = polar_svd(matrix)
    torch.testing.assert_close(exact @ exact.mT, torch.eye(7, dtype=torch.float64), atol=1e-12, rtol=0)
    # the polar factor maximises <X, O>: the inner product is the nuclear norm
    assert float((matrix * exact).sum()) == pytest.approx(float(torch.linalg.matrix_norm(matrix, "nuc")), rel=1e-12)
    gram = matrix @ matrix.mT
    lam = 0.3
    values, vectors = torch.linalg.eigh(gram + lam**2 * torch.eye(7, dtype=torch.float64))
    resolvent = vectors * values.rsqrt() @ vectors.mT @ matrix  # (X X^T + lam^2)^(-1/2) X
    torch.testing.assert_close(smoothed_sign(matrix, lam), resolvent, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(smoothed_sign(matrix, 0.0), exact)
    torch.testing.assert_close(smoothed_sign(matrix, 1e9) * 1e9, matrix, rtol=1e-9, atol=1e-12)
    low_rank = torch.outer(matrix[:, 0], matrix[0])
    assert int(torch.linalg.matrix_rank(polar_svd(low_rank))) == 1
    assert polar_svd(matrix.bfloat16()).dtype == torch.bfloat16


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), st.sampled_from(sorted(COEFFICIENTS)))
def test_orthogonal_changes_of_basis_commute(m, n, seed, name):
    matrix = matrix_with("gaussian", m, n, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    basis, _ = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
    rotated = newton_schulz(basis @ matrix, name, steps=None)
    torch.testing.assert_close(rotated, basis @ newton_schulz(matrix, name, steps=None), atol=1e-8, rtol=0)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
def test_rounding_noise_is_no_direction_at_any_scale(scale):
    found = spectrum_flattening(torch.tensor([1.0, 0.1, 1e-2, 1e-9, 0.0], dtype=torch.float64) * scale)
    assert found.num_nonzero == 3
    assert found == spectrum_flattening(torch.tensor([1.0, 0.1, 1e-2], dtype=torch.float64))


def test_flattened_share_and_steps():
    flat = torch.ones(64, dtype=torch.float64)
    assert float(flattened_share(flat, "polar_express")) == 1.0
    # one of four below what five steps resolve
    spectrum = torch.tensor([1.0, 0.9, 0.8, 1e-6], dtype=torch.float64)
    assert float(flattened_share(spectrum, "polar_express", 5)) == 0.75
    assert flattened_share(torch.stack([flat[:4], spectrum]), "muon", 5).tolist() == [1.0, 0.75]
    needed = steps_to_flatten(spectrum, "polar_express")
    assert needed is not None
    assert needed > 5
    assert float(flattened_share(spectrum, "polar_express", needed)) == 1.0
    assert float(flattened_share(spectrum, "polar_express", needed - 1)) < 1.0
    assert steps_to_flatten(spectrum, "polar_express", share=0.75) <= 5
    assert steps_to_flatten(torch.tensor([1.0, 0.0]), "polar_express") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: newton_schulz(torch.ones(3)), r"matrix \(\.\.\., M, N\) is needed, got shape \(3,\)"),
        (lambda: newton_schulz(torch.ones(3, 3), "nope"), "`coefficients` must be one of"),
        (lambda: newton_schulz(torch.ones(3, 3), steps=-1), "`steps` must be >= 0, got -1"),
        (lambda: orthogonalize([torch.ones(3, 3)], "nope"), "`method` must be one of"),
        (lambda: orthogonalize([torch.ones(3, 3), torch.ones(3)]), r"`matrices\[1\]` must have two dimensions"),
        (lambda: smoothed_sign(torch.ones(2, 2), -1.0), "`lam` must be >= 0"),
        (lambda: polar_svd(torch.ones(2, 2, dtype=torch.long)), "floating matrix"),
        (lambda: flattened_share(torch.tensor([-1.0]), "muon"), "finite and >= 0"),
        (lambda: steps_to_flatten(torch.ones(2, 2), "muon"), "one spectrum"),
        (lambda: steps_to_flatten(torch.ones(2), "muon", share=0.0), r"`share` must be in \(0, 1\]"),
        (lambda: coefficient_rows("svd"), "`coefficients` must be one of"),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_a_gpu_divides_by_the_same_norm_in_one_pass(monkeypatch, dtype, scale):
    """There the host may not ask whether the square of a norm is finite, so that the norm is taken in fp64."""
    matrix = (matrix_with("gaussian", 24, 40) * scale).to(dtype)
    stack = torch.stack([matrix, torch.zeros_like(matrix)])
    on_cpu = newton_schulz(stack.clone())
    monkeypatch.setattr(
        import_module("lightning_spectral.functional.orthogonalize"), "answers_at_once", lambda _: False
    )
    as_on_gpu = newton_schulz(stack.clone(), overwrite=True)
    assert as_on_gpu.dtype == dtype
    assert not as_on_gpu[1].any()
    exact = newton_schulz(matrix.double())
    assert distance(as_on_gpu[0], exact) < max(1.3 * distance(on_cpu[0], exact), 1e-5)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("steps", range(1, 7))
def test_as_many_rows_as_steps(name, steps):
    assert len(coefficient_rows(name, steps)) == steps


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_normaliser_of_tiny_singular_values_is_that_of_large_ones(name):
    """The fourth power of 1e-90 is zero in fp64."""
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(normalize_singular_values(values * 1e-90, name), normalize_singular_values(values, name))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_flattening_of_a_matrix_is_that_of_its_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(matrix.double())
    assert flattening(matrix, "muon", 5) == spectrum_flattening(values, "muon", 5)
    with pytest.raises(ValueError, match="must be a finite matrix"):
        flattening(matrix.flatten())
    with pytest.raises(ValueError, match="must be a finite matrix"):
        flattening(matrix.fill_diagonal_(math.nan))
