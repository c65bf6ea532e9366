"""Losses of a window, taken where the script itself computes them.

A ``TorchFunctionMode`` sees every call of ``cross_entropy`` (``nll_loss``, ``linear_cross_entropy``) with its own
targets, weights, ``ignore_index`` and chunks, so that nothing has to be guessed about shifts, masks or heads. What was
masked or weighed behind the call (``reduction="none"``) is seen in the gradient that comes back, and a call that no
gradient reaches while others are reached is no part of the loss; in an evaluation, what follows the call is looked at
(``loss_masks``). Where a script makes no such call, the gradient of its
logits shows targets and weights (``loss_gradient``).

Active in windows only, it answers every function with that function's own result, and hooks nodes of the graph, which
only read and go with it. Calls inside a compiled region are not seen. What is compiled while a mode is active is
compiled once more without it, and torch ends a script whose function has too many forms: so it is not active while an
optimizer steps, nor inside modules with compiled regions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from lightning_spectral.models.modes import in_backward, in_function_forward
from lightning_spectral.models.placement import whole
from lightning_spectral.probe.loss_calls import SCORERS, Scored, saved_log_probs
from lightning_spectral.probe.loss_gradient import NOT_PROVEN, read_gradient
from lightning_spectral.probe.loss_masks import Followed

NOT_SEEN = (
    "no cross-entropy over the vocabulary came by: it runs in compiled code, in its own kernel, or not at all; compute "
    "the loss outside of the compiled region (`torch.compiler.disable`)"
)
NO_GRADIENT = (
    "the loss is written by hand, and no gradient came back that shows its targets; call `F.cross_entropy` instead, "
    "which is seen without one"
)
# what normalises logits: their own gradient is that of the logits
_NORMALISERS = {
    torch.log_softmax, torch.softmax, torch.logsumexp, F.log_softmax, F.softmax,
    Tensor.log_softmax, Tensor.softmax, Tensor.logsumexp,
    torch.special.log_softmax, torch.special.softmax, torch.special.logsumexp,
}  # fmt: skip
# what makes logits, for a loss whose normaliser cannot be seen
_PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, torch.einsum}


@dataclass
class _Logits:
    """Logits that may be those of a loss by hand, and what their gradient says once it is there."""

    normalised: bool
    node: tuple[Any, int] | None = None
    values: Tensor | None = None
    came: bool = False
    scored: Scored | None = None


class LossTap(TorchFunctionMode):
    """Collects the predictions that the script scores in a micro-batch.

    Args:
        vocab_sizes: Widths of logits that are over the vocabulary.

    Attributes:
        trouble: Why a call could not be read, if one could not; it never raises.
        reason: Why the micro-batch taken last gave no loss; empty if it did.
    """

    def __init__(self, vocab_sizes: Collection[int]) -> None:
        super().__init__()
        self.vocab_sizes = frozenset(vocab_sizes)
        self.trouble = self.reason = ""
        self.training = True
        self.is_active = False
        self._calls: list[Scored] = []
        self._logits: list[_Logits] = []
        self._handles: list[Any] = []
        self._followed = Followed()
        self._is_suspended = False
        self._of_steps: list[Any] = []

    def start(self, *, training: bool = True) -> None:
        """See calls from now on: those with gradients, or, in an evaluation, all."""
        self.training = training
        if self.is_active:
            return
        self.is_active, self._is_suspended = True, False
        if not self._of_steps:
            before = register_optimizer_step_pre_hook(self._before_step)
            self._of_steps = [before, register_optimizer_step_post_hook(self._after_step)]
        above = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
        for mode in (self, *reversed(above)):  # at the bottom: a context that is left takes the top one away, its own
            _push_mode(mode)

    def stop(self) -> None:
        """See no more calls; gradients still come. Modes that others have entered since stay as they are."""
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

    def suspend(self) -> None:
        """See no calls until the optimizer step that comes now is done."""
        self._is_suspended = self._is_suspended or self.is_active
        self.stop()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not any(map(callable, (*args, *kwargs.values()))):  # a closure computes the loss
            self.suspend()

    def _after_step(self, *_: Any) -> None:
        if self._is_suspended:
            self.start(training=self.training)

    def take(self) -> list[Scored]:
        """What the script has scored since the last call; sees no more of it."""
        self.stop()
        self._is_suspended = False
        for handle in (*self._handles, *self._of_steps):
            handle.remove()
        self._of_steps = []
        self._followed.forget()
        calls, logits = self._calls, self._logits
        self._calls, self._logits, self._handles = [], [], []
        found = [call for call in calls if call.trains is not False] or calls or _by_gradient(logits)
        came = any(entry.came for entry in logits)
        why_not = NOT_PROVEN if came else NO_GRADIENT if any(entry.normalised for entry in logits) else NOT_SEEN
        self.reason = "" if found else self.trouble or why_not
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers as ``func`` would."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        if self._followed or func in SCORERS or func in _NORMALISERS or func in _PRODUCTS:
            try:
                if self._counts():
                    self._look(func, args, kwargs, out)
            except Exception as error:  # the script's own call has succeeded: it must not hear of ours
                self.trouble = f"{type(error).__name__}: {error}"
        return out

    def _counts(self) -> bool:
        if inside_functorch() or in_backward():
            return False
        return not self.training or torch.is_grad_enabled() or in_function_forward()

    def _look(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if func in SCORERS:
                if is_fake(out):
                    return
                known = {"log_probs": saved_log_probs(out)} if func is F.cross_entropy else {}
                scored = SCORERS[func](self.vocab_sizes, *args, **kwargs, **known)
                if scored is not None:
                    self._keep_call(scored, out)
                    return
            if self._followed:
                self._followed.look(func, args, out)
            if self._calls:
                return  # the script has told its loss: nothing is to be found by the gradient
            if func in _PRODUCTS:
                self._keep_logits(out, -1, normalised=False)
            elif func in _NORMALISERS or func in SCORERS:
                logits = args[0] if args else kwargs["input"]
                self._keep_logits(logits, _classes_of(func, logits, args, kwargs), normalised=True)

    def _keep_call(self, scored: Scored, out: Tensor) -> None:
        self._calls.append(scored)
        for entry in self._logits:
            entry.values = None
        self._logits.clear()
        elementwise = out.numel() == scored.targets.numel() > 1
        if out.grad_fn is None:
            if elementwise:
                self._followed.add(out, scored)
            return
        scored.trains = False
        self._watch(out, partial(_call_trains, scored, elementwise))

    def _keep_logits(self, logits: Tensor, classes: int, *, normalised: bool) -> None:
        fits = isinstance(logits, Tensor) and logits.ndim > 0 and logits.shape[classes] in self.vocab_sizes
        if not fits or not logits.is_floating_point() or is_fake(logits):
            return
        node = None if logits.grad_fn is None else (logits.grad_fn, logits.output_nr)
        for known in self._logits:
            if node is not None and known.node == node:
                known.normalised |= normalised
                return
        entry = _Logits(normalised)
        self._logits.append(entry)
        if logits.grad_fn is not None:
            entry.node = node
            entry.values = logits.detach().movedim(classes, -1)
            self._watch(logits, partial(self._gradient_came, entry, classes))

    def _watch(self, tensor: Tensor, came: Callable[[Tensor], None]) -> None:
        """Call with the gradient of a tensor: through its node, so that the tensor itself carries nothing of ours."""
        place = tensor.output_nr

        def look(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[place]
            if gradient is not None:
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    came(gradient.detach())

        assert tensor.grad_fn is not None
        self._handles.append(tensor.grad_fn.register_prehook(look))

    def _gradient_came(self, entry: _Logits, classes: int, gradient: Tensor) -> None:
        values, entry.values, entry.node = entry.values, None, None
        if values is None:
            return
        try:
            entry.came = True
            entry.scored = read_gradient(whole(values), whole(gradient.movedim(classes, -1)))
        except Exception as error:  # in the script's backward pass
            self.trouble = f"{type(error).__name__}: {error}"


def _call_trains(scored: Scored, elementwise: bool, gradient: Tensor) -> None:
    scored.trains = True
    if elementwise:
        scored.weigh(gradient.reshape(-1))


def _by_gradient(logits: list[_Logits]) -> list[Scored]:
    """Those proven at what was normalised; where there are none, at what made logits."""
    for normalised in (True, False):
        found = [entry.scored for entry in logits if entry.scored is not None and entry.normalised == normalised]
        if found:
            return found
    return []


def _classes_of(func: Any, logits: Tensor, args: Any, kwargs: Any) -> int:
    """The axis over which a normaliser runs; that of the classes where ``cross_entropy`` has soft targets."""
    if func in SCORERS:
        return 1 if logits.ndim > 1 else 0
    axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    axis = axis[0] if isinstance(axis, (tuple, list)) and len(axis) == 1 else axis
    return axis if isinstance(axis, int) else -1


def inside_functorch() -> bool:
    """Whether a transform of ``torch.func`` is under way: its tensors must not be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers, as in a trace."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.is_meta
