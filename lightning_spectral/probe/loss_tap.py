"""Losses of a window, taken where the script itself computes them: its calls of ``cross_entropy`` or ``nll_loss``.

A ``TorchFunctionMode`` sees every such call with its own targets, ``ignore_index`` and chunks, so that nothing has to
be guessed about shifts, masks or heads. It is active in windows only, and answers every function with that function's
own result. Code inside a compiled region does not come by.

Axes: N predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

Take = Callable[[Tensor, Tensor, Tensor], None]
_CHUNK_ROWS = 1_024  # log-probabilities of all predictions at once would be the largest tensor around


class LossTap(TorchFunctionMode):
    """Hands every prediction that the script scores to ``take``.

    Args:
        vocab_sizes: Widths of logits that are over the vocabulary.
        take: Gets losses (N,) in nats, whether the most likely token was right (N,), and targets in the shape in which
            the script gave them; ignored ones are ``-1``.

    Attributes:
        trouble: Why a call could not be read, if one could not; it never raises.
    """

    def __init__(self, vocab_sizes: Collection[int], take: Take) -> None:
        super().__init__()
        self.vocab_sizes, self._take = frozenset(vocab_sizes), take
        self.trouble = ""
        self.training = True
        self.is_active = False

    def start(self, *, training: bool = True) -> None:
        """See calls from now on: those with gradients, or, in an evaluation, all."""
        self.training = training
        if not self.is_active:
            self.is_active = True
            _push_mode(self)

    def stop(self) -> None:
        """See no more calls. Modes that others have entered since stay as they are."""
        if not self.is_active:
            return
        self.is_active = False
        above = []
        while torch._C._len_torch_function_stack():
            mode = _pop_mode()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers as ``func`` would."""
        out = func(*args, **(kwargs or {}))
        if (func is F.cross_entropy or func is F.nll_loss) and self._counts():
            try:
                self._score(func, *args, **(kwargs or {}))
            except Exception as error:  # the script's own call has succeeded: it must not hear of ours
                self.trouble = f"{type(error).__name__}: {error}"
        return out

    def _counts(self) -> bool:
        if torch.compiler.is_compiling() or inside_functorch() or inside_backward():
            return False
        return torch.is_grad_enabled() if self.training else True

    def _score(
        self,
        func: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        if target.is_floating_point() or input.ndim < 1 or is_fake(input):
            return
        classes = 1 if input.ndim > 1 else 0
        if input.shape[classes] not in self.vocab_sizes:
            return
        smoothing = {"label_smoothing": label_smoothing} if func is F.cross_entropy and label_smoothing else {}
        with torch.no_grad():
            logits = input.detach()
            logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
            targets = target.detach()
            rows_NV = logits.movedim(classes, -1).reshape(-1, logits.shape[classes])
            flat_N = targets.reshape(-1)
            scored_N = flat_N != ignore_index
            losses_N = torch.zeros(len(flat_N), dtype=torch.float64, device=rows_NV.device)
            right_N = torch.zeros_like(losses_N)
            for start in range(0, len(flat_N), _CHUNK_ROWS):
                part = slice(start, start + _CHUNK_ROWS)
                scores, own = rows_NV[part].float(), flat_N[part].clamp(min=0)
                own = torch.where(scored_N[part], own, 0)
                losses = func(scores, own, reduction="none", **smoothing).double()
                losses_N[part] = torch.where(scored_N[part], losses, 0.0)
                right_N[part] = (scores.argmax(-1) == own).double()
            self._take(losses_N, right_N, torch.where(scored_N, flat_N, -1).view(targets.shape))


def inside_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: what is computed now is recomputation."""
    return torch._C._current_graph_task_id() != -1


def inside_functorch() -> bool:
    """Whether a transform of ``torch.func`` is under way: its tensors must not be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers, as in a trace."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.is_meta
