"""``python -m lightning_spectral.sweep.worker JOB.json``: one run of a sweep in a process of its own."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from lightning_spectral.records import PROGRESS_FILE
from lightning_spectral.sweep import cost as sweep_cost
from lightning_spectral.sweep import plan as sweep
from lightning_spectral.sweep.launchers import end_with_the_parent
from lightning_spectral.training.recipe import Recipe, RecipeError


def main(argv: list[str]) -> int:
    """Run a job and record how it ended; 0 finished, 2 bad recipe, 1 failed."""
    end_with_the_parent()
    sweep_cost.started()
    job, recipe = sweep.load_job(Path(argv[0]))
    try:
        if argv[1:] == ["--prepare"]:
            prepare(recipe)
            return 0
        from lightning_spectral.training.pretrain import run

        run(recipe, progress_bar=False, accept_changes=job.accept_changes)
    except RecipeError as error:
        sweep.write_state(job, "failed", str(error))
        print(error, file=sys.stderr)
        return 2
    except Exception as error:  # whatever a run dies of, the sweep goes on and says it
        sweep.write_state(job, "failed", f"{type(error).__name__}: {error}".splitlines()[0])
        traceback.print_exc()
        return 1
    finally:
        path = Path(job.folder) / PROGRESS_FILE
        progress = sweep.read_json(path)
        sweep.write_json(path, {**progress, **sweep_cost.with_cost(progress)})
    sweep.write_ended(job)
    return 0


def prepare(recipe: Recipe) -> None:
    """Build the token cache once, before several runs want it at the same time."""
    from lightning_spectral.data.text_blocks import TextBlocks
    from lightning_spectral.training.schema import instantiate

    data = instantiate(recipe.content, recipe.out_dir).data
    if isinstance(data, TextBlocks):
        directory = recipe.content["tokenizer_dir"]
        data.connect(tokenizer_dir=Path(directory) if directory else None)
        data.prepare_data()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
