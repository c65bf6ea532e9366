"""DeepSpeed's ZeRO-3, as a model sees it: parameters are empty but in the forward and backward pass of their module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spectral import observe
from lightning_spectral.probe.observe import plain_host
from lightning_spectral.probe.settings import ProbeSettings
from lightning_spectral.probe.weight_settings import WeightSettings
from lightning_spectral.probe.weight_spectra import WeightObserver
from tests.scripts import toys
from tests.scripts.test_shells import Model, by_key


def partition(model: nn.Module) -> None:
    """Empty every parameter outside of its module's forward and backward pass, and mark it as DeepSpeed does."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for parameter in own:
            parameter.ds_shape, parameter.whole = parameter.shape, parameter.data  # type: ignore[attr-defined]

        def gather(*_: Any, own: list[Any] = own) -> None:
            for parameter in own:
                parameter.data = parameter.whole

        def release(*_: Any, own: list[Any] = own) -> None:
            for parameter in own:
                parameter.data = torch.empty(0)

        if own:
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            module.register_full_backward_pre_hook(gather)
            release()


def records(path: Path, *, partitioned: bool) -> dict[Any, Any]:
    model = Model()
    if partitioned:
        partition(model)
    with observe(model, 1, out=path, counts=toys.counts(), sites=["pre", "post"]) as probe:
        for batch in toys.ids(16, toys.T).split(8):
            model(batch)
            probe.step()
    return by_key(path)


def test_records_are_those_of_whole_parameters(tmp_path: Path) -> None:
    found = records(tmp_path / "parts", partitioned=True)
    assert found == records(tmp_path / "whole", partitioned=False)


def test_spectra_of_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    model = Model()
    partition(model)
    host = plain_host(ProbeSettings(dirpath=str(tmp_path)))
    observer = WeightObserver(WeightSettings(), name="weights", key="weights")
    with pytest.raises(ValueError, match=r"`Model` is held in flat parts by DeepSpeed ZeRO-3.* under ZeRO-2 or less"):
        observer.attach(model, host)
