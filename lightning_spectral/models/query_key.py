"""Attention modules whose query and key heads can be told apart in their weights, and the largest logits they form.

H query heads, G key heads (each serves H / G query heads), T queries, S keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_spectral.models.fused import head_rows, is_fused_name, latent_rows
from lightning_spectral.models.layouts import is_linear
from lightning_spectral.models.names import clean_name
from lightning_spectral.models.places import Place
from lightning_spectral.models.views import Part, Views

_QUERY = re.compile(r"^((query|q)(_proj|_lin|_head)?|(linear_|to_|w)q)$", re.IGNORECASE)
_KEY = re.compile(r"^((key|k)(_proj|_lin|_head)?|(linear_|to_|w)k)$", re.IGNORECASE)
_LATENT = ("q_b_proj", "kv_b_proj")
_NORMS = ("norm_q", "q_norm", "q_layernorm", "q_layer_norm", "query_norm", "q_ln", "query_layernorm", "qk_norm")
_ROWS_AT_A_TIME = 256  # of the logits that are formed to find their maximum


@dataclass(frozen=True)
class HeadRows:
    """The rows of one parameter (weight or bias) that make every query head, and every key head.

    ``alone`` are rows of queries that meet a key which all heads share (the rotated part of latent attention).
    """

    owner: nn.Module
    attribute: str
    name: str
    transposed: bool
    queries: tuple[Part, ...]
    keys: tuple[Part, ...]
    alone: tuple[Part, ...] = ()

    @property
    def param(self) -> Tensor:
        """As the module has it now: wrappers may replace it."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found

    def views(self, shape: tuple[int, ...]) -> Views:
        """The heads, queries first, then keys and queries alone, as matrices of a parameter of this logical shape."""
        return Views(shape, transposed=self.transposed, parts=(*self.queries, *self.keys, *self.alone))


@dataclass(frozen=True)
class Attention:
    """One attention module."""

    name: str
    module: nn.Module
    num_queries: int
    num_keys: int
    rows: tuple[HeadRows, ...]
    normalises: bool


def find_attentions(model: nn.Module) -> Iterator[Attention]:
    """Every module with a fused query-key-value projection, or with one for queries and one for keys."""
    for raw, module in model.named_modules():
        path = clean_name(raw)
        linear = {name: child for name, child in module.named_children() if is_linear(child)}
        used = [n for n in linear if n in _LATENT or is_fused_name(n) or _QUERY.match(n) or _KEY.match(n)]
        found = [pair for name in used for pair in _rows_of(path, name, linear[name], model)]
        queries = {len(rows.queries) for rows in found if rows.queries}
        keys = {len(rows.keys) for rows in found if rows.keys}
        if len(queries) == len(keys) == 1:
            h, g = queries.pop(), keys.pop()
            if h % g == 0:
                norms = any(getattr(module, name, None) is not None for name in _NORMS)
                yield Attention(path, module, h, g, tuple(found), norms)


def _rows_of(path: str, name: str, child: nn.Module, root: nn.Module) -> Iterator[HeadRows]:
    own = f"{path}.{name}" if path else name
    transposed = type(child).__name__ == "Conv1D"
    outputs = getattr(child, "nf" if transposed else "out_features", None)  # a shard has another shape
    if not isinstance(outputs, int):
        return
    place = Place(own, child, "weight", False, root)
    rows: tuple[tuple[Part, ...], ...] | None = latent_rows(place, outputs)
    if rows is None and name not in _LATENT:
        rows = head_rows(place, outputs)
        if rows is not None and not is_fused_name(name):
            rows = (rows[0], ()) if _QUERY.match(name) else ((), rows[0])
    if rows is None:
        return
    for attribute in ("weight", "bias"):
        if child._parameters.get(attribute) is not None:
            yield HeadRows(child, attribute, f"{own}.{attribute}", transposed and attribute == "weight", *rows)


class LargestLogits(TorchFunctionMode):
    """While active, keeps the largest logit of every head in ``largest``, (H,); -inf where none was formed.

    Sees ``scaled_dot_product_attention`` and, for attention written out, ``softmax`` over (B, H, T, S).

    Args:
        sinks: Logits get one column more before the softmax, and the largest is taken off.
    """

    def __init__(self, sinks: bool = False) -> None:
        super().__init__()
        self.largest: Tensor | None = None
        self._sinks = sinks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what is formed, then do it."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            with torch.no_grad():
                self._keep(largest_logits(*args, **kwargs))
        elif self._sinks and func is torch.cat and _is_with_sinks(*args, **kwargs):
            with torch.no_grad():
                self._keep((args[0] if args else kwargs["tensors"])[0].detach().amax(dim=(0, 2, 3)).float())
        elif func in (torch.softmax, nn.functional.softmax, Tensor.softmax):
            logits = args[0] if args else kwargs["input"]
            if logits.ndim == 4:
                with torch.no_grad():
                    self._keep(logits.detach().amax(dim=(0, 2, 3)).float())
        return func(*args, **kwargs)

    def _keep(self, found: Tensor) -> None:
        self.largest = found if self.largest is None else torch.maximum(self.largest, found)


def _is_with_sinks(tensors: Any, dim: int = 0, **_: Any) -> bool:
    """Whether logits (B, H, T, S) get a last column."""
    two = len(tensors) == 2 and all(one.ndim == 4 for one in tensors)
    return two and dim in (-1, 3) and tensors[0].shape[-1] > 1 and tensors[1].shape[-1] == 1


def largest_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Largest ``q . k * scale`` of every head over what may be attended to; arguments of torch's attention.

    Args:
        query: (B, H, T, size).
        key: (B, G, S, size).
        value: Not used.
        attn_mask: What is False or -inf does not count; a finite bias is no part of the logit here.
        dropout_p: Not used.
        is_causal: Query i sees keys up to i.
        scale: ``size ** -0.5`` when None.
        enable_gqa: Key heads are repeated.

    Returns:
        (H,) in fp32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    length = key.shape[-2]
    largest = query.new_full((query.shape[1],), float("-inf"), dtype=torch.float32)
    for begin in range(0, query.shape[-2], _ROWS_AT_A_TIME):
        rows = query[..., begin : begin + _ROWS_AT_A_TIME, :].detach()
        logits = (rows @ key.detach().mT).float() * scale
        if is_causal:
            seen = torch.arange(length, device=query.device) <= torch.arange(
                begin, begin + rows.shape[-2], device=query.device
            ).unsqueeze(1)
            logits = logits.masked_fill(~seen, float("-inf"))
        if attn_mask is not None:
            part = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., begin : begin + _ROWS_AT_A_TIME, :]
            hidden = ~part if part.dtype == torch.bool else part <= torch.finfo(part.dtype).min / 2
            logits = logits.masked_fill(hidden, float("-inf"))
        largest = torch.maximum(largest, logits.amax(dim=(0, 2, 3)))
    return largest
