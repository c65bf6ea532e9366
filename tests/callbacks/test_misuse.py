"""Bad input fails before step 1 with a message that names it; bad data later is a record with a status."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from lightning_spectral.probe.grouping import check_vocabulary
from tests.callbacks import tiny


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        (SpectralRankCallback, {"every_n_steps": 0}, "`every_n_steps` must be an integer >= 1, got 0"),
        (SpectralRankCallback, {"every_n_steps": 2.5}, "got 2.5"),
        (
            SpectralRankCallback,
            {"sites": ["middle"]},
            "`sites` must be a list, each item one of .*middle",
        ),
        (SpectralRankCallback, {"on": ["training"]}, "`on` must be a list of stages"),
        (SpectralRankCallback, {"on": []}, "`on` must be"),
        (SpectralRankCallback, {"token_fraction": 0.0}, r"`token_fraction` must be in \(0, 1\], got 0.0"),
        (SpectralRankCallback, {"num_jackknife_groups": 0}, "`num_jackknife_groups`"),
        (SpectralRankCallback, {"renyi_orders": [-1.0]}, "`renyi_orders` must be > 0"),
        (SpectralRankCallback, {"on_nonfinite": "ignore"}, "`on_nonfinite` must be one of"),
        (SpectralRankCallback, {"convention": "mine"}, "`convention` must be one of"),
        (SpectralRankCallback, {"memory_limit_mib": -1}, "`memory_limit_mib` must be > 0"),
        (SpectralRankCallback, {"sites": "post"}, r"`sites` must be a list, got 'post': write sites=\['post'\]"),
        (SpectralRankCallback, {"modules": "*.mlp"}, r"`modules` must be a list, got '\*.mlp'"),
        (SpectralRankCallback, {"mask_fn": 3}, "`mask_fn` must be a function, got 3"),
        (SpectralRankCallback, {"dirpath": 3}, "`dirpath` must be text, got 3"),
        (SpectralRankCallback, {"labels": ["a"]}, r"`labels` must be names with values, got \['a'\]"),
        (SpectralRankCallback, {"seed": 1.5}, "`seed` must be a whole number, got 1.5"),
        (TailTokenProbe, {"counts": "Stream"}, "no file `Stream`.*`counts='stream'`"),
        (TailTokenProbe, {"head_share": 0.8}, "`head_share` < `mid_share`"),
        (TailTokenProbe, {"attribute_to": "both"}, "`attribute_to`"),
        (TailTokenProbe, {"group_by": "length"}, "`group_by`"),
        (TailTokenProbe, {"counts": [0] * 64}, "`counts`.*all zero"),
        (TailTokenProbe, {"counts": [-1] * 64}, "`counts`.*must be >= 0"),
        (TailTokenProbe, {"counts": "nowhere.npy"}, "no file `nowhere.npy`.*count-tokens"),
    ],
)
def test_bad_arguments(callback, arguments, message):
    with pytest.raises(ValueError, match=message):
        callback(**arguments)


def test_an_argument_that_is_not_there_is_answered_with_the_nearest():
    for kind in (SpectralRankCallback, TailTokenProbe):
        with pytest.raises(TypeError, match=rf"{kind.__name__} has no argument `site`: did you mean `sites`\?"):
            kind(site=["post"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01"])
@pytest.mark.parametrize("name", ["counts.npy", "counts.pt", "counts.txt"])
def test_a_corrupt_counts_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy says that the file is empty, too
        with pytest.raises(ValueError, match=re.escape(str(path))):
            TailTokenProbe(counts=str(path))


def test_counts_of_every_kind_give_the_same_buckets(tmp_path):
    counts = tiny.counts()
    np.save(tmp_path / "c.npy", counts.numpy())
    torch.save(counts, tmp_path / "c.pt")
    np.savetxt(tmp_path / "c.txt", counts.numpy(), fmt="%d")

    class WithCounts(torch.utils.data.Dataset):
        pass

    sources = [
        str(tmp_path / "c.npy"),
        str(tmp_path / "c.pt"),
        str(tmp_path / "c.txt"),
        counts,
        counts.tolist(),
        "stream",
    ]
    rows = []
    for index, source in enumerate(sources):
        folder = tmp_path / str(index)
        module = tiny.Module()
        # the stream holds one token more per sequence than the model is given: count the same ids
        tiny.trainer(folder, [TailTokenProbe(counts=source)], max_steps=1).fit(module, tiny.loader())
        rows.append([(r.bucket, r.num_tokens) for r in read_spectral(folder).records])
    assert all(found == rows[0] for found in rows)


@pytest.mark.parametrize(
    ("num_counts", "num_embedded", "num_known"),
    [
        (50_257, 50_304, None),  # GPT-2's tokenizer, padded to 64
        (151_643, 151_936, None),  # Qwen's
        (1_100, 1_536, 1_100),  # litgpt pads to 512 and says how many are real
        (50_277, 50_304, 50_254),  # counts with special tokens
        (400, 300, None),
    ],
)
def test_a_padded_vocabulary_needs_no_counts_for_its_padding(num_counts, num_embedded, num_known):
    check_vocabulary(num_counts, num_embedded, num_known)


@pytest.mark.parametrize(
    ("num_counts", "num_embedded", "num_known"),
    [(50_257, 151_936, None), (1_100, 1_536, None), (1_000, 1_536, 1_100), (280, 300, None)],
)
def test_counts_of_another_tokenizer_are_refused(num_counts, num_embedded, num_known):
    remedy = f"minlength={num_known or num_embedded}.*count-tokens --tokenizer_dir"
    with pytest.raises(ValueError, match=remedy):
        check_vocabulary(num_counts, num_embedded, num_known)


def test_a_litgpt_model_with_padding_trains_and_an_id_from_the_padding_is_refused(tmp_path):
    counts = torch.ones(40, dtype=torch.int64)

    def fit(name, batch):
        module = tiny.Module(vocab_size=40, padded_vocab_size=64)
        callback = TailTokenProbe(1, counts=counts, dirpath=str(tmp_path / name))
        tiny.trainer(tmp_path, [callback], max_steps=1).fit(module, DataLoader(batch, batch_size=8))
        return read_spectral(tmp_path / name).records

    assert {r.bucket for r in fit("padded", tiny.data()[:8] % 40)} == {"head", "mid", "tail", "pooled"}
    with pytest.warns(UserWarning, match=r"but the table has ids 0 to 39.*count-tokens"):
        records = fit("beyond", tiny.data()[:8])
    assert {r.status for r in records} == {"not_matched"}
    assert all("ids 0 to 39" in r.reason for r in records)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (TailTokenProbe(), "no token counts.*counts='stream'"),
        (TailTokenProbe(counts=[3, 2, 1]), "embeds 64 token ids but the token counts have 3"),
        (SpectralRankCallback(modules=["*.ffn.down"]), "No module matches"),
        (SpectralRankCallback(memory_limit_mib=1e-3), "9/16 D\\^2 x 4 bytes"),
    ],
)
def test_a_bad_set_up_fails_before_step_1(tmp_path, callback, message):
    module, trainer = tiny.Module(), tiny.trainer(tmp_path, [callback])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, tiny.loader())
    assert trainer.global_step == 0
    assert sum(len(m._forward_pre_hooks) for m in module.modules()) == 0


def test_a_model_without_a_feed_forward_network(tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(MisconfigurationException, match="No feed-forward network.*`BoringModel`.*modules="):
        tiny.trainer(tmp_path, [SpectralRankCallback()]).fit(BoringModel())


def test_a_mask_of_another_shape_is_a_status(tmp_path):
    callback = SpectralRankCallback(1, mask_fn=lambda batch: torch.ones(2, 2))
    trainer = tiny.trainer(tmp_path, [callback])
    with pytest.warns(UserWarning, match=r"shape \(2, 2\)"):
        trainer.fit(tiny.Module(), tiny.loader())
    assert trainer.global_step == 4
    records = read_spectral(tmp_path).records
    assert [(r.step, r.status, r.hard_rank) for r in records if r.layer == 0] == [
        (step, "not_matched", None) for step in range(4)
    ]


def test_strict_makes_a_status_an_error(tmp_path):
    callback = SpectralRankCallback(1, mask_fn=lambda batch: torch.ones(2, 2), strict=True)
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        tiny.trainer(tmp_path, [callback]).fit(tiny.Module(), tiny.loader())


class Poisoned(tiny.Module):
    """Its second block's activations become NaN at step 2."""

    def training_step(self, batch, batch_idx):
        def poison(_, args, output):
            return torch.full_like(output, torch.nan) if self.global_step == 2 else output

        handle = self.gpt.transformer.h[1].mlp.fc.register_forward_hook(poison)
        loss = super().training_step(batch, batch_idx)
        handle.remove()
        return loss if self.global_step != 2 else loss.detach().nan_to_num().requires_grad_()


def test_nan_activations_are_a_status_and_one_warning(tmp_path):
    callback = TailTokenProbe(1, counts=tiny.counts())
    with pytest.warns(
        UserWarning, match="NaN or Inf activations at step 2 in `gpt.transformer.h.1.mlp.proj`"
    ) as caught:
        tiny.trainer(tmp_path, [callback]).fit(Poisoned(), tiny.loader())
    assert len([w for w in caught if "NaN or Inf" in str(w.message)]) == 1
    records = read_spectral(tmp_path).records
    bad = [r for r in records if r.status == "nonfinite"]
    assert {(r.step, r.layer) for r in bad} == {(2, 1)}
    assert all(r.hard_rank is None and r.num_tokens > 0 for r in bad)
    assert {r.step for r in records if r.layer == 0 and r.hard_rank} == {0, 1, 2, 3}


def test_nan_can_raise(tmp_path):
    with pytest.raises(RuntimeError, match="NaN or Inf activations at step 2"):
        tiny.trainer(tmp_path, [SpectralRankCallback(1, on_nonfinite="raise")]).fit(Poisoned(), tiny.loader())
    assert max(r.step for r in read_spectral(tmp_path).records) == 2
