"""Pure tensor functions: ranks of a spectrum, streaming moments, buckets of tokens, orthogonalisation; only torch.

Ranks of a covariance spectrum (eigenvalues, any order, shape (..., D)):

* ``spectrum``: eigenvalues of a covariance, descending, rounding below zero removed
* ``soft_rank``: effective rank, exp of the Shannon entropy, in modes (Roy and Vetterli 2007)
* ``hard_rank``: participation ratio, in modes
* ``renyi_rank``: effective rank of any Renyi order, in modes; order 1 is soft, order 2 is hard
* ``spectral_entropy``: Shannon entropy of the normalised spectrum, in nats
* ``eigenvalue_early_enrichment``: how early the variance accumulates, in [0, 1]
* ``top_share``: share of the variance in the largest eigenvalue
* ``js_divergence``: Jensen-Shannon divergence of two spectra of one width, in nats
* ``debiased_hard_rank``: hard rank with its finite-sample bias removed
* ``sampling_status``: whether there were enough tokens for the width
* ``rank_values``: every metric of ``RANK_METRICS`` and the Renyi ranks, in one pass
* ``approximate_entropy``: the entropy without an eigensolve, for wide layers

Streaming moments (rows X of shape (N, D), one row per token, G groups):

* ``empty_moments``: no rows yet
* ``update_``: add rows by group, in place
* ``merge``: moments of two sets of rows together
* ``pool``: all groups as one
* ``take_groups``: new groups made of old ones
* ``mean``: mean row of each group, shape (G, D)
* ``covariance``: centred sample covariance of a group, shape (D, D)
* ``gram``: inner products of the rows instead, for fewer rows than features
* ``sample``: the spectrum-bearing matrix of some groups, from moments or from a Gram matrix

Buckets (token ids of shape (B, T), counts of shape (V,)):

* ``frequency_buckets``: HEAD, MID or TAIL of every token id
* ``position_groups``: equal parts of the sequence
* ``target_ids``: the token that each position predicts
* ``look_up``: bucket of each token

Orthogonalisation (matrices of shape (M, N)):

* ``orthogonalize``: matrices of mixed shapes, by a named iteration or SVD
* ``newton_schulz``: approximate polar factor by a named set of polynomials
* ``polar_express``: the same with minimax coefficients (arXiv:2505.16932)
* ``polar_express_rows``: those coefficients, for any lower bound of the spectrum
* ``polar_svd``: exact polar factor by SVD
* ``polar_newton``: exact polar factor by matrix products and inversions
* ``smoothed_sign``: singular values s / sqrt(s^2 + lambda^2), by SVD
* ``smoothed_polar_newton``: the same by matrix products and inversions
* ``coefficient_set``: a named iteration with its documented band
* ``flattened_share``: share of a spectrum that an iteration brings into its band
* ``steps_to_flatten``: steps that an iteration needs for one spectrum

Spectrum of one matrix (singular values of shape (R,)):

* ``matrix_spectrum``: every measure of a matrix, from one SVD
* ``spectrum_measures``: the same, from its singular values
* ``flattening``: what an iteration makes of a matrix's spectrum
* ``spectrum_flattening``: the same, from its singular values
* ``effective_rank``, ``stable_rank``, ``condition_number``, ``top_energy``, ``quartile_ratio``, ``normalized_entropy``:
  the measures one by one
"""

from lightning_spectral.functional.approximate import approximate_entropy
from lightning_spectral.functional.buckets import frequency_buckets, look_up, position_groups, target_ids
from lightning_spectral.functional.coefficients import (
    coefficient_set,
    flattened_share,
    polar_express_rows,
    steps_to_flatten,
)
from lightning_spectral.functional.covariance import (
    covariance,
    empty_moments,
    mean,
    merge,
    pool,
    take_groups,
    update_,
)
from lightning_spectral.functional.flattening import flattening, spectrum_flattening
from lightning_spectral.functional.matrix_spectrum import (
    condition_number,
    effective_rank,
    matrix_spectrum,
    normalized_entropy,
    quartile_ratio,
    spectrum_measures,
    stable_rank,
    top_energy,
)
from lightning_spectral.functional.orthogonalize import (
    newton_schulz,
    orthogonalize,
    polar_express,
    polar_svd,
    smoothed_sign,
)
from lightning_spectral.functional.polar import polar_newton, smoothed_polar_newton
from lightning_spectral.functional.rank import (
    RANK_METRICS,
    debiased_hard_rank,
    eigenvalue_early_enrichment,
    hard_rank,
    js_divergence,
    rank_values,
    renyi_rank,
    sampling_status,
    soft_rank,
    spectral_entropy,
    spectrum,
    top_share,
)
from lightning_spectral.functional.sample import gram, sample

__all__ = [
    "RANK_METRICS",
    "approximate_entropy",
    "coefficient_set",
    "condition_number",
    "covariance",
    "debiased_hard_rank",
    "effective_rank",
    "eigenvalue_early_enrichment",
    "empty_moments",
    "flattened_share",
    "flattening",
    "frequency_buckets",
    "gram",
    "hard_rank",
    "js_divergence",
    "look_up",
    "matrix_spectrum",
    "mean",
    "merge",
    "newton_schulz",
    "normalized_entropy",
    "orthogonalize",
    "polar_express",
    "polar_express_rows",
    "polar_newton",
    "polar_svd",
    "pool",
    "position_groups",
    "quartile_ratio",
    "rank_values",
    "renyi_rank",
    "sample",
    "sampling_status",
    "smoothed_polar_newton",
    "smoothed_sign",
    "soft_rank",
    "spectral_entropy",
    "spectrum",
    "spectrum_flattening",
    "spectrum_measures",
    "stable_rank",
    "steps_to_flatten",
    "take_groups",
    "target_ids",
    "top_energy",
    "top_share",
    "update_",
]
