"""The picture of ``memory recall``: facts and TAIL hard rank against width, at the first and the last steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.lines import Line2D

from lightning_spectral.memory.fit import Row, by_size, group
from lightning_spectral.memory.recall_tables import MEASURED, best_rates
from lightning_spectral.memory.scene import finish, log_log, make_panels, name_ends
from lightning_spectral.report.style import RC, looks_of

_SHOWN = ("count", "tail_hard_rank")
_STEPS_AT_MOST = 3


def draw_recall(rows: Sequence[Row], folder: str | Path) -> Path | None:
    """Write ``recall.png``: a line of panels for facts, one for TAIL hard rank; ``None`` without two widths."""
    best = best_rates(rows)
    if len({row["d"] for row in best}) < 2:
        return None
    every = sorted({row["step"] for row in best})
    steps = [every[0], every[len(every) // 2], every[-1]] if len(every) > _STEPS_AT_MOST else every
    looks = looks_of([(name,) for (name,) in group(best, "optimizer")])
    with matplotlib.rc_context(RC):
        figure, axes = make_panels(len(_SHOWN) * len(steps), columns=len(steps))
        for place, axis in enumerate(axes):
            key, step = _SHOWN[place // len(steps)], steps[place % len(steps)]
            ends = []
            for (name,), same in group([row for row in best if row["step"] == step], "optimizer").items():
                look = looks[name,]
                xs, values = by_size([row for row in same if row.get(key)], "d", key)
                if not xs:
                    continue
                means = [float(np.mean(of)) for of in values]
                spread = [float(np.std(of, ddof=1)) if len(of) > 1 else 0.0 for of in values]
                axis.errorbar(xs, means, yerr=spread, color=look.color, marker=look.marker, markersize=4, capsize=2)
                ends.append((xs[-1], means[-1], look.name, look.text_color))
            if ends:
                log_log(axis, [row["d"] for row in best])
            name_ends(axis, ends)
            axis.set(title=f"step {step}", xlabel="d", ylabel=MEASURED[key])
        handle = Line2D([], [], color="#555555", marker="o", label="mean and sd over seeds, best learning rate")
        finish(figure, f"{best[0]['n_items']} facts, {best[0]['network']}, width {best[0]['hidden'] // best[0]['d']} d",
               [handle])  # fmt: skip
        path = Path(folder) / "recall.png"
        figure.savefig(path, dpi=150)
    return path
