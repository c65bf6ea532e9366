"""An evaluation under way: a window per dataloader, and the training window that it interrupts."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_spectral.probe.open_window import OpenWindow
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.run_folder import RunFolder


@dataclass
class WindowState:
    """An open window: of the step about to be taken, or of one dataloader of an evaluation.

    Attributes:
        step: Optimizer steps done, if known.
        tokens_seen: Training tokens before it, if known.
        num_micro_batches: Micro-batches begun.
        trouble: Status and reason of what went wrong in it.
        note: What was seen but not understood.
        contents: What it has accumulated, while another window is in the probe.
    """

    step: int | None
    tokens_seen: int | None
    num_micro_batches: int = 0
    trouble: tuple[str, str] | None = None
    note: str = ""
    contents: OpenWindow | None = None


@dataclass
class Evaluation:
    """Each window stays open until the evaluation ends, since ranks come to the next dataloader at different times."""

    stage: str
    interrupted: OpenWindow
    windows: dict[int | None, WindowState] = field(default_factory=dict)
    current: int | None = None

    def switch(self, probe: SpectralProbe, loader: int | None) -> None:
        """Put the window of a dataloader into the probe."""
        if loader in self.windows and loader == self.current:
            return
        if self.current in self.windows:
            self.windows[self.current].contents = probe.begin()
        else:
            probe.begin()
        window = self.windows.setdefault(loader, WindowState(None, None))
        if window.contents is not None:
            probe.window, window.contents = window.contents, None
        self.current = loader


class Ordinals:
    """How many evaluations of a stage there were at the same step.

    Attributes:
        last: By stage: the step evaluated last, and how often.
    """

    def __init__(self, last: dict[str, list[int | None]] | None = None) -> None:
        self.last = dict(last or {})

    def next(self, stage: str, step: int | None, folder: RunFolder | None, *, trains: bool) -> int:
        """Ordinal of the evaluation about to be written.

        Args:
            stage: Its stage.
            step: Its step, if known.
            folder: Where it goes; asked what is there, in a loop that only evaluates.
            trains: Whether the loop takes steps.
        """
        last, count = self.last.get(stage, (None, None))
        if count is None and folder is not None:
            ordinal = 0 if trains else folder.next_ordinal(stage, step)
        else:
            ordinal = (count or 0) + 1 if last == step else 0
        self.last[stage] = [step, ordinal]
        return ordinal
