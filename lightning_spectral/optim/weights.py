"""How a bf16 weight takes an update that is smaller than its rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_spectral.models.placement import local

if TYPE_CHECKING:
    from lightning_spectral.optim.members import Member

# `nearest` is torch's; the others keep what a bf16 weight (8 bits) would lose.
BF16_WEIGHTS = ("nearest", "stochastic", "compensated")
LOW_BITS = "low_bits"  # state: the 16 bits of an fp32 weight that bf16 has no room for


def keeps_more(weight: Tensor, how: str) -> bool:
    """Whether this local weight needs more than an update in place."""
    return how != "nearest" and weight.dtype == torch.bfloat16


def widened(state: dict[str, Any], held: Tensor) -> Tensor:
    """An fp32 copy of a local bf16 weight, with its low bits where they are kept."""
    if LOW_BITS not in state:
        return held.float()
    high = held.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high | (local(state[LOW_BITS]).to(torch.int32) & 0xFFFF)).view(torch.float32)


def write_back(state: dict[str, Any], held: Tensor, wide: Tensor, member: Member) -> None:
    """Store an fp32 result: upper half in the weight, lower half in ``low_bits`` or, rounded, by the toss of a coin."""
    bits = wide.contiguous().view(torch.int32)
    if LOW_BITS in state:
        local(state[LOW_BITS]).copy_((bits << 16 >> 16).to(torch.int16))
    else:
        noise = _noise(bits.numel(), state["step"], member, held.device).view(bits.shape)
        # a carry out of the mantissa into the exponent is the next number up; NaN and Inf stay what they are
        bits = torch.where(torch.isfinite(wide), bits + noise, bits)
    held.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))


def _noise(count: int, step: Tensor, member: Member, device: torch.device) -> Tensor:
    """16 random bits for each weight of one parameter at one step: the same on all replicas, never torch's global ones.

    A hash of (step, parameter, first entry here, position), computed where the weights are: a generator would need the
    step on the host, which waits for the device to say it.
    """
    box = member.shard.box or (member.shard.span or (0, 0),)
    begin = sum((low + 1) * 31**i for i, (low, _) in enumerate(box))
    seed = (member.index * 7_919 + begin * 104_729 + 12_345) % (1 << 31)
    mixed = _mix(step.to(device, torch.int32) * 1_000_003 + seed)
    return _mix(torch.arange(count, dtype=torch.int32, device=device) * -1_640_531_527 + mixed) & 0xFFFF


def _mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on int32, which wraps; shifts are made logical by masks."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2_048_144_789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1_028_477_387
    return x ^ ((x >> 16) & 0xFFFF)
