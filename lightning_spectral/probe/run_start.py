"""Opening the folder of a run, once for all that measure in one loop."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from lightning_spectral.probe.agreement import Agreement
from lightning_spectral.probe.host import Host
from lightning_spectral.probe.run_folder import RunFolder, package_versions
from lightning_spectral.records import RunInfo
from lightning_spectral.text import one_line


def open_folder(
    host: Host, agreement: Agreement, *, labels: dict[str, str] | None = None, conventions: dict[str, str] | None = None
) -> RunFolder:
    """The run's folder: that of another observer of this loop if it is the same place, else opened here.

    Every rank must call it: folder and run id are rank 0's.

    Raises:
        ValueError: On every rank, if it cannot be written.
        MissingRankError: If not every rank comes.
    """
    opened = next((folder for folder in host.opened() if folder.wanted == Path(host.folder)), None)
    error = ""
    if opened is not None:
        try:
            opened.reopen()
        except OSError as failed:
            error = _cannot(host, failed)
    else:
        info = RunInfo(
            run_id=host.run_id,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=package_versions(),
            labels=dict(labels or {}),
            conventions=dict(conventions or {}),
            **{"optimizer": "none", **host.describe},
        )
        try:
            opened = RunFolder(
                host.folder,
                info,
                resume=host.resume,
                writes=host.writes and host.is_first,
                makes_room=host.makes_room,
                locks=True,
            )
        except OSError as failed:
            error = _cannot(host, failed)
    said = {"error": error, "run_id": opened.run_id if opened else "", "path": str(opened.path) if opened else ""}
    first = agreement.exchange("run folder", said)[0]
    if first["error"] or opened is None:
        raise ValueError(first["error"] or error)
    opened.path, opened.info = Path(first["path"]), replace(opened.info, run_id=first["run_id"])
    return opened


def _cannot(host: Host, failed: OSError) -> str:
    why = "it is a file" if Path(host.folder).is_file() else one_line(failed)
    return f"the run folder `{host.folder}` cannot be written ({why}); give another `dirpath` (of `observe`: `out`)."
