"""Rows of a user's own, by every way in which they can be given."""

from __future__ import annotations

import json

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_spectral import SpectralRankCallback, TailTokenProbe, observe
from lightning_spectral.models import families
from lightning_spectral.models.families import Hint, as_hints
from lightning_spectral.models.stacks import find_stacks
from tests.models import tiny


class Odd(nn.Module):
    """A block of which no shape says what is what: both projections keep the width of a third dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), nn.MultiheadAttention(16, 2)
        self.expand, self.contract = nn.Linear(16, 20), nn.Linear(10, 16)

    def forward(self, x):
        a, b = self.expand(self.norm(x)).chunk(2, -1)
        return x + self.contract(a * b.sigmoid())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), nn.MultiheadAttention(16, 2)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Hidden(Odd):
    """The same, its two projections with a matrix between that fits neither."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.mix, self.contract = nn.Linear(16, 30), nn.Linear(30, 11), nn.Linear(11, 16)

    def forward(self, x):
        return x + self.contract(self.mix(self.expand(self.norm(x)).relu()).relu())


class Two(nn.Module):
    """An encoder that structure understands, and a decoder of which it understands every second block."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(tiny.VOCAB, 16)
        self.encoder = nn.ModuleList(Plain() for _ in range(2))
        self.decoder = nn.ModuleList([Hidden(), Plain(), Hidden()])

    def forward(self, ids):
        x = self.tok(ids)
        for block in (*self.encoder, *self.decoder):
            x = block(x)
        return x


HINT = Hint("mine", "decoder.*.contract", "decoder.*.expand")
FORMS = [HINT, {"name": "mine", "down": HINT.down, "up": HINT.up}, "decoder.*.contract,decoder.*.expand"]
# path and width, read off the classes above
STRUCTURE = {"encoder.0.down": 40, "encoder.1.down": 40, "decoder.1.down": 40}
HINTED = {"decoder.0.contract": 11, "decoder.2.contract": 11}


@pytest.mark.parametrize("form", FORMS, ids=["object", "mapping", "words"])
def test_a_hint_adds_to_structure_and_replaces_it_nowhere_else(form):
    found = find_stacks(Two(), hints=as_hints([form]))
    assert {site.name: site.width for site in found.sites} == STRUCTURE | HINTED
    assert [(stack.name, stack.num_blocks, [site.layer for site in stack.sites]) for stack in found.stacks] == [
        ("encoder", 2, [0, 1]),
        ("decoder", 3, [0, 1, 2]),
    ]
    assert not found.notes  # no block is left out


def test_without_the_hint_the_blocks_are_named_as_not_measured():
    found = find_stacks(Two())
    assert {site.name: site.width for site in found.sites} == STRUCTURE
    (note,) = found.notes
    assert note.startswith("2 of 3 blocks of `decoder` are not measured")


def test_a_hint_says_where_the_up_projection_is_also_for_globs():
    found = find_stacks(Two(), sites=("pre",), modules=["decoder.0.contract"], hints=[HINT])
    assert [(site.key, site.width) for site in found.sites] == [("decoder.0.expand.pre", 30)]


def test_a_hint_that_matches_nothing_is_told():
    assert (
        "hint `other`: no module matches `*.trunk.*`." in find_stacks(Two(), hints=[Hint("other", "*.trunk.*")]).notes
    )


@pytest.mark.parametrize("bad", [3, {"up": "*.x"}, "a,b,c", {"down": "*.x", "width": 3}, {"down": ""}])
def test_what_is_no_hint_is_refused_with_its_value(bad):
    with pytest.raises(ValueError, match=r"glob"):
        SpectralRankCallback(10, hints=[bad])


def test_an_installed_package_brings_rows(monkeypatch):
    class Entry:
        def load(self):
            return [HINT]

    monkeypatch.setattr(families, "entry_points", lambda group: [Entry()] if group == families.ENTRY_POINT else [])
    families.installed_hints.cache_clear()
    try:
        assert {site.name for site in find_stacks(Two()).sites} == set(STRUCTURE | HINTED)
    finally:
        families.installed_hints.cache_clear()


@pytest.mark.parametrize("kind", [SpectralRankCallback, TailTokenProbe])
@pytest.mark.parametrize("form", FORMS[1:], ids=["mapping", "words"])
def test_a_recipe_or_a_command_line_gives_hints(kind, form):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "probe", fail_untyped=False)
    by_yaml = parser.instantiate_classes(parser.parse_object({"probe": {"hints": [form]}})).probe
    by_word = parser.instantiate_classes(parser.parse_args([f"--probe.hints={json.dumps([form])}"])).probe
    for made in (by_yaml, by_word):
        (hint,) = made.measurement.options.hints
        assert (hint.down, hint.up) == (HINT.down, HINT.up)


def test_observe_records_the_hinted_sites(tmp_path):
    from lightning_spectral import read_spectral

    model = Two()
    with observe(model, 1, out=tmp_path, hints=["decoder.*.contract"]) as probe:
        model(tiny.ids()).square().mean().backward()
        probe.step()
    records = read_spectral(tmp_path).records
    assert {record.module: record.width for record in records} == STRUCTURE | HINTED
    assert torch.isfinite(torch.tensor([record.soft_rank for record in records])).all()
