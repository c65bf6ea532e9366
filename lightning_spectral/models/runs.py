"""What was seen of a forward call: the calls of modules around a stack, the runs of its blocks, and their rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_spectral.models.sites import Site, Stack


@dataclass
class Frame:
    """One call of a module that encloses stacks.

    Attributes:
        path: Of the module.
        arguments: Its tensors by name.
        parent: The call around it.
        handling: Whether an exception was being handled when it began.
        failed: Whether an exception of its own ended it.
        goes_round: Whether what the module returned last goes into it; ``None`` where that could not be seen.
    """

    path: str
    arguments: dict[str, Tensor]
    parent: Frame | None = None
    handling: bool = False
    failed: bool = False
    goes_round: bool | None = False

    def chain(self) -> list[Frame]:
        """This frame and those around it, innermost first."""
        return [self, *(self.parent.chain() if self.parent else [])]

    def is_next_pass(self, before: Frame) -> bool | None:
        """Whether the same modules run again, on what the outermost of them returned last; ``None`` if it may be."""
        ours, theirs = self.chain(), before.chain()
        if [frame.path for frame in ours] != [frame.path for frame in theirs]:
            return False
        again = [frame for frame, other in zip(ours, theirs, strict=True) if frame is not other]
        if not again or (again[-1].goes_round is None and len(again) == len(ours)):
            return False  # calls of the whole model
        return again[-1].goes_round


@dataclass
class Piece:
    """Rows of one call of one tapped module, the leading shape that they were kept of, and what a router sent."""

    site: Site
    rows: Tensor
    lead: tuple[int, ...]
    arrived: Tensor | None = None
    sent: Tensor | None = None


@dataclass
class Run:
    """One run of one block."""

    layer: int
    entered: Tensor
    pieces: list[Piece] = field(default_factory=list)
    routed: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class RawCall:
    """Runs of a stack's blocks that belong to one forward call.

    Attributes:
        stack: The stack.
        frame: The call of the module around it, of the latest run.
        num_ids: Embedding calls seen until it began.
        runs: In order.
        unseen: Sites whose rows could not be seen, each with the reason.
        may_go_on: The call before, if this one may be a further pass of it.
    """

    stack: Stack
    frame: Frame | None
    num_ids: int
    runs: list[Run] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)
    may_go_on: RawCall | None = None

    @property
    def entered(self) -> Tensor:
        """What came into the first block that ran."""
        return self.runs[0].entered

    @property
    def failed(self) -> bool:
        """Whether an exception ended it: by its frame, or because the last block gave no rows."""
        if self.frame is not None:
            return any(frame.failed for frame in self.frame.chain())
        layers = {site.layer for site in self.stack.sites if not site.is_routed}
        return bool(layers) and self.runs[-1].layer in layers and not self.runs[-1].pieces

    def continues(self, layer: int, frame: Frame | None, num_ids: int) -> bool:
        """Whether another run of a block still belongs to this call."""
        if frame is not self.frame:
            return frame is not None and self.frame is not None and frame.is_next_pass(self.frame) is True
        if layer not in {run.layer for run in self.runs} or frame is not None:
            return True
        # Blocks that are called one by one: a loop over one of them, or the next pass over all of them.
        return num_ids == self.num_ids and len({run.layer for run in self.runs}) < max(len(self.stack.blocks), 2)


def depths(call: RawCall) -> list[tuple[int, int]]:
    """Depth of each run, and how often its block had run before in this call.

    The depth is the block's index; where blocks run several times (a shared or looped layer), the number of the run.
    """
    occurrences: dict[int, int] = {}
    layers = sorted({run.layer for run in call.runs})
    out = []
    for run in call.runs:
        before = occurrences.get(run.layer, 0)
        occurrences[run.layer] = before + 1
        depth = run.layer if before == 0 else before * len(layers) + layers.index(run.layer)
        out.append((depth, before))
    return out
