"""Keeps what flows through a model's stacks, one micro-batch at a time.

``start`` before a micro-batch, ``collect`` after it; ``pause`` and ``resume`` around the backward pass where the loop
knows it (recomputation inside it is recognised without them in eager code). Once attached, it never raises: what it
could not make sense of is in ``notes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.models.calls import ForwardCall, assemble
from lightning_spectral.models.hooks import Hook, Switch, kept_rows
from lightning_spectral.models.matching import Match, Matcher, is_pass
from lightning_spectral.models.names import argument_names, clean_name
from lightning_spectral.models.parameter_taps import EnterExperts, LeaveExperts
from lightning_spectral.models.placement import whole
from lightning_spectral.models.reader import Reader
from lightning_spectral.models.runs import Piece, RawCall
from lightning_spectral.models.shards import tensor_mesh, whole_positions, whole_rows
from lightning_spectral.models.sites import Found, Site, Stack
from lightning_spectral.models.walk import uncollected


class Recorder:
    """The hooks on one model.

    Args:
        model: The model.
        found: What to hook in it.
        token_fraction: Share of the rows to keep, in (0, 1]; drawn evenly along every sequence, the same for all sites.

    Attributes:
        mesh: The ranks that hold the layers together with this one, under tensor parallelism.
    """

    def __init__(self, model: nn.Module, found: Found, *, token_fraction: float = 1.0) -> None:
        self.sites: list[Site] = list(found.sites)
        self._model, self._found = model, found
        self._switch = Switch(token_fraction)
        self._open = False
        self._keys = {site.key for site in self.sites}
        self._matcher = Matcher(has_tables=bool(found.embeddings))
        self._framed: set[str] = set()
        self.mesh = tensor_mesh(model)
        self._handles: list[RemovableHandle] = []
        with uncollected():
            self._attach(model, found)

    @property
    def notes(self) -> dict[str, str]:
        """What could not be recorded in this window: one sentence for the user by a short cause."""
        return self._switch.notes

    @property
    def num_events(self) -> int:
        """Events since :meth:`start`."""
        return len(self._switch.events)

    @property
    def open(self) -> bool:
        """Whether a micro-batch has been started and not collected."""
        return self._open

    @property
    def listens(self) -> bool:
        """Whether a forward call that came now would be kept."""
        return self._switch.on

    @property
    def is_left_eagerly(self) -> bool:
        """Whether a part of the model is known to be compiled, and eager code sees when what is around it ends."""
        in_place = [name for name, module in self._model.named_modules() if module._compiled_call_impl is not None]
        compiled = in_place or any(type(module).__name__ == "OptimizedModule" for module in self._model.modules())
        if not (compiled or self._switch.was_traced):
            return False
        inside = [f"{clean_name(name)}." if name else "" for name in in_place]
        around = [(path, module) for path, module in self._enclosing if not f"{path}.".startswith(tuple(inside))]
        return any(path or not hasattr(module, "training_step") for path, module in around)  # whose steps are called

    def start(
        self,
        *,
        seed: int = 0,
        training: bool = True,
        first: Callable[[], None] | None = None,
        around: Callable[[bool], None] | None = None,
    ) -> None:
        """Open for one micro-batch.

        Args:
            seed: Draws the kept rows; must be equal on all ranks.
            training: Count only forwards with gradients enabled, of modules in training mode. ``False`` counts every
                forward (evaluation, a pass over a checkpoint).
            first: Called when the first forward that counts reaches a block, in eager code.
            around: Called where eager code enters (``False``) or leaves (``True``) a module that encloses stacks.
        """
        self._switch.clear()
        self._switch.first, self._switch.around = first, around
        self._switch.training = training
        self._switch.seed(seed, self._device())
        self._open = self._switch.on = True

    def keep_at_most(self, max_rows: int) -> None:
        """From now on hooks keep an even share of each call's rows, of at most so many."""
        self._switch.max_rows = max_rows

    def pause(self) -> None:
        """Before the backward pass: what runs now is recomputation."""
        self._switch.on = False

    def resume(self) -> None:
        """After the backward pass."""
        self._switch.on = self._open

    def collect(self) -> list[ForwardCall]:
        """Close and return every forward call since :meth:`start`, in order. Never raises; see :attr:`notes`.

        :attr:`notes` stay until :meth:`discard`. :attr:`sites` grows when a shared or looped layer is seen to run at a
        further depth.
        """
        self._open = self._switch.on = False
        self._switch.first = self._switch.around = None
        calls: list[ForwardCall] = []
        try:
            self._switch.drain()
            calls = self._read()
            self._learn([site for call in calls for site in call.deeper])
        except Exception as error:  # an observer never ends what it observes
            self._switch.note("not_understood", f"A micro-batch could not be read ({type(error).__name__}: {error}).")
        self._switch.clear()
        return calls

    def peek(self) -> list[ForwardCall]:
        """The forward calls since :meth:`start`, those that still go on too; nothing is closed or forgotten."""
        return self._read()

    def discard(self) -> None:
        """Close and forget what was kept, and what was proven about layouts."""
        self._open = self._switch.on = False
        self._switch.clear()
        self._switch.first = self._switch.around = None
        self._switch.notes.clear()
        self._matcher.forget()

    def remove(self) -> None:
        """Take every hook off the model."""
        self.discard()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._switch.hooks.clear()

    # hooks

    def _attach(self, model: nn.Module, found: Found) -> None:
        self._enclosing = enclosing_modules(model, found.stacks)
        for path, module in self._enclosing:
            self._before(module, Hook(self._switch, "open", path, argument_names(module), always=True))
        for path, table in found.embeddings.items():
            self._after(table, Hook(self._switch, "ids", path, always=True))
        for stack in found.stacks:
            by_layer: dict[int, list[Site]] = {}
            for site in stack.sites:
                by_layer.setdefault(site.layer, []).append(site)
            for layer, block in stack.blocks:
                self._before(block, Hook(self._switch, "block", f"{stack.name}.{layer}", (stack, layer)))
                self._attach_sites(by_layer.get(layer, []))
        for path, module in self._enclosing:
            self._after(module, Hook(self._switch, "close", path, always=True), always=True)

    def _attach_sites(self, sites: list[Site]) -> None:
        for router in {id(site.routed_by): site.routed_by for site in sites}.values():
            if router is not None:
                self._before(router, Hook(self._switch, "route", sites[0].name, router))
        self._attach_fused([site for site in sites if site.parameter])
        arrivals = {id(site.up): site.up for site in sites if not site.parameter}
        for up in arrivals.values():
            if up is not None:
                self._before(up, Hook(self._switch, "arrive", sites[0].name, up))
        for site in sites:
            if site.parameter:
                continue
            if site.site == "post":
                self._before(site.module, Hook(self._switch, "rows", site.name, site))
            else:
                self._after(site.module, Hook(self._switch, "output", site.name, site))

    def _attach_fused(self, sites: list[Site]) -> None:
        fused: dict[int, list[Site]] = {}
        for site in sites:
            fused.setdefault(id(site.module), []).append(site)
        for members in fused.values():
            enter = EnterExperts(self._switch, members[0].name, members)
            self._before(members[0].module, enter)
            leave = LeaveExperts(self._switch, members[0].name, members, enter)
            self._after(members[0].module, leave, always=True)

    def _before(self, module: nn.Module, hook: Hook) -> None:
        self._switch.hooks.append(hook)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        hook.place = module._forward_pre_hooks, handle.id
        self._handles.append(handle)

    def _after(self, module: nn.Module, hook: Hook, *, always: bool = False) -> None:
        self._switch.hooks.append(hook)
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always)
        hook.place = module._forward_hooks, handle.id
        self._handles.append(handle)

    def _device(self) -> torch.device:
        parameters = (p for site in self._found.sites[:1] for p in site.module.parameters())
        parameter = next(parameters, None)
        return torch.device("cpu") if parameter is None else parameter.device

    # calls

    def _read(self) -> list[ForwardCall]:
        reader = Reader(self._found.stacks, self._framed)
        for hook, content, traced in self._switch.events:
            reader.take(hook, self._whole_lookup(*content) if hook.kind == "ids" else content, traced)
        kept = self._kept(reader)
        found: list[tuple[RawCall, Match]] = []
        part_of: dict[int, tuple[RawCall, Match]] = {}
        for raw in reader.calls:
            if raw.failed:
                self._switch.note(
                    "failed", f"A forward of `{raw.stack.name}` ended in an exception: it is not measured."
                )
                continue
            self._make_whole(raw)
            match = self._matcher.match(raw, reader.ids)
            call = part_of.get(id(raw.may_go_on))
            if call is not None and is_pass(raw, match, *call):
                call[0].runs += raw.runs
            else:
                call = raw, match
                found.append(call)
            part_of[id(raw)] = call
        return [assemble(raw, match.layout, match.ids, match.reason, kept) for raw, match in found]

    def _kept(self, reader: Reader) -> dict[tuple[int, ...], Tensor]:
        if self._switch.jitter is None:
            return {}
        pieces = [piece for call in reader.calls for run in call.runs for piece in run.pieces]
        leads = {piece.lead for piece in pieces if not piece.site.is_routed}
        return {lead: kept_rows(lead, self._switch.share_of(lead), self._switch.jitter) for lead in leads}

    def _whole_lookup(self, ids: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """All of what an embedding was given and gave."""
        ids = whole(ids)
        return ids, whole_positions(embedded, [tuple(ids.shape)], self.mesh)

    def _make_whole(self, raw: RawCall) -> None:
        """Flatten rows; gather the features and positions that tensor parallelism has spread over ranks."""
        leads = [piece.lead for piece in raw.runs[0].pieces if not piece.site.is_routed]
        raw.runs[0].entered = whole_positions(raw.entered, leads, self.mesh)
        for run in raw.runs:
            pieces: list[Piece] = []
            for piece in run.pieces:
                piece.rows = piece.rows.reshape(-1, piece.rows.shape[-1])
                try:
                    piece.rows = whole_rows(piece.rows, piece.site, self.mesh)
                    pieces.append(piece)
                except ValueError as error:
                    self._switch.note("slice", str(error))
            run.pieces = pieces

    def replaced(self) -> dict[str, str]:
        """Sites whose module the model no longer holds, by key, each with the reason why they have no rows."""
        held = {id(module) for module in self._model.modules()}
        return {
            site.key: f"`{site.name}` was replaced after the measurement began, and what stands there now is not "
            "measured: begin it again after such a change"
            for site in self.sites
            if id(site.module) not in held
        }

    def know(self, deeper: Mapping[str, tuple[str, str, int, int]]) -> None:
        """Add sites that other ranks saw: name, site, depth and run by key."""
        bases = {(site.name, site.site): site for site in self.sites if site.run == 0}
        found = [
            replace(bases[name, kind], layer=layer, run=run)
            for name, kind, layer, run in deeper.values()
            if (name, kind) in bases
        ]
        self._learn(found)

    def _learn(self, sites: Sequence[Site]) -> None:
        """Sites at further depths, where a layer was seen to run several times."""
        new = {site.key: site for site in sites if site.key not in self._keys}
        if new:
            self._keys |= set(new)
            order = {stack.name: index for index, stack in enumerate(self._found.stacks)}
            self.sites.extend(new.values())
            self.sites.sort(key=lambda site: (order[site.stack], site.layer, site.run, site.key))


def enclosing_modules(model: nn.Module, stacks: Sequence[Stack]) -> list[tuple[str, nn.Module]]:
    """Modules with a forward of their own around the stacks, outermost first."""
    around = {""}
    for stack in stacks:
        parts = stack.name.split(".")
        around |= {".".join(parts[:end]) for end in range(1, len(parts))}
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        path = clean_name(name)
        if id(module) in seen or path not in around:
            return
        seen.add(id(module))
        # the hooks of a compiled original would be compiled each for itself; those of its wrapper run outside
        if name.rpartition(".")[2] != "_orig_mod" and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found.append((path, module))
        for child_name, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return found
