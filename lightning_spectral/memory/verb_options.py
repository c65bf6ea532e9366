"""Options of each ``lightning-spectral memory VERB``."""

from __future__ import annotations

from lightning_spectral.memory import options as memory_options
from lightning_spectral.memory.options import Parser

NS_SETS, NS_STEPS = ["muon", "polar_express", "cubic"], [3, 4, 5, 6, 7, 8, 10, 12, 14]


def add_one_step(parser: Parser) -> None:
    """``one-step``."""
    memory_options.add_problem(parser, d=[128, 256, 512])
    memory_options.add_rules(parser)
    memory_options.add_run(parser, "out/memory/one-step")


def add_batch(parser: Parser) -> None:
    """``batch``."""
    memory_options.add_problem(parser, d=[64, 128], batches=False)
    parser.add_argument(
        "--batch-size", type=memory_options.batch_size, nargs="+", metavar="B",
        default=[16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, None], help="integers or `population`",
    )  # fmt: skip
    memory_options.add_rules(parser, ("sgd", "muon"))
    memory_options.add_run(parser, "out/memory/batch")


def add_steps(parser: Parser) -> None:
    """``steps``."""
    memory_options.add_problem(parser, d=[64, 128])
    parser.add_argument("--steps", type=memory_options.whole_number, default=5, help="optimizer steps (default: 5)")
    parser.add_argument("--mode", default="deflation", help="exact softmax dynamics, or deflation (default)")
    parser.add_argument(
        "--step-scale", type=memory_options.real_number, default=2.0, help="exact: c in |dW|_F = c sqrt(d d_out) (2)"
    )
    parser.add_argument("--schedule", default="linear", help="exact: constant, or linear to zero (default)")
    memory_options.add_rules(parser, ("sgd", "muon"))
    memory_options.add_run(parser, "out/memory/steps")


def add_theory(parser: Parser) -> None:
    """``theory``."""
    memory_options.add_problem(parser, d=[128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=memory_options.whole_number, default=0, help="also predict d_t this far")
    memory_options.add_rules(parser, ("sgd", "muon", "newton"))
    memory_options.add_run(parser, "out/memory/theory")


def add_newton_schulz(parser: Parser) -> None:
    """``newton-schulz``."""
    memory_options.add_problem(parser, d=[256])
    group = parser.add_argument_group("iterations")
    group.add_argument("--coefficients", nargs="+", help=f"coefficient sets (default: {' '.join(NS_SETS)})")
    group.add_argument("--ns-steps", type=memory_options.whole_number, nargs="+", help=f"(default: {NS_STEPS})")
    group.add_argument("--checkpoint", metavar="FILE", help="judge the momentum of a run by its own optimizer instead")
    group.add_argument("--as-gradient", action="store_true", help="--checkpoint without momentum: judge its matrices")
    group.add_argument("--ns-dtype", nargs="+", default=["float32", "bfloat16"])
    memory_options.add_run(parser, "out/memory/newton-schulz")


def add_budget(parser: Parser, verb: str, budget: str) -> None:
    """``reproduce`` and ``claims``."""
    parser.add_argument(
        "--budget",
        type=memory_options.parse_budget,
        default=budget,
        help=f"wall time, e.g. 90s, 3m, 2h; more reaches larger d (default: {budget})",
    )
    parser.add_argument(
        "--n-items", type=memory_options.whole_number, default=30000, help="items N, at every d (default: 30000)"
    )
    parser.rare(parser, "--first-seed", type=memory_options.whole_number, default=0, help="first seed (default: 0)")
    memory_options.add_run(parser, f"out/memory/{verb}", resume=False)


def add_advise(parser: Parser) -> None:
    """``advise``."""
    number = memory_options.whole_number
    parser.add_argument(
        "--counts", required=True, metavar="FILE", help="counts of the tokens: .npy, or a number per line"
    )
    parser.add_argument("--d", type=number, required=True, help="width of the residual stream")
    parser.add_argument("--ffn", type=number, help="width of the hidden layer (default: 4 d)")
    parser.add_argument("--batch-tokens", type=number, default=524288, help="tokens per step (default: 524288)")
    parser.add_argument("--rules", nargs="+", default=["sgd", "ns", "muon"], help="(default: sgd ns muon)")
    parser.add_argument("--coefficients", default="polar_express", help="of ns (default: polar_express)")
    parser.add_argument("--ns-steps", type=number, default=5, help="of ns (default: 5)")
    parser.add_argument(
        "--out", default="out/memory/advise", metavar="DIR", help="results.jsonl (default: %(default)s)"
    )


def add_recall(parser: Parser) -> None:
    """``recall``."""
    number, real = memory_options.whole_number, memory_options.real_number
    parser.add_argument("--d", type=number, nargs="+", default=[24, 32, 48, 64, 96], help="features of keys and values")
    parser.add_argument("--network", default="mlp", choices=("mlp", "attention"), help="mlp, or subject and relation")
    parser.add_argument("--relations", type=number, default=4, help="attention: relations of each subject (default: 4)")
    parser.add_argument("--num-facts", type=number, default=4096)
    parser.add_argument("--alpha", type=real, default=1.2, help="power of the frequencies (default: 1.2)")
    parser.add_argument("--batch-size", type=number, default=2048, help="facts drawn a step (default: 2048)")
    parser.add_argument("--steps", type=number, default=40, help="optimizer steps (default: 40)")
    parser.add_argument("--every", type=number, default=10, help="test and measure every n steps (default: 10)")
    parser.add_argument("--optimizers", nargs="+", default=["muon", "adamw", "sgd"])
    parser.add_argument("--lr", type=real, nargs="+", help="learning rates, instead of a search for each optimizer's")
    parser.add_argument("--scan-seeds", type=number, default=1, help="seeds of the search, not of the study (1)")
    parser.add_argument("--seeds", type=number, default=5, help="runs of each cell (default: 5)")
    parser.rare(parser, "--first-seed", type=number, default=0, help="first seed (default: 0)")
    parser.add_argument("--out", default="out/memory/recall", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--no-figures", action="store_true", help="write numbers only")


def add_report(parser: Parser) -> None:
    """``report``."""
    parser.add_argument("dir", metavar="DIR", help="a folder with results.jsonl, of a finished or interrupted command")
    parser.add_argument("--no-figures", action="store_true", help="write numbers only")


def add_audience(parser: Parser) -> None:
    """``audience``."""
    parser.add_argument("dir", metavar="DIR", help="a folder of runs that were trained with UpdateAudience")
