"""TensorBoard is really started and asked over HTTP for what a user will look at."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from tests.callbacks import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    callbacks = [SpectralRankCallback(1), TailTokenProbe(1, counts=tiny.counts())]
    trainer = tiny.trainer(path, callbacks, max_steps=8, logger=TensorBoardLogger(path, name="logs", version="mine"))
    trainer.fit(tiny.Module(), tiny.loader())
    return path


@pytest.fixture(scope="module")
def server(run):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run / "logs"), "--port", str(port)]
    process = subprocess.Popen([*command, "--load_fast=false", "--host", "127.0.0.1"], stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}/data/plugin"
    process.terminate()
    process.wait()


def ask(url: str, path: str, ready, seconds: float = 60):
    """Ask until the answer is ready: TensorBoard loads the files in the background."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/{path}", timeout=5) as response:
                answer = json.load(response)
            if ready(answer):
                return answer
        except OSError:
            pass
        time.sleep(0.2)
    return pytest.fail(f"no answer to {path} within {seconds} s")


def test_curves_layout_and_pictures_are_served(run, server):
    tags = ask(server, "scalars/tags", lambda answer: "spectral/hard_rank.tail" in answer.get("mine", {}))["mine"]
    for tag in ("spectral/soft_rank.head", "spectral/asymmetry.pooled", "spectral.hard_rank.post.tail/layer_01"):
        assert tag in tags
    curve = ask(server, "scalars/scalars?run=mine&tag=spectral.hard_rank.post.tail%2Flayer_01", lambda a: len(a) == 8)
    records = {r.step: r for r in read_spectral(run / "logs" / "mine").records if r.layer == 1 and r.bucket == "tail"}
    assert [(int(step), value) for _, step, value in curve] == [
        (step, pytest.approx(records[step].hard_rank, rel=1e-6)) for step in range(8)
    ]
    layout = ask(server, "custom_scalars/layout", lambda answer: answer.get("category"))
    assert [category["title"] for category in layout["category"]] == [
        "1 Rank curves (layer median)",
        "2 Layers",
        "3 Loss by bucket",
        "4 Health",
    ]
    images = ask(server, "images/tags", lambda answer: answer.get("mine"))["mine"]
    assert "spectral_pictures/hard_rank.tail" in images
    assert "spectral_pictures/rank_by_bucket" in images
