"""Rows of sites become moments: they wait until a product over them is efficient, then one sort serves all sites.

Axes: N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_spectral.functional.buckets import sort_by_group
from lightning_spectral.functional.covariance import Moments, add_, empty_moments, update_
from lightning_spectral.functional.packed import packed_size
from lightning_spectral.functional.products import Calibration, Product, calibrate, offered_for, strips
from lightning_spectral.functional.sample import Gram, gram
from lightning_spectral.models.sites import Site
from lightning_spectral.probe.open_window import OpenWindow, Seen

# A product over fewer rows moves more memory than it multiplies: rows wait until there are this many.
FLUSH_ROWS = 2_048


class Accumulator:
    """Adds rows to the moments of a window.

    Args:
        sites: What is measured; may grow.
        num_groups: Buckets x shards.
        parameter: One of the model's, for its device and dtype.

    Attributes:
        products: The fastest correct product for each width and the type of its rows.
        waiting_rows: Rows that wait before they are multiplied.
        on_host: Keep moments on the CPU: each product is made where its rows are, and added there.
    """

    on_host = False

    def __init__(self, sites: Callable[[], Sequence[Site]], num_groups: int, parameter: Tensor) -> None:
        self._sites, self._num_groups = sites, num_groups
        widths = sorted({width for site in sites() if (width := site.width) is not None})
        self.products: dict[int, Calibration] = {}
        if parameter.dtype != torch.float64:
            device, dtype = parameter.device, parameter.dtype
            self.products = {width: calibrate(width, device=device, activations=dtype) for width in widths}
        self._offered = {width: offered_for(parameter.device, parameter.dtype) for width in self.products}
        # Rows may wait while they take no more memory than the moments would: fewer than D of them need no moments.
        moments = [min(width, num_groups * packed_size(width) // width) for width in widths if width]
        self.waiting_rows = max([FLUSH_ROWS, *moments])

    @property
    def state_mib(self) -> float | None:
        """Memory of the moments during a window, MiB; ``None`` if a width is not known before the first forward."""
        widths = [site.width for site in self._sites()]
        if None in widths:
            return None
        return sum(4 * self._num_groups * packed_size(width) for width in widths if width) / 2**20

    @property
    def layers_mib(self) -> dict[int, float]:
        """Of it, what the sites of each depth take."""
        layers: dict[int, float] = {}
        for site in self._sites():
            mib = 4 * self._num_groups * packed_size(site.width or 1) / 2**20
            layers[site.layer] = layers.get(site.layer, 0.0) + mib
        return layers

    @property
    def waiting_mib(self) -> float:
        """Rows that may wait for a product, as fp32, MiB: a model in bf16 keeps half of it."""
        return 4 * self.waiting_rows * sum(site.width or 0 for site in self._sites() if not site.is_routed) / 2**20

    def take(self, window: OpenWindow, site: Site, rows_ND: Tensor, groups_N: Tensor) -> None:
        """Rows of one forward call; those of an expert are few and have groups of their own: they do not wait.

        Args:
            window: Where to.
            site: Whose.
            rows_ND: The rows.
            groups_N: Group of each row, negative to leave it out; sites with equal groups share the tensor.
        """
        if site.is_routed:
            self._add(window, site, rows_ND, *sort_by_group(groups_N, self._num_groups))
            return
        window.waiting.setdefault(site.key, []).append(rows_ND)
        window.groups.setdefault(site.key, []).append(groups_N)

    def flush(self, window: OpenWindow, *, to_be_added: bool = True) -> None:
        """Multiply the rows that wait.

        Args:
            window: Whose.
            to_be_added: More rows may come, from here or from other ranks.
        """
        sorted_by: dict[tuple[int, ...], tuple[list[int], Tensor | None]] = {}  # one sort serves all sites alike
        for site in self._sites():
            waiting, groups = window.waiting.get(site.key), window.groups.get(site.key)
            if not waiting or not groups:
                continue
            same = tuple(id(groups_N) for groups_N in groups)
            if same not in sorted_by:
                sorted_by[same] = sort_by_group(torch.cat(groups), self._num_groups)
            sizes, order_M = sorted_by[same]
            rows_ND = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            waiting.clear()
            few = not to_be_added and site.key not in window.states and sum(sizes) < rows_ND.shape[1]
            if few and not self.on_host:
                # bf16 rows lose digits in a GPU's fast product, and few rows are the steepest spectra
                product = self._product(rows_ND) if rows_ND.device.type == "cpu" else strips
                window.states[site.key] = gram(rows_ND, sizes, order_M, product)
            else:
                self._add(window, site, rows_ND, sizes, order_M)
        window.groups.clear()
        window.num_waiting = 0

    def complete(self, window: OpenWindow, agreed: Seen | None, device: torch.device) -> None:
        """A rank that saw no row of a site still takes part in its reduction.

        Raises:
            RuntimeError: If a site saw no row on this rank and nothing says how wide it is.
        """
        device = torch.device("cpu") if self.on_host else device
        for site in self._sites():
            dtype = torch.float64 if agreed is not None and site.key in agreed.doubles else torch.float32
            if site.key not in window.states and (agreed is None or site.key in agreed.widths):
                width = site.width or (None if agreed is None else agreed.widths[site.key])
                if width is None:
                    raise RuntimeError(f"`{site.name}` saw no row on this rank and does not declare its width.")
                window.states[site.key] = self._empty_state(width, dtype, device)
            state = window.states.get(site.key)
            if isinstance(state, Moments) and dtype == torch.float64:
                window.states[site.key] = replace(state, scatter_GP=state.scatter_GP.double())

    def in_doubles(self, window: OpenWindow) -> list[str]:
        """Keys of the sites whose rows are summed in fp64."""
        return [
            key
            for key, state in window.states.items()
            if isinstance(state, Moments) and state.scatter_GP.dtype == torch.float64
        ]

    def _add(self, window: OpenWindow, site: Site, rows_ND: Tensor, sizes: list[int], order_M: Tensor | None) -> None:
        width, moments = rows_ND.shape[1], window.states.get(site.key)
        assert not isinstance(moments, Gram)
        if self.on_host:
            own = self._empty_state(width, rows_ND.dtype, rows_ND.device)
            before = moments if moments is not None and bool(moments.count_G.any()) else None
            update_(own, rows_ND, sizes, order_M, self._product(rows_ND), None if before is None else before.shift_D)
            if before is None:
                window.states[site.key] = own.to("cpu")
            elif sum(sizes):
                add_(before, own.to("cpu"))
            return
        if moments is None:
            moments = window.states[site.key] = self._empty_state(width, rows_ND.dtype, rows_ND.device)
        update_(moments, rows_ND, sizes, order_M, self._product(rows_ND))

    def _product(self, rows_ND: Tensor) -> Product:
        """The product for these rows: under mixed precision their type, and so what is offered, is not the weights'."""
        width, device = rows_ND.shape[1], rows_ND.device
        if rows_ND.dtype == torch.float64:
            return strips
        offered = offered_for(device, rows_ND.dtype)
        if width not in self.products or self._offered.get(width, offered) != offered:
            self.products[width] = calibrate(width, device=device, activations=rows_ND.dtype)
        self._offered[width] = offered
        return self.products[width].product

    def _empty_state(self, width: int, dtype: torch.dtype, device: torch.device) -> Moments:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return empty_moments(self._num_groups, width, dtype=dtype, device=device)
