"""One pretraining run: a checked recipe in, a run folder out.

The run folder holds the callbacks' records, ``checkpoints/`` (to resume), ``final/`` (litgpt's format), ``logs/`` and
``hyperparameters.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import get_default_supported_precision

from lightning_spectral import records
from lightning_spectral.data.text_blocks import TextBlocks
from lightning_spectral.data.tokens import unigram_entropy
from lightning_spectral.gpt.export import save_final
from lightning_spectral.gpt.learning_rate import LRPlan
from lightning_spectral.gpt.module import LitGPT
from lightning_spectral.models.checkpoint_file import CheckpointError
from lightning_spectral.probe.run_folder import move_earlier_run
from lightning_spectral.probe.run_lock import RunLock
from lightning_spectral.text import one_line, write_text
from lightning_spectral.training import checkpoints, preemption
from lightning_spectral.training.devices import refuse_absent
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.factories import is_absent, make_logger, make_strategy, refuse_parts
from lightning_spectral.training.names import keys
from lightning_spectral.training.preemption import first_rank
from lightning_spectral.training.recipe import Recipe
from lightning_spectral.training.same_recipe import check_resumed, shown
from lightning_spectral.training.schema import instantiate
from lightning_spectral.training.sizes import Lengths, checkpoint_dir, connect, model_config
from lightning_spectral.training.sources import arguments_of
from lightning_spectral.training.trial import try_out
from lightning_spectral.training.validation import InitialAndFinalValidation

RECIPE_FILE = "hyperparameters.yaml"
TRAINING_LOCK = "training.lock"
RUN_CONTENT = (
    *records.RUN_FILES,
    checkpoints.FOLDER,
    "final",
    "logs",
    RECIPE_FILE,
)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_folder: Where everything lies.
        step: Optimizer steps done.
        tokens: Training tokens seen over all ranks.
        val_loss: Last held-out loss, nats a token; ``None`` if none was taken in this process.
        unigram_entropy: Entropy of the training tokens' frequencies, nats; ``None`` if the data module has no counts.
        already_done: The run had been finished before; nothing was trained.
    """

    run_folder: Path
    step: int
    tokens: int
    val_loss: float | None
    unigram_entropy: float | None
    already_done: bool = False


def run(recipe: Recipe, *, progress_bar: bool = True, accept_changes: bool = False) -> Path:
    """Train what a recipe says and return its run folder.

    Idempotent with ``resume: auto``: a finished run is left as it is, an interrupted one continues from its newest
    whole checkpoint, a new one starts. With ``resume: false`` an earlier run in the same folder is moved to
    ``out_dir/previous/<run id>`` first.

    Args:
        recipe: From :func:`lightning_spectral.training.recipe.load`.
        progress_bar: Show Lightning's progress bar.
        accept_changes: Continue a run that was started under another recipe, or by another version of this package.

    Raises:
        RecipeError: If data, tokenizer, model and callbacks do not fit together, or the run was started under another
            recipe.
    """
    return pretrain(recipe, progress_bar=progress_bar, accept_changes=accept_changes).run_folder


def pretrain(recipe: Recipe, *, progress_bar: bool = True, accept_changes: bool = False) -> RunResult:
    """Run a recipe and say how it ended; :func:`run` says the rest."""
    lock = RunLock(recipe.out_dir, TRAINING_LOCK)
    continues = bool(recipe.content["resume"]) or preemption.was_requeued()
    try:
        alone = not first_rank() or lock.acquire(continues=continues)
    except OSError as error:
        raise RecipeError(f"`out_dir` cannot be written: {one_line(error)}. Give another one.") from error
    if not alone:
        raise RecipeError(
            f"another process is training in `{recipe.out_dir}`: wait for its end, or give another `out_dir`."
        )
    try:
        return _pretrain(recipe, progress_bar=progress_bar, accept_changes=accept_changes)
    finally:
        lock.release()


def _pretrain(recipe: Recipe, *, progress_bar: bool, accept_changes: bool) -> RunResult:
    content, out_dir = recipe.content, recipe.out_dir
    objects = instantiate(content, out_dir)
    data: DataModule = objects.data
    resume = _resume_path(content["resume"] or ("auto" if preemption.was_requeued() else False), out_dir)
    changes = check_resumed(recipe.text(), out_dir, RECIPE_FILE, accept_changes=accept_changes) if resume else []
    with _as_recipe_error():
        refuse_absent(content["accelerator"], is_absent)
        try_out(recipe)
        tokenizer_dir = checkpoint_dir(content, "tokenizer_dir")
        with _in_words_of_a_recipe(content["data"]["class_path"]):
            config = model_config(recipe, data, tokenizer_dir)
            lengths = connect(data, objects.train, config, tokenizer_dir, content)
        module = _module(recipe, config, lengths, objects.train)
        pl.seed_everything(content["seed"], verbose=False)
        edges = InitialAndFinalValidation(first=objects.eval.initial_validation, last=objects.eval.final_validation)
        strategy = make_strategy(content["strategy"], lengths.world_size)
        if resume is None and first_rank():  # what is refused above leaves the earlier run where it is
            _move_previous_run(out_dir)
        resuming = resume is not None
        trainer = _trainer(recipe, objects, lengths, edges, strategy, resuming=resuming, progress_bar=progress_bar)
    refuse_parts(resume, trainer.strategy, content["strategy"])
    entropy = unigram_entropy(data.token_counts) if isinstance(data, TextBlocks) else None
    tokens_per_step = objects.train.global_batch_size * lengths.seq_length
    done = checkpoints.step_of(resume) if resume else None
    if done is not None and done >= lengths.num_steps and (out_dir / "final" / "lit_model.pth").is_file():
        rank_zero_info(
            f"`{out_dir}` is finished at step {done}: nothing to do (to go on, raise `train.max_steps` and accept it)."
        )
        return RunResult(out_dir, done, done * tokens_per_step, None, entropy, already_done=True)
    if first_rank():
        write_text(out_dir / RECIPE_FILE, recipe.text())
    if resume:
        rank_zero_info(f"resuming from {resume}" + (f", with changes: {shown(changes)}" if changes else ""))
    with _as_recipe_error(trainer):
        # nothing in a checkpoint is executed: recipe and callback states are plain values beside the tensors
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        if edges.missed:  # killed between the last checkpoint and the last validation
            trainer.validate(module, datamodule=data, verbose=False)
    save_final(trainer, module, data, tokenizer_dir, out_dir / "final", recipe.text())
    reached = trainer.callback_metrics.get("val_loss")
    val_loss = None if reached is None else float(reached)
    return RunResult(out_dir, trainer.global_step, trainer.global_step * tokens_per_step, val_loss, entropy)


def _module(recipe: Recipe, config: Config, lengths: Lengths, train: TrainArgs) -> LitGPT:
    content = recipe.content
    initial = checkpoint_dir(content, "initial_checkpoint_dir")
    return LitGPT(
        config,
        optimizer=content["optimizer"],
        architecture=recipe.architecture,
        lr_plan=LRPlan(lengths.num_steps, lengths.warmup_iters, train.min_lr, lengths.accumulation, recipe.lr_schedule),
        tie_embeddings=bool(train.tie_embeddings),
        max_seq_length=lengths.seq_length,
        initial_checkpoint=initial / "lit_model.pth" if initial else None,
        seed=content["seed"],
        recipe=content,
    )


def _trainer(
    recipe: Recipe,
    objects: Any,
    lengths: Lengths,
    edges: InitialAndFinalValidation,
    strategy: str | Strategy,
    *,
    resuming: bool,
    progress_bar: bool,
) -> pl.Trainer:
    """The Trainer that a recipe asks for.

    Args:
        recipe: The recipe.
        objects: Of :func:`~lightning_spectral.training.schema.instantiate`.
        lengths: Batch sizes and steps.
        edges: The callback that validates first and last.
        strategy: Of :func:`~lightning_spectral.training.factories.make_strategy`.
        resuming: Whether a checkpoint is loaded.
        progress_bar: Show Lightning's progress bar.
    """
    content, out_dir = recipe.content, recipe.out_dir
    train: TrainArgs = objects.train
    evaluation: EvalArgs = objects.eval
    own_loader = isinstance(objects.data, TextBlocks)  # one epoch of the whole run, in its own order
    save = checkpoints.StepCheckpoint(out_dir, train.save_interval, preemption.StopSignals())
    return pl.Trainer(
        accelerator=content["accelerator"],
        devices=lengths.devices,
        num_nodes=lengths.num_nodes,
        strategy=strategy,
        precision=content["precision"] or get_default_supported_precision(training=True),
        logger=make_logger(content, out_dir, resuming=resuming),
        callbacks=[*objects.callbacks, edges, save],
        # requeueing is ours: Lightning's own checkpoint would win over a newer one
        plugins=[SLURMEnvironment(auto_requeue=False)] if preemption.under_slurm() else None,
        default_root_dir=out_dir,
        max_steps=lengths.num_steps,
        max_epochs=1 if own_loader else None,
        max_time={"seconds": train.max_time} if train.max_time else None,
        accumulate_grad_batches=lengths.accumulation,
        gradient_clip_val=train.max_norm,
        val_check_interval=evaluation.interval * lengths.accumulation,
        check_val_every_n_epoch=None,
        limit_val_batches=evaluation.max_iters,
        num_sanity_val_steps=0 if evaluation.initial_validation or resuming else 2,
        log_every_n_steps=train.log_interval,
        use_distributed_sampler=not own_loader,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
    )


def _resume_path(resume: Any, out_dir: Path) -> Path | None:
    if not resume:
        return None
    if resume is True or resume == "auto":
        found = checkpoints.newest_whole(out_dir)
        if found is None and resume is True:
            raise RecipeError(
                f"`resume: true`, but `{out_dir / checkpoints.FOLDER}` holds no whole checkpoint: use `resume: auto` "
                "to start where there is none."
            )
        return found
    path = Path(resume)
    if not path.exists():
        raise RecipeError(f"`resume` names `{path}`, which does not exist: give a checkpoint, `auto` or `false`.")
    try:
        checkpoints.check_whole(path)
    except (OSError, CheckpointError) as error:
        raise RecipeError(f"`resume` names a checkpoint that cannot be used: {error} Or use `resume: auto`.") from error
    return path


def _move_previous_run(out_dir: Path) -> None:
    """Records of two runs must not mix, and none may be lost."""
    checkpoints.remove_partials(out_dir)
    lightning_own = [path.name for path in out_dir.glob("hpc_ckpt_*")]  # it would start the new run
    target = move_earlier_run(out_dir, [*RUN_CONTENT, *lightning_own])
    if target is not None:
        rank_zero_info(
            f"moved the previous run in `{out_dir}` to `{target}` (use `resume: auto` to continue it instead)"
        )


@contextmanager
def _in_words_of_a_recipe(class_path: str) -> Iterator[None]:
    """Errors of the data name their own arguments: where a recipe has them below ``data``, say so."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        below = {*(arguments_of(class_path) or [])} - {*keys()}
        unnamed = re.compile(rf"`({'|'.join(map(re.escape, below)) or '(?!)'})`")
        raise RecipeError(unnamed.sub(r"`data.init_args.\1`", one_line(error))) from error


@contextmanager
def _as_recipe_error(trainer: pl.Trainer | None = None) -> Iterator[None]:
    """Bad input shows before the first step: say it in one line. Later errors keep their traceback."""
    started = trainer.global_step if trainer else 0
    try:
        yield
    except RecipeError:
        raise
    except (
        ValueError,
        FileNotFoundError,
        ModuleNotFoundError,
        MisconfigurationException,
    ) as error:
        if trainer is not None and trainer.global_step > started:
            raise
        raise RecipeError(one_line(error)) from error
