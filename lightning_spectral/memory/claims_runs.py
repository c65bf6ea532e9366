"""The runs behind ``memory claims``: each sentence gets sizes enough for a line, as far as the time goes.

SGD is run through its Gram matrices, so that its exponent is measured where it has one (d = 1,024 and above); Muon and
Newton with all their embeddings. Every cell has seeds of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from lightning_spectral.memory import runs as memory_runs
from lightning_spectral.memory.reproduce import Part
from lightning_spectral.theory.gram import sgd_recovered
from lightning_spectral.theory.one_step import OneStep
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings
from lightning_spectral.theory.spectrum import GradientSpectrum, bin_weights

Row = dict[str, Any]
ALPHA = 1.5
CAPACITY_D = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
GRAM_D = (256, 512, 1024, 2048, 4096, 8192, 16384)
GRAM_SEEDS, SEEDS = 20, 4
SMALL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BETAS = (0.0, 0.5, 0.75, 1.0, 1.5)
_HEADS_AT_LEAST, _HEADS_OF_COUNT = 256, 4  # an item at four times the count has (1/4)^alpha of the signal it needs


def gram_rows(problem: MemoryProblem, kind: str = "one-step") -> Iterator[Row]:
    """One SGD step through its Gram matrices; ``method`` says so."""
    settings = RuleSettings()
    theory = memory_runs.theory_outputs(problem, "sgd", settings)
    heads = max(_HEADS_AT_LEAST, round(_HEADS_OF_COUNT * (theory["predicted_count"] or 0.0)))
    row = {
        **memory_runs.inputs(kind, problem, "sgd", settings, {}),
        "method": "gram",
        "status": "ok",
        "count": int(sgd_recovered(problem, heads).sum()),
        "distinct": int((problem.gradient_weights() > 0).sum()),
        "censored": False,
        **theory,
    }
    if kind == "batch":
        row |= memory_runs.batch_theory(problem, "sgd", settings)
    yield row


def amplification_rows(problem: MemoryProblem) -> Iterator[Row]:
    """Signal of the items just out of reach, over its noise, under Muon as a factor of that under SGD.

    Ranks from 1 to 3 times Muon's predicted count: mean signal over the spread of all other scores of those items.
    """
    step = OneStep(problem)
    frequencies = problem.frequencies()
    settings = RuleSettings()
    muon = memory_runs.theory_outputs(problem, "muon", settings)["predicted_count"]
    first, last = round(muon), min(3 * round(muon), problem.n_items)
    embeddings = step.embeddings
    u_CM, v_CD = (embeddings.rows(side, first, last).double() for side in ("u", "v"))  # type: ignore[arg-type]
    own_share_C = torch.from_numpy(frequencies[first:last]) * u_CM.square().sum(1) * v_CD.square().sum(1)
    ratio = {}
    for rule in ("sgd", "muon"):
        image_CM = v_CD @ step.run(rule).update_MD.mT
        # SGD's signal is too small to be seen in one item's score, but known: the item's own term of the sum
        signal_C = own_share_C if rule == "sgd" else (u_CM * image_CM).sum(1)
        # a rival's score is u . W v with u ~ N(0, I/M): its spread is |W v| / sqrt(M)
        noise_C = image_CM.norm(dim=1) / problem.shape[0] ** 0.5
        ratio[rule] = float(signal_C.mean() / noise_C.pow(2).mean().sqrt())
    spectrum = GradientSpectrum(bin_weights(frequencies), problem.input_scales(), problem.shape[0])
    effect = spectrum.smoothed(0.0)
    signal = spectrum.bins.spread(effect.signal[:-1], 0.0)[first:last].mean() * problem.d**0.5
    sgd = frequencies[first:last].mean() * problem.d / np.sqrt((frequencies**2).sum())
    yield {
        **memory_runs.inputs("amplification", problem, "muon", settings, {}),
        "status": "ok",
        "count": ratio["muon"] / ratio["sgd"],
        "signal_to_noise": ratio,
        "ranks": [first + 1, last],
        "predicted_count": float(signal / sgd),
        "asymptotic_exponent": problem.alpha - 0.5,
    }


def _muon_batches(d: int) -> list[Row]:
    """Powers of two from a sixteenth to eight times of about where Muon saturates, and the population."""
    middle = round(math.log2(d**2 / 20))
    return [{"d": d, "batch_size": size} for size in (*(2**k for k in range(middle - 4, middle + 4)), None)]


def plan(n_items: int, first_seed: int, machine: Row) -> list[Part]:
    """Parts of the claims and their sizes."""
    make = _Sizes(n_items, first_seed, machine)
    dimensions = [d for d in CAPACITY_D if 3 * 0.22 * d ** (4 / 3) <= n_items or d <= 256]
    both, muon = make.one_step(("muon", "newton")), make.batches(("muon",))
    return [
        Part("capacity of Muon and Newton", 0.32, 2.5, [make.of("capacity", [{"d": d}], both) for d in dimensions]),
        Part("capacity of SGD", 0.10, 1.2, [make.of("capacity", [{"d": d}], gram_rows, GRAM_SEEDS) for d in GRAM_D]),
        Part("critical batch of Muon", 0.12, 1.8,
             [make.of("batch", _muon_batches(d), muon) for d in (64, 96, 128, 192, 256)]),
        Part("critical batch of SGD", 0.08, 1.2,
             [make.of("batch", [{"d": d, "batch_size": b} for b in (*SMALL_BATCHES, None)],
                       partial(gram_rows, kind="batch"), GRAM_SEEDS) for d in (256, 768, 2048, 6144, 16384)]),
        Part("deflation", 0.16, 1.8,
             [make.of("deflation", [{"d": d}], make.steps("deflation", 8)) for d in (64, 96, 128, 192, 256)]),
        Part("exact steps", 0.12, 5.0,
             [make.of("exact", [{"d": d, "n_items": d * d}], make.steps("exact", 20))
              for d in (16, 24, 32, 48, 64, 96)]),
        Part("amplification", 0.05, 2.0,
             [make.of("amplification", [{"d": d}], amplification_rows) for d in (128, 192, 256, 384, 512, 768)]),
        Part("anisotropy", 0.05, 3.0,
             [make.of("anisotropy", [{"d": d, "anisotropy": beta} for beta in BETAS], both) for d in (128, 256)]),
    ]  # fmt: skip


class _Sizes:
    """Makes the runs of each size; every setting takes the next seeds."""

    def __init__(self, n_items: int, first_seed: int, machine: Row) -> None:
        self.n_items, self.first_seed, self.machine = n_items, first_seed, machine
        self.settings, self.taken = RuleSettings(), itertools.count()

    def of(
        self, part: str, settings_of: Sequence[Row], make: Callable[[MemoryProblem], Iterator[Row]], seeds: int = SEEDS
    ) -> Callable[[], Iterator[Row]]:
        """One size: every setting with seeds of its own."""
        firsts = [self.first_seed + GRAM_SEEDS * next(self.taken) for _ in settings_of]

        def rows() -> Iterator[Row]:
            for seed in range(seeds):
                for first, fields in zip(firsts, settings_of, strict=True):
                    whole = {"n_items": self.n_items, "alpha": ALPHA, **fields, "seed": first + seed}
                    for row in make(MemoryProblem(**whole)):
                        yield {**row, "part": part}

        return rows

    def one_step(self, rules: tuple[str, ...]) -> Callable[[MemoryProblem], Iterator[Row]]:
        """One step of each rule."""
        return lambda problem: memory_runs.one_step_rows(problem, rules, self.settings, self.machine)

    def batches(self, rules: tuple[str, ...]) -> Callable[[MemoryProblem], Iterator[Row]]:
        """One step of each rule from a sampled batch."""
        return lambda problem: memory_runs.batch_rows(problem, rules, self.settings, self.machine)

    def steps(self, mode: str, number: int) -> Callable[[MemoryProblem], Iterator[Row]]:
        """Several steps of SGD and Muon."""
        run = {"steps": number, "mode": mode, "step_scale": 2.0, "schedule": "linear"}
        small = {**self.machine, "chunk_size": 1024}
        return lambda problem: memory_runs.step_rows(problem, ("sgd", "muon"), self.settings, small, run)
