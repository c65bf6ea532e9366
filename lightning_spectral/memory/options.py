"""Options of ``lightning-spectral memory``: every field of a problem, a rule and a run is reachable from here."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_spectral.text import CommandError
from lightning_spectral.text.parser import VerbParser

if TYPE_CHECKING:
    from lightning_spectral.theory.problem import MemoryProblem
    from lightning_spectral.theory.rules import RuleSettings

DEFAULT_RULES = ("sgd", "muon", "ns5", "newton")


class Parser(VerbParser):
    """A parser whose ``--help`` leaves out what is seldom needed; ``--help-all`` has it.

    Args:
        full: Show everything.
        **options: As of ``argparse.ArgumentParser``.
    """

    ALL = "--help-all"

    def __init__(self, *, full: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.full = full
        if not full:
            self.add_argument(self.ALL, action="help", help="as --help, with the options that are seldom needed")

    def rare(self, group: Any, *names: str, help: str = "", **options: Any) -> None:
        """An option of a group that the short help leaves out."""
        group.add_argument(*names, help=help if self.full else argparse.SUPPRESS, **options)


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """Seconds of ``90s``, ``3m`` or ``2h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match or float(match.group(1)) <= 0:
        raise CommandError(f"`--budget` must be a time above 0 like 90s, 3m or 2h, got {text!r}.")
    return float(match.group(1)) * _UNITS[match.group(2)]


def whole_number(text: str) -> int:
    """An integer; says what it got where it is none."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error


def real_number(text: str) -> float:
    """A number; says what it got where it is none."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from error


def batch_size(text: str) -> int | None:
    """An integer, or ``population``."""
    if text == "population":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number or `population`, got {text!r}") from error


def step_count(text: str) -> int | None:
    """An integer, or ``auto``."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number or `auto`, got {text!r}") from error


def add_problem(parser: Parser, d: list[int], batches: bool = True) -> None:
    """Options that make problems; those that take several values are combined."""
    problem = parser.add_argument_group("problem")
    problem.add_argument("--d", type=whole_number, nargs="+", default=d, help=f"features of v, and of u (default: {d})")
    problem.add_argument(
        "--alpha", type=real_number, nargs="+", default=[1.5], help="power of the frequencies (default: 1.5)"
    )
    problem.add_argument(
        "--n-items", type=whole_number, default=30000, help="items N, the same at every d (default: 30000)"
    )
    if batches:
        problem.add_argument(
            "--batch-size", type=batch_size, nargs="+", default=[None], metavar="B", help="items drawn, or `population`"
        )
    problem.add_argument(
        "--seeds", type=whole_number, default=3, metavar="K",
        help="seeds first..first+K-1, the same in every cell: paired (3)",
    )  # fmt: skip
    rare = partial(parser.rare, problem)
    rare("--first-seed", type=whole_number, default=0, help="first seed (default: 0)")
    rare("--d-out", type=whole_number, nargs="+", default=[None], help="features of u, where W is not square")
    rare("--anisotropy", type=real_number, nargs="+", default=[0.0], help="beta of Cov(v)_kk ~ k^-beta")
    rare("--dtype", default="float32", help="of the large products: float32 or float64")
    rare("--allow-flat", action="store_true", help="accept 0 < alpha <= 1, where the law says nothing")


def add_rules(parser: Parser, default: tuple[str, ...] = DEFAULT_RULES) -> None:
    """Options of the rules."""
    rules = parser.add_argument_group("rules")
    rules.add_argument(
        "--rules", nargs="+", default=list(default),
        help="sgd, sign, muon, newton, ns, ns<steps>, power<p> (default: %(default)s)",
    )  # fmt: skip
    rare = partial(parser.rare, rules)
    rare("--lam", type=real_number, default=0.0, help="muon: lambda of s / sqrt(s^2 + lambda^2) (default: 0)")
    rare("--lam-scale", type=real_number, help="muon: lambda in units of p_1 d^-alpha, instead of --lam")
    rare("--polar", default="newton", help="muon: polar factor by `newton` (matrix products) or `svd`")
    rare("--coefficients", default="muon", help="ns: name of the coefficient set (default: muon)")
    rare("--ns-steps", type=step_count, default=5, help="ns: steps, or `auto` (default: 5)")
    rare("--ns-dtype", default="float32", help="ns: float32, bfloat16 or float64")
    rare("--power", type=real_number, default=0.5, help="power: p of s^p, between 0 (muon) and 1 (sgd)")
    rare("--ridge", type=real_number, default=0.0, help="newton: ridge, in units of the mean input eigenvalue")


def add_run(parser: Parser, out: str, resume: bool = True) -> None:
    """Options of the machine and of the output."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out", default=out, metavar="DIR", help="results.jsonl, tables and figures (default: %(default)s)"
    )
    if resume:
        run.add_argument("--resume", action="store_true", help="keep the rows that --out holds, run what is missing")
    rare = partial(parser.rare, run)
    rare("--no-figures", action="store_true", help="write numbers only")
    rare("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    rare("--chunk-size", type=whole_number, default=4096, help="items whose scores are held at once (default: 4096)")
    rare("--cache-gib", type=real_number, default=4.0, help="draw embeddings larger than this again each pass")


def problems(options: argparse.Namespace) -> Iterator[MemoryProblem]:
    """Every combination, seeds innermost."""
    from lightning_spectral.theory.problem import MemoryProblem, require_integer

    require_integer("seeds", options.seeds, 1, "run at least one seed")
    require_integer("first_seed", options.first_seed, 0, "seeds are non-negative integers")
    lists = (options.alpha, options.anisotropy, options.d_out, options.d, getattr(options, "batch_size", [None]))
    for alpha, anisotropy, d_out, d, batch in itertools.product(*lists):
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            yield MemoryProblem(
                d=d,
                n_items=options.n_items,
                alpha=alpha,
                batch_size=batch,
                seed=seed,
                anisotropy=anisotropy,
                dtype=options.dtype,
                allow_flat=options.allow_flat,
                d_out=d_out,
            )


def rule_settings(options: argparse.Namespace) -> RuleSettings:
    """Settings of the rules, checked, with the rules themselves."""
    from lightning_spectral.theory.rules import RuleSettings, parse_rule

    settings = RuleSettings(
        lam=options.lam,
        lam_scale=options.lam_scale,
        coefficients=options.coefficients,
        ns_steps=options.ns_steps,
        ns_dtype=options.ns_dtype,
        ridge=options.ridge,
        polar=options.polar,
        power=options.power,
    )
    for rule in options.rules:
        parse_rule(rule, settings)
    return settings


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for the solvers."""
    import torch

    from lightning_spectral.theory.problem import require_integer

    require_integer("chunk_size", options.chunk_size, 1, "it is a number of items")
    if not options.cache_gib >= 0:
        raise CommandError(f"`--cache-gib` must be >= 0, got {options.cache_gib}.")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"`--device` {device} cannot be used ({str(error).splitlines()[0]}); try cpu.") from error
    return {"device": device, "chunk_size": options.chunk_size, "cache_bytes": int(options.cache_gib * 2**30)}
