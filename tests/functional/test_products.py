from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional import products
from lightning_spectral.functional.packed import packed_size, strip_views, unpack

ON_CPU = [name for name, backend in products.BACKENDS.items() if "cpu" in backend.devices and backend.needs()]


def product_of(name: str, rows: torch.Tensor) -> torch.Tensor:
    packed = torch.zeros(packed_size(rows.shape[1]), dtype=rows.dtype)
    products.BACKENDS[name].run(strip_views(packed, rows.shape[1]), rows)
    return packed


@pytest.mark.parametrize("name", ON_CPU)
@given(num_tokens=st.integers(1, 60), width=st.integers(1, 70), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_every_backend_is_the_symmetric_product(name, num_tokens, width, seed):
    rows = torch.randn(num_tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # fp64 on both sides: 60 terms of order 1 round to 1e-14
    torch.testing.assert_close(unpack(product_of(name, rows), width), rows.mT @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ON_CPU)
def test_backends_add(name):
    rows = torch.randn(40, 24, dtype=torch.float64)
    packed = product_of(name, rows)
    products.BACKENDS[name].run(strip_views(packed, 24), rows)
    torch.testing.assert_close(packed, 2 * product_of(name, rows), rtol=1e-12, atol=1e-12)


def fake_backends(monkeypatch, **runs):
    table = {"strips": products.BACKENDS["strips"]}
    monkeypatch.setattr(
        products, "BACKENDS", table | {name: products.Backend(run, ("cpu",)) for name, run in runs.items()}
    )


def bf16_product(uppers, rows):
    products.strips(uppers, rows.bfloat16().float())


def test_a_fast_wrong_product_is_refused_and_named(monkeypatch):
    fake_backends(monkeypatch, rounding=bf16_product)
    monkeypatch.setattr(products, "_best_time", lambda run, rows: 1.0 if run is products.strips else 0.1)
    chosen = products.calibrate(256)
    assert chosen.name == "strips"
    assert 1e-4 < chosen.errors["rounding"] < 1e-2  # bf16 keeps 8 bits
    assert "rounding refused, error" in str(chosen)


@pytest.mark.parametrize(("share", "name"), [(0.5, "other"), (0.95, "strips")])
def test_only_a_clear_win_changes_the_product(monkeypatch, share, name):
    def other(uppers, rows):
        products.strips(uppers, rows)

    fake_backends(monkeypatch, other=other)
    monkeypatch.setattr(products, "_best_time", lambda run, rows: share if run is other else 1.0)
    chosen = products.calibrate(512)
    assert chosen.name == name
    assert chosen.product is products.BACKENDS[name].run


def test_the_real_calibration_chooses_something_right():
    chosen = products.calibrate(300)
    rows = torch.randn(200, 300)
    assert products.relative_error(chosen.product, rows) < products.TOLERANCE
    assert set(chosen.errors) == set(ON_CPU)


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float32), (512, torch.float64)])
def test_nothing_is_tried_where_nothing_can_be_gained(width, dtype):
    assert products.calibrate(width, dtype) == products.Calibration("strips")


def settings_of_the_process():
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return (
        torch.get_float32_matmul_precision(),
        getattr(matmul, "fp32_precision", None),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
    )


def test_calibration_leaves_the_process_as_it_was():
    before = settings_of_the_process()
    products.calibrate(256)
    assert settings_of_the_process() == before


@pytest.mark.skipif("onednn" not in ON_CPU, reason="this torch has no oneDNN switch")
def test_the_switch_is_put_back_after_an_error():
    before = settings_of_the_process()
    with pytest.raises(RuntimeError, match="Bad in-place call"):
        products.onednn([torch.zeros(3, 5)], torch.zeros(4, 7))
    assert settings_of_the_process() == before


@pytest.mark.skipif("onednn" not in ON_CPU, reason="this torch has one switch for all devices")
def test_a_user_who_allows_bf16_gets_fp32_products_and_keeps_the_setting():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        with products.full_precision(torch.device("cpu")):
            assert products.relative_error(products.strips, torch.randn(256, 256)) < products.TOLERANCE
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before


def test_products_inside_autocast_are_fp32():
    def out_of_place(uppers, rows_ND):  # autocast leaves in-place operations alone, and turns this one into bf16
        for upper, stop in zip(uppers, range(256, 0, -32), strict=True):
            upper += rows_ND[:, 256 - stop : 288 - stop].mT @ rows_ND[:, 256 - stop :]

    rows = torch.randn(256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.relative_error(out_of_place, rows) > 1e-4
        with products.full_precision(torch.device("cpu")):
            assert products.relative_error(out_of_place, rows) < products.TOLERANCE


def test_products_in_a_thread_leave_the_weights_that_autocast_has_cast():
    def products_elsewhere():
        with products.full_precision(torch.device("cpu")):
            pass

    weight, rows = torch.nn.Parameter(torch.randn(8, 8)), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = torch.nn.functional.linear(rows, weight)
        with torch.no_grad():
            weight.zero_()  # not seen by what follows, as long as the cast weight is kept
        thread = threading.Thread(target=products_elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(torch.nn.functional.linear(rows, weight), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_inputs_on_cuda():
    rows = torch.randn(512, 256, device="cuda")
    backend = products.BACKENDS["cuda_bf16"]
    assert products.relative_error(backend.run, rows) < backend.tolerance


@pytest.mark.skipif("onednn" not in ON_CPU, reason="this torch has no oneDNN switch")
def test_two_threads_leave_the_switch_as_it_was():
    rows = torch.randn(64, 64)
    before = settings_of_the_process()

    def work():
        for _ in range(50):
            products.onednn(strip_views(torch.zeros(packed_size(64)), 64), rows)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settings_of_the_process() == before


def test_a_product_is_chosen_for_the_rows_that_flow(monkeypatch):
    """Under mixed precision rows are bf16 and weights are not: the bf16 product must be offered, and only then."""
    from lightning_spectral.probe.grouping import pooled_only
    from lightning_spectral.probe.options import ProbeOptions
    from lightning_spectral.probe.probe import SpectralProbe
    from tests.models import tiny

    used = []

    def low(uppers, rows_ND):
        used.append(len(rows_ND))
        products.strips(uppers, rows_ND)

    backend = products.Backend(low, ("cpu",), activations=torch.bfloat16)
    monkeypatch.setitem(products.BACKENDS, "low", backend)
    monkeypatch.setattr(products, "_best_time", lambda run, rows: 0.1 if run is low else 1.0)
    probe = SpectralProbe(model := tiny.litgpt(intermediate_size=256), pooled_only(), ProbeOptions())
    assert {choice.name for choice in probe.products.values()} == {"strips"}
    for autocast in (False, True, True):
        probe.start(seed=0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(tiny.ids(20, 32))
        probe.collect()
        used.clear()
        probe.end()
        assert bool(used) == autocast
    assert {choice.name for choice in probe.products.values()} == {"low"}
    probe.remove()
