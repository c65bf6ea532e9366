"""TensorBoard is really started with the plugin, with and without its fast loader."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from lightning_spectral.tensorboard.plugin import STATIC, SpectralPlugin
from tests.analysis.synthetic import write_one, write_study

NAME = "lightning_spectral"


@contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[str]:
    """Address of a TensorBoard that runs in the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", *options], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                get(f"{url}/data/plugins_listing")
                break
            except OSError:
                if time.monotonic() > deadline:
                    pytest.fail("TensorBoard did not start within 60 s")
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def get(url: str):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.parametrize("options", [(), ("--load_fast=false",)], ids=["default", "load_fast=false"])
def test_the_tab_is_there_and_answers(tmp_path: Path, options: tuple[str, ...]) -> None:
    write_one(tmp_path, "muon", 0.9, 128, layers=2)
    with tensorboard(tmp_path, *options) as url:
        listing = get(f"{url}/data/plugins_listing")
        assert listing[NAME]["enabled"]
        assert listing[NAME]["tab_name"] == "Spectral"
        plugin = f"{url}/data/plugin/{NAME}"
        assert [run["name"] for run in get(f"{plugin}/runs")["runs"]] == ["muon_128_0"]
        query = urllib.parse.urlencode({"run": "muon_128_0", "stage": "train", "site": "post", "metric": "hard_rank"})
        assert get(f"{plugin}/curves?{query}")["runs"]["muon_128_0"]["steps"] == [0, 20, 40, 60, 80, 100]
        with urllib.request.urlopen(f"{plugin}/static/index.js", timeout=20) as script:
            assert script.headers["Content-Type"].startswith("text/javascript")


@pytest.fixture
def client(tmp_path: Path) -> Client:
    write_study(tmp_path, {"muon": 0.9}, (128, 256, 512), layers=2)
    return client_of(tmp_path)


def client_of(logdir: Path) -> Client:
    apps = SpectralPlugin(TBContext(logdir=str(logdir))).get_plugin_apps()

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        return apps["/static/*" if path.startswith("/static/") else path](environ, start_response)

    return Client(app)


QUERY = "stage=train&site=post&metric=hard_rank"


def test_every_route(client: Client) -> None:
    runs = [run["name"] for run in client.get("/runs").json["runs"]]
    assert runs == ["muon_128_0", "muon_256_0", "muon_512_0"]
    chosen = "&".join(f"run={name}" for name in runs)
    assert set(client.get(f"/curves?{QUERY}&{chosen}").json["runs"]) == set(runs)
    assert client.get(f"/layers?{QUERY}&bucket=tail&{chosen}").json["runs"]["muon_512_0"]["layers"]
    assert client.get(f"/spectra?{QUERY}&bucket=tail&layer=layer_01&{chosen}").json["runs"]["muon_128_0"]["steps"] == []
    assert len(client.get(f"/exponents?{QUERY}&{chosen}").json["series"]) == 4


def test_bad_requests_get_a_sentence(client: Client) -> None:
    answer = client.get("/curves?stage=train&site=post")
    assert answer.status_code == 400
    assert answer.json == {"error": "the request has no `metric`"}
    assert client.get(f"/curves?{QUERY}&run=../../etc").json["runs"] == {}
    assert client.get("/static/..%2Fplugin.py").status_code == 404
    assert client.get("/static/nothing.js").status_code == 404


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.replace("https?", ""), file.name
        assert text.isascii(), file.name


def test_neither_torch_nor_lightning_nor_matplotlib_is_imported(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9}, (128, 256), layers=2)
    script = f"""
import sys
from importlib.metadata import entry_points
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client
(entry,) = [e for e in entry_points(group="tensorboard_plugins") if e.name == "lightning-spectral"]
plugin = entry.load()().load(TBContext(logdir={str(tmp_path)!r}))
for route, app in plugin.get_plugin_apps().items():
    if "*" not in route:
        answer = Client(app).get(route + "?{QUERY}&bucket=tail&layer=layer_00&run=muon_128_0&run=muon_256_0")
        assert answer.status_code == 200, (route, answer.text)
print(sorted({{"torch", "lightning", "matplotlib", "litgpt"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "broken", ["lightning_spectral.tensorboard.plugin", "lightning_spectral.analysis.points", "nothing"]
)
def test_a_plugin_that_cannot_be_imported_does_not_stop_tensorboard(tmp_path: Path, broken: str) -> None:
    """As TensorBoard's own start does it: every entry point is loaded, and an error in one would end it."""
    script = f"""
import sys
sys.modules[{broken!r}] = None
from tensorboard import default
from tensorboard.backend.application import make_plugin_loader
from tensorboard.plugins.base_plugin import TBContext
loaders = [make_plugin_loader(spec) for spec in default.get_dynamic_plugins()]
ours = [loader for loader in loaders if type(loader).__name__ == "SpectralLoader"]
assert len(ours) == 1
print("none" if ours[0].load(TBContext(logdir={str(tmp_path)!r})) is None else "plugin")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    works = broken == "nothing"
    assert done.stdout.strip() == ("plugin" if works else "none"), done.stderr
    assert ("no tab SPECTRAL" in done.stderr) is not works


def test_300_runs_open_within_three_seconds(tmp_path: Path) -> None:
    """From the list of runs to the curves of the twelve drawn at first; CPU time, as machines are busy."""
    first = write_one(tmp_path / "group_0", "muon", 0.9, 128, layers=4, steps=range(0, 200, 20))
    for place in range(1, 300):
        folder = tmp_path / f"group_{place % 7}" / f"run_{place}"
        folder.mkdir(parents=True)
        for file in first.iterdir():
            (folder / file.name).write_text(file.read_text().replace('"muon_128_0"', f'"run_{place}"'))
    client = client_of(tmp_path)
    start = time.process_time()
    names = [run["name"] for run in client.get("/runs").json["runs"]]
    chosen = "&".join(f"run={name}" for name in names[:12])
    assert len(client.get(f"/curves?{QUERY}&{chosen}").json["runs"]) == 12
    seconds = time.process_time() - start
    assert len(names) == 300
    assert seconds < 3, f"{seconds:.2f} s"
