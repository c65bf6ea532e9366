"""Hooks that keep what flows through a model, only while they are armed.

The hooks do two things: look at one Python bool, and, when it is set, put a detached (and maybe thinned) tensor on a
list. Under ``torch.compile`` that costs no graph break, and no recompilation because the lists are empty again at every
call. Nothing is counted, copied to the host or reduced here; :meth:`Taps.collect` hands the tensors over once the
forward is done.

Arming follows the root module's forward, so that a forward pass that activation checkpointing repeats during the
backward pass is not seen twice.

Axes: B sequences, T positions, N kept rows, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.models.families import TappedModel
from lightning_spectral.models.stacks import Site

# Numbers that jitter the kept positions; more positions than this reuse them cyclically.
_NUM_JITTERS = 1 << 16


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass of the root module left behind.

    Attributes:
        ids_BT: Token ids that entered the embedding.
        kept_N: Flat positions ``b * T + t`` of the rows kept, or ``None`` for all of them.
        rows: For each site (by key) its ``(N, D)`` rows, in the order of ``kept_N``.
        tokens: For experts only: the flat position of each of their rows.
        logits_BTV: Output of the head, if it is tapped.
    """

    ids_BT: Tensor
    kept_N: Tensor | None
    rows: dict[str, Tensor]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    logits_BTV: Tensor | None = None


class Taps:
    """The hooks on one model.

    Args:
        tapped: What to hook.
        token_fraction: Share of each sequence's positions to keep, in (0, 1]; positions are drawn evenly along every
            sequence, the same for all sites.
        with_logits: Also keep the head's output.
        follow_forward: Arm from the root's forward. ``False`` where the root's forward is never called (blocks used
            one by one inside ``training_step``): then call :meth:`arm` around what should be seen.
    """

    def __init__(
        self,
        tapped: TappedModel,
        *,
        token_fraction: float = 1.0,
        with_logits: bool = False,
        follow_forward: bool = True,
    ) -> None:
        self.tapped = tapped
        self.open = False
        self.armed = False
        self._paused = False
        self._training_only = True
        self._token_fraction = token_fraction
        self._generator = torch.Generator()
        self._jitter: Tensor | None = None
        self._ids: list[Tensor] = []
        self._kept: list[Tensor | None] = []
        self._rows: dict[str, list[Tensor]] = {site.key: [] for site in tapped.sites}
        self._routes: dict[nn.Module, list[Tensor]] = {
            site.router: [] for site in tapped.sites if site.router is not None
        }
        self._logits: list[Tensor] = []
        self._last_shape: tuple[int, int] | None = None
        self._follow_forward = follow_forward
        self._handles = self._attach(tapped, with_logits)

    @property
    def ids_shape(self) -> tuple[int, int] | None:
        """``(B, T)`` of the latest ids seen while armed."""
        if self._ids:
            self._last_shape = (self._ids[-1].shape[0], self._ids[-1].shape[1])
        return self._last_shape

    def start(self, *, seed: int = 0, training: bool = False) -> None:
        """Open for one micro-batch; ``seed`` draws the kept positions and must be equal on all ranks."""
        self._training_only, self._paused = training, False
        self.discard()
        if self._token_fraction < 1:
            self._generator.manual_seed(seed)
            device = next(iter(self.tapped.embedding.parameters())).device
            self._jitter = torch.rand(_NUM_JITTERS, generator=self._generator).to(device)
        self.open = True
        self.armed = not self._follow_forward

    def arm(self, armed: bool) -> None:
        """Arm or disarm by hand, while open, where the root's forward cannot do it."""
        self._paused = not armed
        if not self._follow_forward or not armed:
            self.armed = armed and self.open

    def discard(self) -> None:
        """Close and forget what was kept."""
        self.open = self.armed = False
        self._kept.clear()
        for kept in (self._ids, self._logits, *self._rows.values(), *self._routes.values()):
            kept.clear()

    def collect(self) -> list[ForwardPass]:
        """Close and return every forward pass since :meth:`start`.

        Raises:
            RuntimeError: If a site did not fire exactly as often as the embedding, or shows a slice of its features.
        """
        self.open = self.armed = False
        _ = self.ids_shape  # remembered beyond the ids themselves
        passes = [self._pass(index) for index in range(self._check_fires())]
        self.discard()
        return passes

    def remove(self) -> None:
        """Take every hook off the model."""
        self.discard()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, tapped: TappedModel, with_logits: bool) -> list[RemovableHandle]:
        handles = [tapped.embedding.register_forward_pre_hook(self._keep_ids)]
        if self._follow_forward:
            handles.append(tapped.root.register_forward_pre_hook(self._on_forward_start))
            handles.append(tapped.root.register_forward_hook(self._on_forward_end, always_call=True))
        for site in tapped.sites:
            if site.site == "post":
                handles.append(site.module.register_forward_pre_hook(self._keep_input(site)))
            else:
                handles.append(site.module.register_forward_hook(self._keep_output(site)))
        handles += [router.register_forward_hook(self._keep_route) for router in self._routes]
        if with_logits and tapped.head is not None:
            handles.append(tapped.head.register_forward_hook(self._keep_logits))
        return handles

    def _on_forward_start(self, module: nn.Module, args: Any) -> None:
        counts = not self._training_only or (module.training and torch.is_grad_enabled())
        self.armed = self.open and not self._paused and counts

    def _on_forward_end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.armed = False

    def _keep_ids(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.armed:
            ids_BT = args[0].detach()
            ids_BT = ids_BT if ids_BT.ndim == 2 else ids_BT.reshape(1, -1)
            self._ids.append(ids_BT)
            self._kept.append(self._draw(*ids_BT.shape) if self._token_fraction < 1 else None)

    def _draw(self, num_sequences: int, num_positions: int) -> Tensor:
        """One position drawn in each of m equal parts of every sequence."""
        assert self._jitter is not None
        kept = max(round(self._token_fraction * num_positions), 1)
        device = self._jitter.device
        index = torch.arange(num_sequences * kept, device=device)
        part = index % kept + self._jitter[index % _NUM_JITTERS]
        position = (part * (num_positions / kept)).long().clamp(max=num_positions - 1)
        return index // kept * num_positions + position

    def _keep_input(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        kept_rows, whole = self._rows[site.key], site.router is not None

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.armed:
                rows = args[0].detach().flatten(0, -2)
                kept = None if whole or not self._kept else self._kept[-1]
                kept_rows.append(rows if kept is None else rows.index_select(0, kept))

        return hook

    def _keep_output(self, site: Site) -> Callable[[nn.Module, Any, Tensor], None]:
        kept_rows, whole = self._rows[site.key], site.router is not None

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.armed:
                rows = output.detach().flatten(0, -2)
                kept = None if whole or not self._kept else self._kept[-1]
                # A copy: the nonlinearity that follows may work in place.
                kept_rows.append(rows.clone() if kept is None else rows.index_select(0, kept))

        return hook

    def _keep_route(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.armed:
            self._routes[module].append(output[1].detach() if isinstance(output, tuple) else output.detach())

    def _keep_logits(self, module: nn.Module, args: Any, output: Tensor) -> None:
        # The head may lie outside the root; it is never recomputed.
        if self.open:
            self._logits.append(output.detach())

    def _check_fires(self) -> int:
        expected = len(self._ids)
        for site in self.tapped.sites:
            fires = len(self._rows[site.key])
            if fires != expected and site.router is None:
                raise RuntimeError(
                    f"`{site.name}` ran {fires} times while the token embedding ran {expected} times in one "
                    "micro-batch, so its rows cannot be matched with tokens. A compiled model that was called before "
                    "the callback attached skips hooks: call `torch._dynamo.reset()` after attaching. For a module "
                    "shared by several layers or skipped by a fast path, name the sites: `modules=[...]`."
                )
        return expected

    def _pass(self, index: int) -> ForwardPass:
        rows: dict[str, Tensor] = {}
        tokens: dict[str, Tensor] = {}
        for site in self.tapped.sites:
            if site.router is not None and index >= len(self._rows[site.key]):
                continue  # an expert that no token chose
            rows[site.key] = _whole(self._rows[site.key][index], site)
            if site.router is not None:
                tokens[site.key] = _routed_tokens(self._routes[site.router][index], site)
        logits = None
        if self._logits:
            per_pass = len(self._logits) // len(self._ids)
            logits = torch.cat(self._logits[index * per_pass : (index + 1) * per_pass], dim=1)
        return ForwardPass(self._ids[index], self._kept[index], rows, tokens, logits)


def _routed_tokens(route: Tensor, site: Site) -> Tensor:
    """Flat positions of the tokens that chose this expert, in the order in which the expert sees them."""
    chosen = route if not route.is_floating_point() else route.topk(site.num_experts_per_token, dim=-1).indices
    return torch.where(chosen.flatten(0, -2).eq(site.expert or 0))[0]


def _whole(rows_ND: Tensor, site: Site) -> Tensor:
    """All features of each row: shards of tensor parallelism are gathered, a bare slice is refused."""
    width = getattr(site.module, "in_features" if site.site == "post" else "out_features", rows_ND.shape[-1])
    if not hasattr(rows_ND, "full_tensor") and rows_ND.shape[-1] != width:
        rows_ND = _as_shard(rows_ND, site, width)
    if hasattr(rows_ND, "full_tensor"):
        rows_ND = rows_ND.full_tensor()
    if rows_ND.shape[-1] != width:
        raise RuntimeError(
            f"`{site.name}` shows {rows_ND.shape[-1]} of its {width} features: a slice of a tensor-parallel layer is "
            "not the layer. Use DTensor-based tensor parallelism (`parallelize_module`): its slices are assembled."
        )
    return rows_ND


def _as_shard(rows_ND: Tensor, site: Site, width: int) -> Tensor:
    """A local output of `ColwiseParallel` as the DTensor that its weight's placement says it is a shard of."""
    weight = getattr(site.module, "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if weight is None or mesh is None:
        return rows_ND
    from torch.distributed.tensor import DTensor, Shard

    tensor_mesh = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim > 1 else mesh  # FSDP2 puts its own dimension first
    features_dim = 0 if site.site == "pre" else 1
    if weight.placements[-1] != Shard(features_dim):
        return rows_ND
    shape = torch.Size((rows_ND.shape[0], width))
    return DTensor.from_local(rows_ND, tensor_mesh, [Shard(1)], run_check=False, shape=shape, stride=(width, 1))
