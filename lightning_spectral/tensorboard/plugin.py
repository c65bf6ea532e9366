"""The plugin that TensorBoard asks: static files, and JSON answers about the run folders below its logdir."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from lightning_spectral.records.looks import optimizer_colors
from lightning_spectral.tensorboard import answers
from lightning_spectral.tensorboard.folders import FoundRuns, prefix_of, roots_of
from lightning_spectral.tensorboard.reader import RunReader
from lightning_spectral.text import one_line

STATIC: Final = Path(__file__).parent / "static"
MAX_RUNS_A_REQUEST: Final = 100

Answer = dict[str, Any]


class SpectralPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """The tab SPECTRAL.

    Args:
        context: TensorBoard's ``TBContext``; its ``logdir`` and ``flags.logdir_spec`` say where runs are.
    """

    plugin_name = "lightning_spectral"

    def __init__(self, context: base_plugin.TBContext) -> None:
        logdir_spec = getattr(context.flags, "logdir_spec", "") or ""
        self.roots = roots_of(context.logdir or "", logdir_spec)
        self.runs = Runs(FoundRuns(self.roots))

    def get_plugin_apps(self) -> dict[str, Any]:
        """Route -> WSGI application."""
        routes: dict[str, Callable[[Request], Answer]] = {
            "/runs": self._runs,
            "/curves": self._curves,
            "/layers": self._layers,
            "/spectra": self._spectra,
            "/exponents": self._exponents,
        }
        return {"/static/*": _static} | {route: _json(answer) for route, answer in routes.items()}

    def is_active(self) -> bool:
        """Whether there is a run folder: else TensorBoard lists the tab among the inactive ones."""
        return bool(self.runs.folders())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Where the page starts and what its tab is called."""
        return base_plugin.FrontendMetadata(
            es_module_path="/static/index.js", tab_name="Spectral", disable_reload=False
        )

    def _runs(self, request: Request) -> Answer:
        found = self.runs.overviews(self.roots)
        return {"runs": found, "palette": optimizer_colors(run["optimizer"] for run in found)}

    def _curves(self, request: Request) -> Answer:
        stage, site, metric = _words(request, "stage", "site", "metric")
        with self.runs.reading(request.args.getlist("run")) as read:
            found = {name: answers.curves(reader, stage, site, metric) for name, reader in read.items()}
        buckets = [bucket for curve in found.values() for bucket in curve["choices"]["buckets"]]
        return {"runs": found, "looks": answers.looks(list(dict.fromkeys(buckets)))}

    def _layers(self, request: Request) -> Answer:
        stage, site, metric, bucket = _words(request, "stage", "site", "metric", "bucket")
        with self.runs.reading(request.args.getlist("run")) as read:
            return {"runs": {name: answers.layers(own, stage, site, metric, bucket) for name, own in read.items()}}

    def _spectra(self, request: Request) -> Answer:
        stage, site, bucket, layer = _words(request, "stage", "site", "bucket", "layer")
        folders = self._chosen(request)
        return {"runs": {name: answers.spectra(own, stage, site, bucket, layer) for name, own in folders.items()}}

    def _exponents(self, request: Request) -> Answer:
        stage, site, metric = _words(request, "stage", "site", "metric")
        return answers.exponents(list(self._chosen(request).values()), stage, site, metric)

    def _chosen(self, request: Request) -> dict[str, Path]:
        folders = self.runs.folders()
        return {name: folders[name] for name in request.args.getlist("run") if name in folders}


class Runs:
    """The runs found and what has been read of them.

    Args:
        folders: Name -> folder of the runs that there are now.
    """

    def __init__(self, folders: Callable[[], Mapping[str, Path]]) -> None:
        self.folders = folders
        self._readers: dict[str, RunReader] = {}
        self._lock = Lock()  # TensorBoard answers requests in threads

    def overviews(self, roots: dict[str, Path]) -> list[Answer]:
        """Every run, from ``run.json`` and the first record only; ``key``: see :func:`~.folders.prefix_of`."""
        with self._lock:
            readers = {name: self._reader(name, folder) for name, folder in self.folders().items()}
            for reader in readers.values():
                reader.describe()
            return [
                answers.overview(name, reader) | {"key": prefix_of(roots, name, reader.folder)}
                for name, reader in readers.items()
            ]

    @contextmanager
    def reading(self, names: list[str]) -> Iterator[dict[str, RunReader]]:
        """Readers of the runs named, up to date, unchanged in the block; names that are no run are left out."""
        with self._lock:
            folders = self.folders()
            out = {name: self._reader(name, folders[name]) for name in names[:MAX_RUNS_A_REQUEST] if name in folders}
            for reader in out.values():
                reader.refresh()
            yield out

    def _reader(self, name: str, folder: Path) -> RunReader:
        known = self._readers.get(name)
        if known is None or known.folder != folder:
            known = self._readers[name] = RunReader(folder)
        return known


def _words(request: Request, *names: str) -> list[str]:
    missing = [name for name in names if name not in request.args]
    if missing:
        raise KeyError(f"the request has no `{missing[0]}`")
    return [request.args[name] for name in names]


def _json(answer: Callable[[Request], Answer]) -> Any:
    """A WSGI application that answers with JSON, also when it fails."""

    @Request.application
    def app(request: Request) -> Response:
        try:
            content, code = answer(request), 200
        except KeyError as error:
            content, code = {"error": one_line(error.args[0])}, 400
        except Exception as error:
            content, code = {"error": f"{type(error).__name__}: {one_line(error)}"}, 500
        return http_util.Respond(request, content, "application/json", code=code)

    return app


@Request.application
def _static(request: Request) -> Response:
    name = request.path.rsplit("/", 1)[-1]
    if name not in {file.name for file in STATIC.iterdir()}:
        return http_util.Respond(request, f"there is no file {name}", "text/plain", code=404)
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    if name.endswith(".js"):
        kind = "text/javascript"  # the machine's own table may say otherwise, and a module needs it
    return http_util.Respond(request, (STATIC / name).read_text(), kind)
