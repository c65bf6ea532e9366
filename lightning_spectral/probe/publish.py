"""Where a window's numbers go: records on disk, scalars to the loop's loggers. What cannot be written is said once."""

from __future__ import annotations

from lightning_spectral.probe.guard import Guard
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.records_of import WindowId, eigenvalue_file, loss_records, spectral_records
from lightning_spectral.probe.results import WindowResult
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.scalars import detail, finite, front_page, loss_scalars
from lightning_spectral.records import SpectralRecord


def publish(
    folder: RunFolder,
    result: WindowResult,
    window: WindowId,
    conventions: dict[str, str],
    host: Host,
    guard: Guard,
    *,
    with_eigenvalues: bool,
    with_layers: bool,
) -> tuple[list[SpectralRecord], Scalars]:
    """Write and log one window; returns its records, and the scalars worth a monitor."""
    records, losses = spectral_records(result, window, conventions), loss_records(result, window)
    writing = f"writing to `{folder.path}`"
    with guard(writing, "not_written"):
        folder.append_spectral(records)
    with guard(writing, "not_written"):  # whatever became of the others
        folder.append_losses(losses)
    with guard(writing, "not_written"):
        if with_eigenvalues and folder.writes and (file := eigenvalue_file(window, result)):
            folder.write_file(*file)
    scalars = {**front_page(records, window.stage), **loss_scalars(losses, window.stage)}
    with guard("logging scalars", "not_logged"):
        if host.is_first:
            layers = detail(records, window.stage) if with_layers else {}
            host.log(finite({**scalars, **layers}), window.step)
    with guard("telling who listens", "not_logged"):
        host.published(records, result)
    guard.take()  # neither touches the next window
    return records, scalars
