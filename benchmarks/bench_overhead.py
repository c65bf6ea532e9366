"""What does measuring add to an optimizer step of a litgpt GPT in a Trainer, ours and every peer's?

Every policy has its own Trainer, model and data, so that none carries another's hooks; the Trainers run in threads that
hand a baton on after a few steps, so that only one works at a time and all meet the same machine. The first row is a
Trainer without any callback. Differences of whole steps below a few percent are noise here.

    python benchmarks/bench_overhead.py --quick
    python benchmarks/bench_overhead.py --unarmed    # only: between windows, and the proof of the layout
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from litgpt import GPT, Config
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness, peers, unarmed
from lightning_spectral import SpectralRankCallback, TailTokenProbe
from lightning_spectral.models.matching import Matcher
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.window import ClosedWindow

BASE = "no callback"
BUCKETS, VOCAB = 3, 2048
FOREVER = 1 << 30
ONE_GROUP: dict[str, Any] = {"num_jackknife_groups": 1}
PERIOD = 4  # steps between windows of the policies that measure now and then


@dataclass(frozen=True)
class Size:
    """The model and its batches."""

    width: int = 128
    ffn_width: int = 1024
    layers: int = 2
    length: int = 256
    batch: int = 16


class Module(pl.LightningModule):
    """A litgpt GPT with AdamW."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Config(
            n_layer=size.layers, n_head=4, n_embd=size.width, intermediate_size=size.ffn_width,
            block_size=size.length, vocab_size=VOCAB, padded_vocab_size=VOCAB, mlp_class_name="GptNeoxMLP",
            norm_class_name="RMSNorm", bias=False,
        )  # fmt: skip
        self.gpt = GPT(config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Next-token loss."""
        logits = self.gpt(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@dataclass
class Baton:
    """Whose turn it is; the time of a turn is noted by the callback that ends it."""

    order: list[str]
    turns: dict[str, int]
    rounds: int
    device: str
    times: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    turn: str = ""
    ready: set[str] = field(default_factory=set)
    condition: threading.Condition = field(default_factory=threading.Condition)
    began: tuple[float, float] = (0.0, 0.0)
    error: BaseException | None = None

    def wait(self, name: str) -> None:
        """Until it is this one's turn."""
        with self.condition:
            self.ready.add(name)
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.turn == name or self.error is not None)
        if self.error is not None:
            raise RuntimeError("Another policy failed.") from self.error
        self._synchronize()
        self.began = (time.process_time(), time.perf_counter())

    def pass_on(self, name: str) -> None:
        """Note the time since :meth:`wait` and let the next one run."""
        self._synchronize()
        self.times.setdefault(name, []).append(
            (time.process_time() - self.began[0], time.perf_counter() - self.began[1])
        )
        with self.condition:
            self.turn = self.order[(self.order.index(name) + 1) % len(self.order)]
            self.condition.notify_all()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Turns(pl.Callback):
    """First and last of a Trainer's callbacks: waits for the baton before a turn, hands it on after."""

    def __init__(self, name: str, baton: Baton, *, first: bool) -> None:
        self.name, self.baton, self.first = name, baton, first

    @property
    def state_key(self) -> str:
        """The two are told apart."""
        return f"Turns.{self.first}"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A turn begins."""
        if self.first and batch_idx % self.baton.turns[self.name] == 0:
            self.baton.wait(self.name)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A turn ends; after the last one so does the fit."""
        if not self.first and (batch_idx + 1) % self.baton.turns[self.name] == 0:
            self.baton.pass_on(self.name)
            trainer.should_stop = len(self.baton.times[self.name]) >= self.baton.rounds


class TelemetryCallback(pl.Callback):
    """spectral-telemetry on the inputs of the down projections, with buckets; reports every n steps."""

    def __init__(self, every_n_steps: int, dtype: torch.dtype) -> None:
        self.every_n_steps, self.dtype = every_n_steps, dtype

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach."""
        from spectral_telemetry.telemetry import FrequencyTable, attach_probes

        self.probes = attach_probes(
            pl_module.gpt,  # the module whose forward takes the token ids
            lambda name, module: name.endswith("mlp.proj"),
            capture="input",
            dtype=self.dtype,
            freq_table=FrequencyTable(counts().numpy()),
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        """Only measured steps are taken in."""
        if batch_idx % self.every_n_steps:
            self.probes.disable()
        else:
            self.probes.enable()
            self.probes.set_batch_context(token_ids=batch[:, :-1])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The report."""
        if batch_idx % self.every_n_steps == 0:
            self.probes.compute(reset=True)


class BufferingCallback(pl.Callback):
    """The paper's way: keep the rows of the measured step, then covariances and eigenvalues by bucket."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps, self.due = every_n_steps, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach."""
        self.buffers: dict[str, peers.Buffering] = {}
        self.buckets = torch.bucketize(counts().cumsum(0) / counts().sum(), torch.tensor([0.33, 0.67]))
        for name, module in pl_module.named_modules():
            if name.endswith("mlp.proj"):
                self.buffers[name] = peers.Buffering()
                module.register_forward_pre_hook(self._keep(self.buffers[name]))

    def _keep(self, buffer: peers.Buffering) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if self.due:
                buffer.update(args[0].detach().flatten(0, -2), self.codes)

        return hook

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        """Is this step measured?"""
        self.due = batch_idx % self.every_n_steps == 0
        self.codes = self.buckets.to(batch.device)[batch[:, :-1].flatten()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The report."""
        if self.due:
            for buffer in self.buffers.values():
                for matrix in buffer.covariances(BUCKETS):
                    torch.linalg.eigvalsh(matrix)


def counts() -> Tensor:
    """A Zipf-like corpus."""
    return (1e7 / torch.arange(1, VOCAB + 1)).long()


def policies(folder: Path) -> dict[str, tuple[int, pl.Callback | None]]:
    """Steps of one turn, and the callback."""

    def ours(name: str, every_n_steps: int, **options: Any) -> TailTokenProbe:
        path = str(folder / name)
        # in the loop: a thread's work would fall into the others' turns
        return TailTokenProbe(every_n_steps, counts=counts(), losses=False, dirpath=path, background=False, **options)

    found: dict[str, tuple[int, pl.Callback | None]] = {
        BASE: (PERIOD, None),
        "ours, unarmed": (PERIOD, ours("unarmed", FOREVER)),
        f"ours, 1 step in {PERIOD}, all tokens, exact": (PERIOD, ours("some", PERIOD)),
        f"ours, 1 step in {PERIOD}, all tokens, approx": (PERIOD, ours("some_approx", PERIOD, soft="approx")),
        "ours, every step, all tokens, exact": (1, ours("every", 1)),
        "ours, every step, 1/8 of tokens, approx": (1, ours("thin", 1, token_fraction=1 / 8, soft="approx")),
        # without unbiased ranks and intervals, as the others measure
        f"ours, 1 step in {PERIOD}, all tokens, exact, one group": (PERIOD, ours("some1", PERIOD, **ONE_GROUP)),
        "ours, every step, all tokens, exact, one group": (1, ours("every1", 1, **ONE_GROUP)),
        "ours, every step, 1/8 of tokens, approx, one group": (
            1,
            ours("thin1", 1, token_fraction=1 / 8, soft="approx", **ONE_GROUP),
        ),
        f"paper's buffering, 1 step in {PERIOD}": (PERIOD, BufferingCallback(PERIOD)),
    }
    if peers.HAS_TELEMETRY:
        found |= {
            f"spectral-telemetry fp64, 1 step in {PERIOD}": (PERIOD, TelemetryCallback(PERIOD, torch.float64)),
            "spectral-telemetry fp64, every step": (1, TelemetryCallback(1, torch.float64)),
            "spectral-telemetry fp32, every step": (1, TelemetryCallback(1, torch.float32)),
        }
    return found


def fit(name: str, callback: pl.Callback | None, baton: Baton, size: Size, threads: int, seed: int) -> None:
    """One policy's Trainer, in its thread."""
    torch.set_num_threads(threads)
    try:
        steps = baton.turns[name] * (baton.rounds + 1)  # the last step of a run is always measured: never reach it
        generator = torch.Generator().manual_seed(seed)
        shape = (steps * size.batch, size.length + 1)
        rows = torch.multinomial(counts().float(), shape[0] * shape[1], True, generator=generator).view(shape)
        inner = [] if callback is None else [callback]
        trainer = pl.Trainer(
            max_epochs=1, accelerator=baton.device, devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[Turns(name, baton, first=True), *inner, Turns(name, baton, first=False)],
        )  # fmt: skip
        trainer.fit(Module(size), DataLoader(rows, batch_size=size.batch))
    except BaseException as error:
        with baton.condition:
            baton.error = baton.error or error
            baton.condition.notify_all()


def unarmed_policies(folder: Path, turn: int) -> dict[str, tuple[int, pl.Callback | None]]:
    """Without us, and with each callback between windows, in turns of so many steps."""
    settings: dict[str, Any] = {"background": False}
    rank = SpectralRankCallback(FOREVER, dirpath=str(folder / "rank"), **settings)
    tail = TailTokenProbe(FOREVER, counts=counts(), dirpath=str(folder / "tail"), **settings)
    return {
        BASE: (turn, None),
        "SpectralRankCallback, unarmed": (turn, rank),
        "TailTokenProbe, unarmed": (turn, tail),
    }


def race(
    found: dict[str, tuple[int, pl.Callback | None]], size: Size, options: Any
) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of every turn of each policy; the first warms up."""
    turns = {name: turn for name, (turn, _) in found.items()}
    baton = Baton(list(found), turns, options.rounds + 1, options.device)
    threads = []
    for name, (_, callback) in found.items():  # set up one after the other: a set-up is timed work too
        arguments = (name, callback, baton, size, options.threads, options.seed)
        threads.append(threading.Thread(target=fit, args=arguments))
        threads[-1].start()
        with baton.condition:
            baton.condition.wait_for(lambda name=name: name in baton.ready or baton.error is not None)
    with baton.condition:
        baton.turn = BASE
        baton.condition.notify_all()
    for thread in threads:
        thread.join()
    if baton.error is not None:
        raise baton.error
    return baton.times


def proof_of_layout(size: Size, options: Any, folder: Path) -> tuple[float, float]:
    """CPU seconds of the proof, and of all that windows do, over windows at every step."""
    proof, window = unarmed.Clock(), unarmed.Clock()
    proof.wrap(Matcher, "match")
    for owner, name in (
        (SpectralProbe, "collect"),
        (SpectralProbe, "settle"),
        (SpectralProbe, "close"),
        (ClosedWindow, "solve"),
    ):
        window.wrap(owner, name)
    callback = TailTokenProbe(1, counts=counts(), dirpath=str(folder / "proof"), background=False)
    options = type(options)(**{**vars(options), "rounds": 4})
    race({BASE: (1, callback)}, size, options)
    return proof.seconds, window.seconds


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__, rounds=4)
    parser.add_argument("--unarmed", action="store_true", help="between windows, and the proof of the layout, only")
    options = parser.parse_args(argv)
    size = Size(width=64, ffn_width=256, length=64, batch=2) if options.quick else Size()
    if options.quick:
        options.rounds = 3
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    about = {**harness.prepare(options), "model": asdict(size)}
    with tempfile.TemporaryDirectory() as folder:
        if options.unarmed:
            small = Size(batch=4) if not options.quick else size  # many pairs of short turns
            times = race(unarmed_policies(Path(folder), 2), small, options)
            many = type(options)(**{**vars(options), "rounds": 8 * options.rounds})
            tiny = Size(width=32, ffn_width=64, length=16, batch=1)
            fast = race(unarmed_policies(Path(folder) / "tiny", 20), tiny, many)
            proof = proof_of_layout(size, options, Path(folder))
            found, text = unarmed.report("Overhead between windows", times, (fast, 20), BASE, *proof, steps=2)
            harness.write(options, f"overhead_unarmed_{options.threads}t", about, found, text)
            return 0
        chosen = policies(Path(folder))
        times = race(chosen, size, options)
    per_step = {
        name: [(cpu / turn, wall / turn) for cpu, wall in times[name][1:]] for name, (turn, _) in chosen.items()
    }
    timings = [harness.summary(name, per_step[name], per_step[BASE]) for name in chosen]
    base_ms = timings[0].cpu_ms
    ms = {t.name: t.cpu_ms for t in timings}
    windows_ms = {name: PERIOD * (value - base_ms) for name, value in ms.items() if f"1 step in {PERIOD}" in name}
    extra = {
        f"1 step in 200, share of the run (from one window's cost): {n}": t / 200 / base_ms
        for n, t in windows_ms.items()
    }
    if peers.HAS_TELEMETRY:
        theirs = ms["spectral-telemetry fp64, every step"] - base_ms
        for groups in ("", ", one group"):
            own = ms[f"ours, every step, all tokens, exact{groups}"] - base_ms
            extra[f"every step, exact{groups}: telemetry's overhead over ours"] = theirs / own
    text = ["# Overhead: one optimizer step in a Trainer", "", *harness.table(timings, BASE), ""]
    text += [f"- {name}: {value:.4f}" for name, value in extra.items()]
    report = {"rows": [asdict(t) for t in timings], "findings": extra}
    harness.write(options, f"overhead_{options.threads}t", about, report, "\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
