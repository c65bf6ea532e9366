"""Linear modules of other libraries, adapters and quantised ones: real where the library is there, else by shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_spectral.models.linears import widths_of
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
from tests.models import tiny

ALL = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_and_truth(model: nn.Module):
    """What is recorded of one forward, and what a hook of the test's own sees before each `down_proj`."""
    truth: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith("mlp.down_proj"):
            hook = lambda _, args, name=name: truth.update({f"{name}.post": args[0].detach().flatten(0, -2)})  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    recorder = Recorder(model, find_stacks(model))
    recorder.start(training=False)
    model(tiny.ids())
    call = recorder.collect()[-1]
    recorder.remove()
    for handle in handles:
        handle.remove()
    return call, truth


def check(model: nn.Module, layout: str = "(B, T)"):
    call, truth = rows_and_truth(model)
    assert len(truth) == 2
    assert set(call.rows) == set(truth)
    assert all(torch.equal(call.rows[key], rows) for key, rows in truth.items())
    assert call.layout == layout
    assert torch.equal(call.ids, tiny.ids())


def swapped(make) -> nn.Module:
    """A tiny LLaMA whose linear modules but the head are made anew."""
    model = tiny.hugging_face("llama")
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))
    return model


class ByBuffers(nn.Module):
    """GPTQ, AWQ, AQLM, VPTQ, HIGGS: packed numbers and scales, by whatever name; no `weight`."""

    def __init__(self, like: nn.Linear, spelling: tuple[str, str], numbers: str, parameter: bool) -> None:
        super().__init__()
        setattr(self, spelling[0], like.in_features)
        setattr(self, spelling[1], like.out_features)
        packed = torch.zeros(like.in_features // 4, like.out_features, dtype=torch.int32)
        if parameter:
            setattr(self, numbers, nn.Parameter(packed, requires_grad=False))
        else:
            self.register_buffer(numbers, packed)
        self._plain = [like]  # what it computes; not a module of the tree

    def forward(self, x):
        return self._plain[0](x)


@pytest.mark.parametrize(
    ("spelling", "numbers", "parameter"),
    [
        (("infeatures", "outfeatures"), "qweight", False),
        (("in_features", "out_features"), "qweight", False),
        (("in_features", "out_features"), "codes", True),
        (("in_features", "out_features"), "indices", True),
        (("in_features", "out_features"), "dense", False),
        (("in_features", "out_features"), "W_q", True),
        (("input_size", "output_size"), "weight_packed", True),
    ],
)
def test_quantised_linears_by_shape(spelling, numbers, parameter):
    check(swapped(lambda child: ByBuffers(child, spelling, numbers, parameter)))


def test_a_network_with_the_same_attributes_is_no_projection():
    network = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    network.in_features, network.out_features = 8, 8
    assert widths_of(network) is None


@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_of_peft(dora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=ALL, use_dora=dora)
    check(peft.get_peft_model(tiny.hugging_face("llama"), config))


def test_trained_copies_and_tokens_of_peft():
    """`modules_to_save` trains a copy beside the original; trained tokens use the table's weight without calling it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"], trainable_token_indices=[1, 2])
    model = peft.get_peft_model(tiny.hugging_face("llama"), config)
    call, _ = rows_and_truth(model)
    assert torch.equal(call.ids, tiny.ids())
    assert list(call.rows) == [
        f"base_model.model.model.layers.{n}.mlp.modules_to_save.default.down_proj.post" for n in (0, 1)
    ]
    assert len(find_stacks(model).sites) == 2  # not the originals, which are never called


def test_prompt_tuning_of_peft():
    """Three virtual tokens come from a table of their own, the last that is looked up."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    check(peft.get_peft_model(tiny.hugging_face("llama"), config), "3 before (B, T)")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")

    def make(child):
        options = {"has_fp16_weights": False} if bits == 8 else {"quant_type": "nf4"}
        made = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits](
            child.in_features, child.out_features, bias=False, **options
        )
        made.load_state_dict({"weight": child.weight.data}, strict=False)
        return made.to("cpu")

    check(swapped(make))


def test_optimum_quanto():
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny.hugging_face("llama")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    check(model)


def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny.hugging_face("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    check(model)
