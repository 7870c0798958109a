"""FlexBCQ: a uniform quantizer composed with an inner binary-coding quantizer, and three methods it contains.

Paper: *Flexible Binary-coding Quantization for Large Language Models* (ICLR 2025 submission 8982), published as
UniQuanF, *Unifying Uniform and Binary-coding Quantization for Accurate Compression of Large Language Models* (ACL 2025,
arXiv 2506.03781).

A weight passes three stations:

    transform   v  = w / (scale * s_elem * s_row) + zero_point
    map         q  = the level nearest to v,  levels = { sum_i alpha_i b_i + shift : b in {-1, +1}^n_bits }
    back        w^ = scale * (q - zero_point)

With alpha = 2^(n_bits-2), .., 1, 1/2 and shift = (2^n_bits - 1) / 2 the levels are the integers 0 .. 2^n_bits - 1 and
the map is round-and-clip: a uniform quantizer. Learning the levels makes it a BCQ, learning the factors s (they move a
weight to another level without moving the levels) makes it FlexRound, learning both makes it FlexBCQ:

                        levels fixed    levels learned
    mapping fixed       rtn             bcq
    mapping learned     flexround       flexbcq

Whatever was learned, `fold` turns it into plain BCQ: w^ = sum_i alpha*_i b_i + shift*.

    in the literature              here             shape
    Delta, z_U                     scale, zero_point (n_groups, 1)
    S_2, s_3 of FlexRound          s_elem, s_row    (n_groups, group_size), (out_features, 1)
    alpha, z_B                     alpha, shift     (n_groups, n_bits), (n_groups, 1)
    B                              codes            (n_groups, group_size) uint8, bit by bit the signs (see kernel.py)

    layer = FlexBCQLinear(linear.weight, n_bits=3, group_size=128)   # unified initialization
    layer(x)                                                         # fake-quantized, differentiable
    layer.pack()                                                     # -> kernel.BCQLinear

`python flexbcq.py` measures initialization and a training step on this machine.
"""

import argparse
import itertools
import multiprocessing
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import guarded
from kernel import BCQLinear, columns_per_group

METHODS = {  # name -> (learn_mapping, learn_levels)
    "rtn": (False, False),
    "bcq": (False, True),
    "flexround": (True, False),
    "flexbcq": (True, True),
}


def parts(*tensors: Tensor | None):
    """The same runs of groups from each tensor (n_groups, ...), None from None; the first is (n_groups, group_size).

    So many weights at a time that what is computed from them stays in a CPU's cache, or keeps a GPU busy."""
    n_weights = 2**18 if tensors[0].device.type == "cpu" else 2**22
    n_groups = max(1, n_weights // tensors[0].shape[1])
    return zip(*(itertools.repeat(None) if t is None else t.split(n_groups) for t in tensors))


# ------------------------------------------------------------------------------------------------ levels and mapping


def sign_patterns(n_bits: int, like: Tensor) -> Tensor:
    """(2^n_bits, n_bits) in {-1, +1}: row c holds the bits of code c, the most significant first."""
    codes = torch.arange(2**n_bits, device=like.device)
    places = torch.arange(n_bits - 1, -1, -1, device=like.device)
    return ((codes[:, None] >> places) & 1).to(like.dtype) * 2 - 1


def levels(alpha: Tensor, shift: Tensor) -> Tensor:
    """The value of every code. alpha: (n_groups, n_bits), shift: (n_groups, 1) -> (n_groups, 2^n_bits), unsorted."""
    return alpha @ sign_patterns(alpha.shape[1], alpha).T + shift


def uniform_levels(n_bits: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (n_bits,) and shift () that make code c the level c."""
    alpha = 2.0 ** torch.arange(n_bits - 2, -2, -1, device=like.device, dtype=like.dtype)
    return alpha, alpha.sum()  # (2^n_bits - 1) / 2


def midpoints(sorted_levels: Tensor) -> Tensor:
    """(n_groups, m) ascending -> (n_groups, m - 1): where the nearest level changes; a tie goes to the lower level."""
    return (sorted_levels[:, 1:] + sorted_levels[:, :-1]) / 2


def nearest(v: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """Direct mapping: the code of the nearest level. v: (n_groups, group_size) -> codes, same shape, uint8."""
    values, order = levels(alpha, shift).sort(dim=1)  # order[g, r]: the code of the r-th smallest level
    rank = torch.searchsorted(midpoints(values), v.contiguous())  # midpoints below v: the place of the nearest level
    return order.to(torch.uint8).gather(1, rank)


def nearest_nearby(v: Tensor, codes: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """Local mapping: the nearest among the present level and its two neighbours by value. Shapes as in `nearest`.

    The released code takes codes +- 1 for neighbours, which is by value only while alphas are in order."""
    values, order = levels(alpha, shift).sort(dim=1)
    rank = order.argsort(dim=1)  # rank[g, c]: the place of code c by value
    order = order.to(torch.uint8)
    middle, infinity = midpoints(values), torch.full_like(values[:, :1], torch.inf)
    of_rank = (
        torch.cat((-infinity, middle), 1),  # where the level below begins to be nearer
        torch.cat((middle, infinity), 1),  # .. and the level above
        torch.cat((order[:, :1], order[:, :-1]), 1),  # code of the level below
        torch.cat((order[:, 1:], order[:, -1:]), 1),  # code of the level above
    )
    index = codes.long()
    lower, upper, below, above = (table.gather(1, rank).gather(1, index) for table in of_rank)
    return torch.where(v > upper, above, torch.where(v <= lower, below, codes))


# ------------------------------------------------------------------------------------------------- initialization


def prefix_sums(x: Tensor) -> Tensor:
    """(n_groups, n) -> (n_groups, n + 1): column j is the sum of the first j."""
    return F.pad(x.cumsum(1), (1, 0))


class SortedGroups:
    """All that the alternating update needs to know of the weights.

    Within a group the problem is one-dimensional (ours): with the weights in order, those of a level are a run between
    two midpoints, and prefix sums give its count and its sum without looking at a weight again. With importances
    instead of ones, all are weighted: the squared error is sum_j h_j (w_j - q_j)^2."""

    def __init__(self, w: Tensor, importance: Tensor | None = None):
        """w, importance: (n_groups, group_size)."""
        self.w, order = w.sort(dim=1)
        h = (torch.ones_like(w) if importance is None else importance.gather(1, order)).double()
        self.counts, self.sums = prefix_sums(h), prefix_sums(h * self.w)
        self.energy = (h * self.w.double().square()).sum(1, keepdim=True)

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """How many weights are nearest to each value, and their sum. All (n_groups, m); values ascending."""
        ends = torch.searchsorted(self.w, midpoints(values).to(self.w.dtype), right=True)
        ends = F.pad(F.pad(ends, (1, 0)), (0, 1), value=self.w.shape[1])  # level r owns ends[r] .. ends[r + 1]
        return self.counts.gather(1, ends).diff(dim=1), self.sums.gather(1, ends).diff(dim=1)


def alternating_update(
    groups: SortedGroups, alpha: Tensor, shift: Tensor, n_rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit levels (Xu et al. 2018): codes fixed, least squares for alpha and shift; those fixed, the nearest codes.

    alpha: (n_groups, n_bits), shift: (n_groups, 1), where to start
    Returns alpha, shift and the squared error of each group, (n_groups, 1), in float64. The error never rises."""
    theta = torch.cat((alpha, shift), 1).double()  # (n_groups, n_bits + 1)
    features = F.pad(sign_patterns(alpha.shape[1], theta), (0, 1), value=1.0)  # (2^n_bits, n_bits + 1): b_1 .. b_k, 1
    products = (features.unsqueeze(2) * features.unsqueeze(1)).flatten(1)
    eye = torch.eye(theta.shape[1], dtype=theta.dtype, device=theta.device)
    damping = (1e-9 * groups.counts[:, -1:, None]).clamp(min=1e-30) * eye
    for _ in range(n_rounds):
        values, order = (theta @ features.T).sort(dim=1)
        count, total = groups.split(values)
        # the normal equations for the change of theta, damped because a bit may not vary; `features` goes by code
        gram = (torch.zeros_like(count).scatter_(1, order, count) @ products).unflatten(1, eye.shape)
        residual = torch.zeros_like(total).scatter_(1, order, total - count * values) @ features
        theta = theta + torch.linalg.solve(gram + damping, residual)
    values = (theta @ features.T).sort(dim=1).values
    count, total = groups.split(values)
    error = groups.energy + (values * (values * count - 2 * total)).sum(1, keepdim=True)
    return theta[:, :-1], theta[:, -1:], error.clamp(min=0)


def uniform_range(w: Tensor, n_bits: int, ratio: float = 1.0, whole: bool = True) -> tuple[Tensor, Tensor]:
    """scale and zero_point, (n_groups, 1) each, of uniform levels over the range of each group shrunk by `ratio`.

    whole: zero_point is an integer and the range includes 0, so that a weight of 0 stays 0, as RTN usually has it."""
    low, high = w.amin(1, keepdim=True) * ratio, w.amax(1, keepdim=True) * ratio
    if whole:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**n_bits - 1)).clamp(min=1e-8)
    return scale, torch.round(-low / scale) if whole else -low / scale


def initialize(
    w: Tensor, n_bits: int, n_ratios: int, n_rounds: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unified initialization: over `n_ratios` clipping ratios, uniform levels improved by `n_rounds` of alternating
    update; per group the best by squared error stays. Without a round: uniform levels as RTN has them, with an integer
    zero_point and 0 in the range. w, importance: (n_groups, group_size) float.

    Returns scale, zero_point (n_groups, 1) and, in units of scale, alpha (n_groups, n_bits) and shift (n_groups, 1)."""
    found = torch.cat([_initialize_part(n_bits, n_ratios, n_rounds, *part) for part in parts(w, importance)])
    # parameters must be contiguous: a fused Adam walks over their memory without looking at strides
    return tuple(x.contiguous() for x in found.to(w.dtype).split((1, 1, n_bits, 1), dim=1))


def _initialize_part(n_bits: int, n_ratios: int, n_rounds: int, w: Tensor, importance: Tensor | None) -> Tensor:
    groups = SortedGroups(w, importance)
    alpha_uniform, shift_uniform = uniform_levels(n_bits, w)
    best, best_error = None, torch.inf
    for ratio in torch.linspace(1, 0.2, n_ratios).tolist():
        scale, zero_point = uniform_range(w, n_bits, ratio, whole=n_rounds == 0)
        start = scale * alpha_uniform, scale * (shift_uniform - zero_point)
        if n_rounds == 0:  # exactly uniform, not a rounding error beside it
            found = torch.cat((scale, zero_point, alpha_uniform.expand(len(w), -1), shift_uniform.expand(len(w), 1)), 1)
            error = alternating_update(groups, *start, 0)[2]
        else:
            alpha, shift, error = alternating_update(groups, *start, n_rounds)
            found = torch.cat((scale, zero_point, alpha / scale, shift / scale + zero_point), 1)
        best = found if best is None else torch.where(error < best_error, found, best)
        best_error = error.clamp(max=best_error)
    return best


# ------------------------------------------------------------------------------------------------- the quantizer


class Quantize(torch.autograd.Function):
    """w^ = scale * (levels[codes] - zero_point), with the gradient of the paper written out.

    Rounding has no useful derivative, so the map passes gradients straight through: dq/dv = 1, and dq/dalpha_i = b_i
    with the codes held fixed (Bengio et al. 2013). Where |v - q| > tau * min |alpha_i| the level is too far away for
    that to be true and nothing flows, neither to v nor to the levels (gradient filtering; with tau = 1 and uniform
    levels, just after a mapping, these are exactly the clipped weights).
    With u = v - zero_point = w / (scale * s_elem * s_row), g = dL/dw^:

        g_v            = g * scale                                  where not filtered, else 0
        dL/dlog s_elem = -g_v * u
        dL/dscale      = (sum(g * w^) - sum(g_v * u)) / scale       sums over the group
        dL/dalpha_i    = sum(g_v * b_i),   dL/dshift = sum(g_v)

    The only (n, ..) tensors kept for the backward pass are those that exist anyway: w, log_s_elem, codes and w^."""

    @staticmethod
    def forward(ctx, w, scale, zero_point, log_s_elem, alpha, shift, codes, tau):
        """w, log_s_elem: (n_groups, group_size); codes: the same, uint8; scale (learned factors of the group and the
        row in it), zero_point, shift: (n_groups, 1); alpha: (n_groups, n_bits). Returns w^ like w, in scale's dtype."""
        values = scale * (levels(alpha, shift) - zero_point)
        quantized = torch.empty_like(codes, dtype=values.dtype)
        for out, value, code in parts(quantized, values, codes):
            torch.gather(value, 1, code.long(), out=out)
        ctx.save_for_backward(w, scale, log_s_elem, alpha, codes, quantized)
        ctx.tau = tau
        return quantized

    @staticmethod
    def backward(ctx, g):
        g_log_s = torch.empty_like(g)
        sums = [gradients(*part, ctx.tau) for part in parts(g_log_s, g, *ctx.saved_tensors)]
        g_scale, g_alpha, g_shift = map(torch.cat, zip(*sums))
        return None, g_scale, None, g_log_s if ctx.needs_input_grad[3] else None, g_alpha, g_shift, None, None


def gradients(g_log_s, g, w, scale, log_s_elem, alpha, codes, quantized, tau):
    """The formulas of `Quantize` for some groups. Fills g_log_s; returns those of scale, alpha and shift."""
    u = transform(w, scale, log_s_elem)
    g_v = g * scale
    distance = (quantized / scale).sub_(u).abs_()  # |q - v|
    g_v.masked_fill_(distance > tau * alpha.abs().amin(1, keepdim=True), 0)
    g_shift, n_bits = g_v.sum(1, keepdim=True), alpha.shape[1]
    plus = [(g_v * ((codes >> (n_bits - 1 - i)) & 1)).sum(1, keepdim=True) for i in range(n_bits)]
    g_alpha = 2 * torch.cat(plus, 1) - g_shift  # the sum where b_i = +1 minus the sum where it is -1
    torch.mul(g_v, u, out=g_log_s).neg_()
    g_scale = ((g * quantized).sum(1, keepdim=True) + g_log_s.sum(1, keepdim=True)) / scale
    return g_scale, g_alpha, g_shift


def transform(w: Tensor, scale: Tensor, log_s_elem: Tensor | None) -> Tensor:
    """u = w / (scale * s_elem), all as in `Quantize.forward`; v is u + zero_point."""
    return w / scale if log_s_elem is None else torch.exp(-log_s_elem).mul_(w).div_(scale)


class FlexBCQLinear(nn.Module):
    """A linear layer whose weight is quantized on the fly: all four methods of `METHODS` by its two switches.

    weight:        (out_features, in_features), kept in its dtype
    learn_mapping: scale, s_elem and s_row are parameters (as logarithms, from 0)
    learn_levels:  alpha and shift are fitted at the start and parameters
    n_ratios, n_rounds, importance: of `initialize`, except that importance is (in_features,), the mean or sum of
                   squares of each input: the diagonal of the Hessian of the layer's output error. None: all columns
                   count alike
    tau:           of `Quantize`
    The codes are state that only `remap` changes, so `forward` is pure. Raises ValueError on a bad size or NaN."""

    def __init__(
        self, weight, n_bits, group_size=-1, learn_mapping=True, learn_levels=True, n_ratios=10, n_rounds=15,
        importance=None, tau=1.0,
    ):  # fmt: skip
        super().__init__()
        if n_bits not in range(1, 9):
            raise ValueError(f"{n_bits} bits: choose 1 to 8")
        if not weight.isfinite().all():
            raise ValueError("the weight contains NaN or infinity")
        self.shape, self.n_bits, self.tau = weight.shape, n_bits, tau
        self.register_buffer("w", weight.detach().reshape(-1, columns_per_group(weight.shape[1], group_size)))
        plain = not (learn_mapping or learn_levels)  # RTN as everybody has it does not search for a clipping ratio
        if importance is not None:
            importance = importance.float().expand(weight.shape).reshape(self.w.shape)
        found = initialize(
            self.w.float(), n_bits, 1 if plain else n_ratios, n_rounds if learn_levels else 0, importance
        )
        self.register_buffer("scale", found[0])
        self.register_buffer("zero_point", found[1])
        self.alpha = nn.Parameter(found[2], requires_grad=learn_levels)
        self.shift = nn.Parameter(found[3], requires_grad=learn_levels)
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale)) if learn_mapping else None
        self.log_s_elem = nn.Parameter(torch.zeros_like(self.w, dtype=torch.float32)) if learn_mapping else None
        self.log_s_row = nn.Parameter(self.scale.new_zeros(weight.shape[0], 1)) if learn_mapping else None
        self.register_buffer("codes", nearest(self._v(), self.alpha, self.shift))

    def mapping_parameters(self) -> list[nn.Parameter]:
        """What moves weights between levels: log scale, log s_elem, log s_row."""
        return [p for p in (self.log_scale, self.log_s_elem, self.log_s_row) if p is not None]

    def level_parameters(self) -> list[nn.Parameter]:
        """What moves the levels: alpha, shift."""
        return [p for p in (self.alpha, self.shift) if p.requires_grad]

    def _scale(self) -> Tensor:
        """(n_groups, 1): scale times the learned factors of the group and of the row it lies in."""
        if self.log_scale is None:
            return self.scale
        log_s_row = self.log_s_row.repeat_interleave(len(self.w) // self.shape[0], dim=0)
        return self.scale * torch.exp(self.log_scale + log_s_row)

    def _v(self) -> Tensor:
        return transform(self.w, self._scale(), self.log_s_elem).add_(self.zero_point)

    @torch.no_grad()
    def remap(self, local: bool = True) -> None:
        """Choose the codes again, for the present parameters: among neighbouring levels, or (local=False) among all."""
        v = self._v()
        self.codes = (
            nearest_nearby(v, self.codes, self.alpha, self.shift) if local else nearest(v, self.alpha, self.shift)
        )

    def ranks(self) -> Tensor:
        """The place by value of the level each weight has, 0 for the lowest. (n_groups, group_size) uint8."""
        places = levels(self.alpha, self.shift).argsort(dim=1).argsort(dim=1).to(torch.uint8)
        return places.gather(1, self.codes.long())

    def quantized_weight(self) -> Tensor:
        """w^, (out_features, in_features) float, differentiable in the parameters."""
        parameters = self._scale(), self.zero_point, self.log_s_elem, self.alpha, self.shift
        return Quantize.apply(self.w, *parameters, self.codes, self.tau).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return F.linear(x, self.quantized_weight())

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """The composition theorem: scale * (sum_i alpha_i b_i + shift - zero_point) = sum_i alpha*_i b_i + shift*.

        Returns codes (out, in), alpha* (out, in/group_size, n_bits) and shift* (out, in/group_size); scale, zero_point,
        s_elem and s_row are gone."""
        scale, out = self._scale(), self.shape[0]
        alpha, shift = scale * self.alpha, scale * (self.shift - self.zero_point)
        return self.codes.view(self.shape), alpha.view(out, -1, self.n_bits), shift.view(out, -1)

    def pack(self) -> BCQLinear:
        """The layer as it ships: bit-planes, alpha and shift in fp16."""
        return BCQLinear.from_codes(*self.fold())


# -------------------------------------------------------------------------------------------------- measure it


def _measure_initialization(n_ratios: int, size: int, n_bits: int, group_size: int) -> tuple[float, float]:
    """Seconds and peak bytes per weight, for one (size, size) weight. Meant for a process of its own."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).view(-1, group_size)
    initialize(weight[:64], n_bits, 1, 1)  # load the libraries
    before, start = peak_bytes(), time.perf_counter()
    initialize(weight, n_bits, n_ratios, 15)
    return time.perf_counter() - start, (peak_bytes() - before) / size**2


def _measure_training(n_layers: int, size: int, n_bits: int, group_size: int) -> tuple[float, float]:
    """Seconds of one forward and backward of one layer, a new mapping every second time, and peak bytes per weight of
    training a chain of n_layers, Adam and the weights themselves included. Meant for a process of its own."""
    _train_chain(1, 64, n_bits, 64)  # load the libraries
    before = peak_bytes()
    seconds = _train_chain(n_layers, size, n_bits, group_size)
    return seconds, (peak_bytes() - before) / (n_layers * size**2)


def _train_chain(n_layers: int, size: int, n_bits: int, group_size: int) -> float:
    torch.manual_seed(0)
    chain = [FlexBCQLinear(torch.randn(size, size).bfloat16(), n_bits, group_size, n_ratios=1) for _ in range(n_layers)]
    optimizer = torch.optim.Adam([p for layer in chain for p in layer.parameters()], lr=1e-4, fused=True)
    seconds = []
    for step in range(10):
        start, y = time.perf_counter(), torch.ones(1, size)
        for layer in chain if step % 2 == 0 else ():
            layer.remap()
        for layer in chain:
            y = layer(y)
        y.sum().backward()
        seconds.append((time.perf_counter() - start) / n_layers)
        optimizer.step()
        optimizer.zero_grad()
    return sum(sorted(seconds)[4:6]) / 2  # half of the steps map: the median lies between the two kinds


def peak_bytes() -> int:
    """Of the resident memory of this process so far."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure initialization and a training step of one weight matrix.")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=-1, help="-1: a row (default: %(default)s)")
    guarded(run, parser)


def run(args: argparse.Namespace) -> None:
    group_size = columns_per_group(args.size, args.group_size)
    print(f"one {args.size} x {args.size} weight, groups of {group_size}, {torch.get_num_threads()} threads")
    jobs = [(f"initialization, n_ratios={n}", _measure_initialization, n) for n in (1, 10, 50)]
    jobs += [("forward + backward", _measure_training, 4)]
    for n_bits in (3, 4):
        for name, measure, n in jobs:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:  # a process of its own has a peak of its own
                seconds, peak = fresh.apply(measure, (n, args.size, n_bits, group_size))
            print(f"{n_bits} bits  {name:27} {seconds:7.3f} s  {peak:5.1f} bytes per weight at the peak", flush=True)


if __name__ == "__main__":
    main()
