"""One step of AdamW over one parameter in readable PyTorch, on any device: the reference for `native/adamw.c`.

    g = factor * gradient                                     factor: what clipping asks for
    m = beta1 m + (1 - beta1) g                               (Kingma and Ba 2015)
    v = beta2 v + (1 - beta2) g^2
    p = decay * p - rate * m / (fix * sqrt(v) + epsilon)      (Loshchilov and Hutter 2019)

    decay = 1 - learning rate * weight decay;  rate = learning rate / (1 - beta1^t);  fix = 1 / sqrt(1 - beta2^t)

Everything is float32, and every operation above is rounded separately, so that all machines and the C kernel give the same
bits.

**A bfloat16 parameter** is rounded to one of its two neighbours at random, in proportion to how near each is (stochastic
rounding): rounding to the nearest would lose every update smaller than 1/512 of the weight.

**Moments in 8 bits** are upcast, updated and rounded back, also stochastically. With rounding to the nearest code, as
published, v would stay constant while gradients grow, since it changes by 0.1 % a step and the gap between two codes is 0.7 %
to 140 %, and a mean without further gradients would never decay. A positive value in v never becomes zero, which would make
the next update m / epsilon. The random bits are counter-based and need no saved state.

Letters: n values, b blocks of 256.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftlm.kernels.counter_rng import mix, uniform_words
from graftlm.kernels.moments import MOMENT_BLOCK, ZERO_MEAN_CODE, Moments, zero_moments
from graftlm.kernels.reference import DYNAMIC_CODE, dynamic_code
from graftlm.kernels.self_check import sample

SLAB = 1 << 22  # values worked on at once, whole blocks: bounds the temporaries whatever the parameter's size
DECADES = 7
OTHER_BITS = 0x2545F491  # turns a value's random word into a second one, for its moments


@dataclass(frozen=True, eq=False)
class Code:
    """A dynamic 8-bit type, with the tables to find a share's position among its magnitudes by arithmetic.

    The magnitudes are 0, then seven decades of S = 1, 2, 4, ... 64 (signed) or 2, 4, ... 128 (unsigned) equally spaced
    values, then 1. A share x in decade d has the place `(x - starts[d]) * density[d + 1]` behind the decade's first value;
    beyond its last one, S - 1, the way to the next decade's first value is another: there the line bends. Index 0 of
    density, last and bend is for shares in front of the first decade.
    """

    values: Tensor  # (256,) float32, the published ones
    starts: Tensor  # (7,) float32, the first value of each decade
    density: Tensor  # (8,) values per unit
    last: Tensor  # (8,) S - 1
    bend: Tensor  # (8,) by how much the density changes beyond the last value
    offset: int  # a decade's first value is magnitude number `S - 1 + offset`
    largest: int  # the number of magnitude 1

    @classmethod
    def of(cls, values: Tensor) -> Code:
        sizes: list[float] = values[values >= 0].tolist()  # 0, the decades, 1
        signed = len(sizes) < 256
        counts = [2**decade * (1 if signed else 2) for decade in range(DECADES)]
        firsts = [1 + sum(counts[:decade]) for decade in range(DECADES)]
        offset = 1 if signed else 0
        starts: list[float] = []
        density, last, bend = [1 / sizes[1]], [-float(offset)], [1.0]
        for first, count in zip(firsts, counts):
            starts.append(sizes[first])
            end = first + count - 1
            beyond = 1 / (sizes[end + 1] - sizes[end])
            density.append((count - 1) / (sizes[end] - sizes[first]) if count > 1 else beyond)
            last.append(float(count - 1))
            bend.append(beyond / density[-1])
        parts = [torch.tensor(part, dtype=torch.float64).float() for part in (starts, density, last, bend)]
        found = cls(values, *parts, offset=offset, largest=len(sizes) - 1)
        while float(found.place(torch.ones(1))[0]) < counts[-1]:  # 1 must be found whatever the rounding
            found.bend[-1] = torch.nextafter(found.bend[-1], torch.tensor(torch.inf))
        return found

    def place(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """shares (n,) in [0, 1] -> how far behind its decade's first value each is, in values (n,), and the decade's S - 1."""
        starts, density, last, bend = (t.to(shares.device) for t in (self.starts, self.density, self.last, self.bend))
        decade = torch.bucketize(shares, starts, right=True, out_int32=True)  # (n,) 0: in front of the first
        start = torch.cat([starts.new_zeros(1), starts])[decade]
        last = last[decade]
        place = (shares - start) * density[decade]
        return torch.where(place > last, (place - last) * bend[decade] + last, place), last

    def pick(self, shares: Tensor, bits: Tensor) -> Tensor:
        """The number of one of the two magnitudes beside each share (n,) int32, at random in proportion to how near it is.

        `bits` (n,) int32 of 0 .. 32767 are the random numbers.
        """
        place, last = self.place(shares)
        index = (place + (bits + 0.5) * 2.0**-15).clamp(max=256).int() + last.int() + self.offset
        return index.clamp(max=self.largest)


MEAN, SQUARE = Code.of(DYNAMIC_CODE), Code.of(dynamic_code(signed=False))


@dataclass(frozen=True, kw_only=True)
class Update:
    """The scalars of one step of one parameter, in the formula above."""

    beta1: float
    beta2: float
    epsilon: float
    rate: float
    decay: float
    fix: float
    factor: float = 1.0
    key: tuple[int | str, ...] = ()
    """The key of the random bits: (seed, name of the parameter, step)."""
    gate: Tensor | None = None
    """() float32 on the parameter's device: where it is not finite, the step changes nothing."""
    first: int = 0
    """The place of the first value in the whole parameter, where this is a part of one: its random words begin there."""


def update_of(
    step: int, learning_rate: float, *, beta1: float, beta2: float, epsilon: float, weight_decay: float, factor: float = 1.0,
    key: tuple[int | str, ...] = (), gate: Tensor | None = None, first: int = 0,
) -> Update:  # fmt: skip
    """The numbers of optimizer step `step`, counted from 1."""
    return Update(
        beta1=beta1, beta2=beta2, epsilon=epsilon, rate=learning_rate / (1 - beta1**step),
        decay=1 - learning_rate * weight_decay, fix=1 / math.sqrt(1 - beta2**step), factor=factor, key=key,
        gate=gate, first=first,
    )  # fmt: skip


def stochastic_round(value: Tensor, words: Tensor) -> Tensor:
    """Round float32 to bfloat16 up or down in proportion to the distance; `words` (numel,) int32 are the random bits.

    A bfloat16 is the upper half of a float32: adding 16 random bits to the lower half and truncating it carries into the upper
    half with exactly that probability.
    """
    bits = value.contiguous().view(torch.int32)
    raised = (bits + (words.view(value.shape) & 0xFFFF)) & -65536
    return raised.view(torch.float32).to(torch.bfloat16)


def dequantized(codes: Tensor, scale: Tensor, code: Code) -> Tensor:
    """codes (n,) uint8 and scale (b,) -> (n,) float32."""
    return code.values.to(codes.device)[codes.int()] * scale.repeat_interleave(MOMENT_BLOCK)[: len(codes)]


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """values (n,) float32 -> each block's largest magnitude (b,), and the magnitudes as shares of it (n,)."""
    sizes = values.abs()
    padded = torch.nn.functional.pad(sizes, (0, -len(values) % MOMENT_BLOCK)).view(-1, MOMENT_BLOCK)
    scale = padded.amax(dim=1)  # (b,)
    divisor = torch.where(scale == 0, 1.0, scale)
    return scale, (padded / divisor[:, None]).view(-1)[: len(values)]


def quantize_mean(mean: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """mean (n,) float32 -> codes (n,) uint8 of the signed type, scale (b,); `words` (n,) int32 are random."""
    scale, shares = _split(mean)
    index = MEAN.pick(shares, words & 0x7FFF)
    # The published type has 1 and no -1: the largest negative code is -0.993.
    signed = torch.where(mean < 0, -index.clamp(max=ZERO_MEAN_CODE), index)
    return (ZERO_MEAN_CODE + signed).to(torch.uint8), scale


def quantize_square(square: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """square (n,) float32, none negative -> codes (n,) uint8 of the unsigned type, scale (b,)."""
    scale, shares = _split(square)
    index = SQUARE.pick(shares, (words >> 17) & 0x7FFF)
    return torch.where(square > 0, index.clamp(min=1), index).to(torch.uint8), scale


def moments_in(moments: Moments, eight_bit: bool, key: tuple[int | str, ...]) -> Moments:
    """The same moments in 8 bits, or in float32; `key` is the key of the random bits."""
    if moments.eight_bit == eight_bit:
        return moments
    if eight_bit:
        words = uniform_words(len(moments.mean), *key, device=moments.device)
        mean, mean_scale = quantize_mean(moments.mean, words)
        square, square_scale = quantize_square(moments.square, words)
        return Moments(mean, square, mean_scale, square_scale)
    assert moments.mean_scale is not None
    assert moments.square_scale is not None
    return Moments(
        dequantized(moments.mean, moments.mean_scale, MEAN), dequantized(moments.square, moments.square_scale, SQUARE)
    )


@torch.no_grad()
def adamw(parameter: Tensor, gradient: Tensor, moments: Moments, update: Update) -> None:
    """One step: `parameter` (float32 or bfloat16, any shape) and `moments` are changed in place.

    `gradient` has the parameter's shape. The moments may be on another device: they are fetched and put back a slab at a
    time, on the current stream.
    """
    if update.gate is not None and not math.isfinite(float(update.gate)):
        return
    flat = parameter.detach().reshape(-1)  # a copy where the parameter has gaps
    gradient = gradient.detach().reshape(-1)
    for first in range(0, flat.numel(), SLAB):
        last = min(first + SLAB, flat.numel())
        _slab(flat[first:last], gradient[first:last], moments_of(moments, first, last), update, first)
    if not parameter.is_contiguous():
        parameter.detach().copy_(flat.view(parameter.shape))


def moments_of(moments: Moments, first: int, last: int) -> Moments:
    """The moments of values first .. last, sharing their memory; `first` begins a block."""

    def blocks(scale: Tensor | None) -> Tensor | None:
        return None if scale is None else scale[first // MOMENT_BLOCK : -(-last // MOMENT_BLOCK)]

    mean_scale, square_scale = blocks(moments.mean_scale), blocks(moments.square_scale)
    return Moments(moments.mean[first:last], moments.square[first:last], mean_scale, square_scale)


def _fetch(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor, or a copy of it on `device`; from pinned memory the copy is made in the stream's turn, without waiting."""
    return tensor.to(device, non_blocking=True)


def _slab(parameter: Tensor, gradient: Tensor, moments: Moments, update: Update, first: int) -> None:
    """The step for values `first` and on; all of them flat."""
    device = parameter.device
    fetched = {name: _fetch(tensor, device) for name, tensor in moments.tensors().items()}
    m, v = fetched["mean"], fetched["square"]  # (n,)
    if moments.eight_bit:
        m = dequantized(m, fetched["mean_scale"], MEAN)
        v = dequantized(v, fetched["square_scale"], SQUARE)
    g = gradient.float() * update.factor
    m = m * update.beta1 + g * (1 - update.beta1)
    v = v * update.beta2 + g.square() * (1 - update.beta2)
    bottom = _root(v) * update.fix + update.epsilon
    value = parameter.float() * update.decay - m / bottom * update.rate

    words = None
    if moments.eight_bit or parameter.dtype != torch.float32:
        words = uniform_words(len(value), *update.key, first=update.first + first, device=device)
    if parameter.dtype == torch.bfloat16:
        assert words is not None
        parameter.copy_(stochastic_round(value, words))
    else:
        parameter.copy_(value)
    new = {"mean": m, "square": v}
    if moments.eight_bit:
        assert words is not None
        other = mix(words ^ OTHER_BITS)
        new["mean"], new["mean_scale"] = quantize_mean(m, other)
        new["square"], new["square_scale"] = quantize_square(v, other)
    for name, tensor in moments.tensors().items():
        tensor.copy_(new[name], non_blocking=True)


def _root(values: Tensor) -> Tensor:
    """The square root, rounded as IEEE 754 wants it; on a CPU PyTorch's (MKL's) is one bit off for 17 % of all values."""
    return values.double().sqrt().float() if values.device.type == "cpu" else values.sqrt()


def sum_of_squares(tensor: Tensor) -> Tensor:
    """The sum of all squares, () float64 on the tensor's device."""
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for first in range(0, flat.numel(), SLAB):
        wide = flat[first : first + SLAB].double()
        total += wide.dot(wide)
    return total


# ---- checks of the faster backends --------------------------------------------------------------------------------


def agrees(step: Callable[[Tensor, Tensor, Moments, Update], None], device: torch.device) -> bool:
    """Whether three of a backend's steps over 1001 values end in these bits, in both types and both kinds of moments."""
    wave = sample(1001, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for eight_bit in (False, True):
            ours, truth = wave.to(dtype, copy=True), wave.to(dtype, copy=True)
            mine, theirs = (zero_moments(1001, eight_bit=eight_bit, device=device) for _ in range(2))
            for number in (1, 2, 3):
                gradient = (wave.roll(number) * 10.0 ** (wave * 4)).to(dtype)
                update = update_of(
                    number, 0.01, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, factor=0.3, key=(7, "check", number)
                )  # fmt: skip
                step(ours, gradient, mine, update)
                adamw(truth, gradient, theirs, update)
                step(ours, gradient, mine, replace(update, gate=wave.new_tensor(math.nan)))  # changes nothing
            pairs = zip((ours, *mine.tensors().values()), (truth, *theirs.tensors().values()))
            if not all(torch.equal(a, b) for a, b in pairs):
                return False
    return True


def many_agree(steps: Callable[[Sequence[tuple[Tensor, Tensor, Moments, Update]]], None], device: torch.device) -> bool:
    """Whether three of a backend's joint steps over parameters of different sizes, rates and decays end in these bits."""
    shapes, rates = ((7, 13), (1001,), (3, 1400)), (0.01, 0.16, 0.04)
    ours, truth = ([sample(*shape, device=device) for shape in shapes] for _ in range(2))
    mine, theirs = ([zero_moments(p.numel(), eight_bit=False, device=device) for p in ours] for _ in range(2))
    for number in (1, 2, 3):
        gradients = [p.roll(number) * 10.0 ** (p * 4) for p in truth]
        updates = [
            update_of(number, r, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=10 * r, factor=0.3) for r in rates
        ]
        steps(list(zip(ours, gradients, mine, updates)))
        for one in zip(truth, gradients, theirs, updates):
            adamw(*one)
    pairs = [*zip(ours, truth), *((a.mean, b.mean) for a, b in zip(mine, theirs))]
    return all(torch.equal(a, b) for a, b in pairs)
