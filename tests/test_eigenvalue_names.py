"""Spectra of several stacks in one file have names of their own, and files of earlier versions are still read."""

from __future__ import annotations

from lightning_spectral.records import eigenvalues_key, find_eigenvalues


def test_stacks_and_second_networks_do_not_collide() -> None:
    keys = {
        eigenvalues_key("layer_00", "post", "tail", stack="encoder.layers"),
        eigenvalues_key("layer_00", "post", "tail", stack="decoder.layers"),
        eigenvalues_key("layer_00", "post", "tail", stack="decoder.layers", module="decoder.layers.0.mlp2"),
        eigenvalues_key("layer_00", "post", "tail"),
    }
    assert len(keys) == 4


def test_a_name_is_found_by_its_stack_by_the_first_stack_and_without() -> None:
    keys = [eigenvalues_key("layer_00", "post", "tail", stack=stack) for stack in ("decoder", "encoder")]
    assert find_eigenvalues(keys, "layer_00", "post", "tail", stack="encoder") == keys[1]
    assert find_eigenvalues(keys, "layer_00", "post", "tail", stacks="decoder\nencoder") == keys[0]
    assert find_eigenvalues(keys, "layer_01", "post", "tail", stacks="decoder\nencoder") is None
    old = [eigenvalues_key("layer_00", "post", "tail")]
    assert find_eigenvalues(old, "layer_00", "post", "tail", stack="model.layers") == old[0]
