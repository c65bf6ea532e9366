"""What the memory commands compute: one flat row per run, with all inputs and outputs.

A run that cannot be made (Newton on fewer items than inputs have features) is a row as well: ``status`` says
``singular``, ``reason`` why, ``count`` is null. Rows of the first versions have no ``status``: they are ``ok``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.matrix_spectrum import matrix_spectrum
from lightning_spectral.functional.orthogonalize import flattened_share
from lightning_spectral.theory import dynamics, exponents
from lightning_spectral.theory.capacity import distrust, predict
from lightning_spectral.theory.one_step import OneStep
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings, SingularInputError, settings_dict

SCHEMA_VERSION = 1
SPECTRUM_AT_MOST = 512  # from d = 1024 on the SVD of the update takes as long as the step itself
_SPECTRUM_POINTS = 48  # log-spaced singular values kept in a row, for the figure
_PREDICTED = (
    "predicted_count", "predicted_prefix", "predicted_spread", "predicted_curve_rank", "predicted_curve_recall",
)  # fmt: skip
Row = dict[str, Any]


def one_step_rows(
    problem: MemoryProblem, rules: Sequence[str], settings: RuleSettings, machine: Row, kind: str = "one-step"
) -> Iterator[Row]:
    """One step from W = 0 with each rule; embeddings and gradient are shared."""
    step = OneStep(problem, **machine)
    for rule in rules:
        row = inputs(kind, problem, rule, settings, machine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `censored` is in the row; the command says it once
            try:
                result = step.run(rule, settings)
            except SingularInputError as error:
                yield {**row, **singular(error), **theory_outputs(problem, rule, settings)}
                continue
        small = max(problem.shape) <= SPECTRUM_AT_MOST
        yield {
            **row,
            "status": "ok",
            **result.as_dict(),
            "update_spectrum": matrix_spectrum(result.update_MD).as_dict() if small else None,
            "update_singular_values": singular_values(result.update_MD) if small else None,
            **theory_outputs(problem, rule, settings),
        }


def singular(error: Exception) -> Row:
    """Outputs of a run that cannot be made."""
    return {"status": "singular", "reason": str(error), "count": None, "censored": False}


def singular_values(matrix_MD: Tensor) -> list[list[float]]:
    """``[rank, sigma / sigma_1]`` at log-spaced ranks."""
    sigma_R = torch.linalg.svdvals(matrix_MD)
    ranks = np.unique(np.round(np.geomspace(1, len(sigma_R), _SPECTRUM_POINTS)).astype(int))
    return [[int(rank), float(sigma_R[rank - 1] / sigma_R[0])] for rank in ranks]


def batch_rows(problem: MemoryProblem, rules: Sequence[str], settings: RuleSettings, machine: Row) -> Iterator[Row]:
    """One step with a sampled batch (or the population), with what the sample itself allows."""
    for row in one_step_rows(problem, rules, settings, machine, "batch"):
        yield {**row, **batch_theory(problem, row["rule"], settings)}


def batch_theory(problem: MemoryProblem, rule: str, settings: RuleSettings) -> Row:
    """What theory says of a batch, or of the batch that a population row is to be reached with."""
    row: Row = {}
    if problem.batch_size is None:
        row["predicted_critical_batch"] = _critical_batch(replace(problem, seed=0), rule, settings)
    else:
        row["expected_distinct"] = exponents.expected_distinct(problem.alpha, problem.n_items, problem.batch_size)
    row["asymptotic_critical_batch_exponent"] = (
        exponents.critical_batch_exponent(rule, problem.alpha) if _has_law(problem, rule) else None
    )
    return row


def step_rows(
    problem: MemoryProblem, rules: Sequence[str], settings: RuleSettings, machine: Row, run: Row
) -> Iterator[Row]:
    """Several steps; one row per step."""
    deflation = run["mode"] == "deflation"
    for rule in rules:
        row = {
            **inputs("steps", problem, rule, settings, machine),
            "mode": run["mode"],
            "steps": run["steps"],
            "step_scale": None if deflation else run["step_scale"],
            "schedule": None if deflation else run["schedule"],
        }
        try:
            results = dynamics.run(problem, rule, settings=settings, **run, **machine)
        except SingularInputError as error:
            yield {**row, "step": None, **singular(error)}
            continue
        predicted = _deflation(_drawn(problem), rule, len(results), settings) if deflation and results else None
        first = theory_outputs(problem, rule, settings)
        law = deflation and _has_law(problem, rule) and problem.batch_size is None
        for result in results:
            yield {
                **row,
                "status": "ok",
                "step": result.step,
                "count": result.count,
                "predicted_count": predicted[result.step - 1] if predicted else None,
                "predicted_spread": None,
                "prediction_trusted": bool(predicted) and first["prediction_trusted"],
                "prediction_note": first["prediction_note"] if deflation else "no prediction of exact dynamics",
                "information_limit": exponents.information_limit(min(problem.shape), problem.n_items),
                "asymptotic_exponent": exponents.multi_step_exponent(rule, problem.alpha, result.step) if law else None,
                **result.outputs,
            }


def newton_schulz_rows(
    problem: MemoryProblem, sets: Sequence[str], steps: Sequence[int], dtypes: Sequence[str], machine: Row
) -> Iterator[Row]:
    """Capacity that is left after k steps of each coefficient set, beside the exact polar factor's."""
    step = OneStep(problem, **machine)
    sigma = torch.linalg.svdvals(step.gradient.matrix_MD).cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = step.run("muon").stats.count
        for name in sets:
            for ns_steps in steps:
                share = float(flattened_share(sigma, name, ns_steps, band=(0.65, 1.35)))
                for dtype in dtypes:
                    settings = RuleSettings(coefficients=name, ns_steps=ns_steps, ns_dtype=dtype)
                    result = step.run("ns", settings)
                    yield {
                        **inputs("newton-schulz", problem, "ns", settings, machine),
                        "status": "ok",
                        **result.as_dict(),
                        **theory_outputs(problem, "ns", settings),
                        "exact_count": exact,
                        "capacity_share": result.stats.count / exact if exact else None,
                        "flattened_share": share,
                        "smallest_singular_value": float(sigma[-1] / torch.linalg.vector_norm(sigma)),
                        "steps_for_capacity": _steps_needed(problem, name),
                    }


def theory_rows(problem: MemoryProblem, rules: Sequence[str], settings: RuleSettings, steps: int) -> Iterator[Row]:
    """Predictions only: nothing is simulated."""
    for rule in rules:
        law = _has_law(problem, rule)
        sampled = problem.batch_size is not None
        row = {
            **inputs("theory", problem, rule, settings, {}),
            **theory_outputs(problem, rule, settings),
            "predicted_critical_batch": _critical_batch(replace(problem, batch_size=None), rule, settings),
            "asymptotic_critical_batch_exponent": exponents.critical_batch_exponent(rule, problem.alpha)
            if law
            else None,
            "steps": steps,
            "predicted_d_t": _deflation(_drawn(problem), rule, steps, settings) if steps else None,
            "information_limit": exponents.information_limit(min(problem.shape), problem.n_items),
            "asymptotic_e_t": [exponents.multi_step_exponent(rule, problem.alpha, t + 1) for t in range(steps)]
            if law and not sampled
            else None,
        }
        if problem.batch_size is not None:
            row["expected_distinct"] = exponents.expected_distinct(problem.alpha, problem.n_items, problem.batch_size)
        yield row


def inputs(kind: str, problem: MemoryProblem, rule: str, settings: RuleSettings, machine: Row) -> Row:
    """Inputs of a row: all fields of the problem, the rule with the settings that it used, the machine."""
    used = settings_dict(rule, settings, problem)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        **problem.as_dict(),
        "rule": rule,
        "rule_label": label(rule, used),
        "settings": used,
        "device": machine.get("device"),
        "chunk_size": machine.get("chunk_size"),
    }


def label(rule: str, used: Row) -> str:
    """Short name that tells settings apart: ``muon``, ``muon lam=0.01``, ``ns5``, ``ns7 polar_express bf16``."""
    parts = [f"ns{used['ns_steps']}" if "ns_steps" in used else rule]
    if used.get("lam_scale"):
        parts.append(f"lam={used['lam_scale']:g} p1 d^-a")
    elif used.get("lam"):
        parts.append(f"lam={used['lam']:g}")
    if used.get("coefficients", "muon") != "muon":
        parts.append(used["coefficients"])
    if used.get("ns_dtype") == "bfloat16":
        parts.append("bf16")
    if "power" in used:
        parts = [f"power{used['power']:g}"]
    if used.get("ridge"):
        parts.append(f"ridge={used['ridge']:g}")
    return " ".join(parts)


def theory_outputs(problem: MemoryProblem, rule: str, settings: RuleSettings) -> Row:
    """Predicted count and curve, the limiting power law, and whether the prediction is one that met simulations."""
    prediction = _predict(_drawn(problem), rule, settings)
    outputs: Row = prediction.as_dict() if prediction is not None else dict.fromkeys(_PREDICTED)
    note = distrust(problem, rule, settings, prediction)
    outputs["prediction_trusted"], outputs["prediction_note"] = note is None, note
    law = _has_law(problem, rule) and problem.batch_size is None
    outputs["asymptotic_exponent"] = exponents.one_step_exponent(rule, problem.alpha) if law else None
    outputs["asymptotic_count"] = (
        exponents.asymptotic_count(rule, problem.alpha, problem.d, problem.n_items) if law else None
    )
    return outputs


def _has_law(problem: MemoryProblem, rule: str) -> bool:
    """The paper's exponents are for alpha > 1, a square W, and isotropic inputs (which Newton cannot tell)."""
    isotropic = problem.anisotropy == 0 or rule == "newton"
    return problem.alpha > 1 and problem.shape[0] == problem.shape[1] and isotropic


def _drawn(problem: MemoryProblem) -> MemoryProblem:
    """What a prediction depends on: the seed only where a batch is drawn with it."""
    return problem if problem.batch_size is not None else replace(problem, seed=0)


def _steps_needed(problem: MemoryProblem, coefficients: str) -> int | None:
    from lightning_spectral.theory.rules import steps_for_capacity

    try:
        return steps_for_capacity(min(problem.shape), problem.alpha + problem.anisotropy / 2, coefficients)
    except RuntimeError:
        return None


# predictions do not depend on the seed (batches: on the drawn counts alone), so the seeds share them
_predict = lru_cache(maxsize=512)(predict)
_critical_batch = lru_cache(maxsize=128)(exponents.critical_batch)


@lru_cache(maxsize=128)
def _deflation(problem: MemoryProblem, rule: str, steps: int, settings: RuleSettings) -> tuple[float, ...] | None:
    made = exponents.predict_deflation(problem, rule, steps, settings)
    return None if made is None else tuple(made)
