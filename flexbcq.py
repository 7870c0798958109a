"""FlexBCQ: a uniform quantizer composed with an inner binary-coding quantizer, and three methods it contains.

Paper: *Flexible Binary-coding Quantization for Large Language Models* (ICLR 2025 submission 8982), published as
UniQuanF, *Unifying Uniform and Binary-coding Quantization for Accurate Compression of Large Language Models* (ACL 2025,
arXiv 2506.03781).

A weight goes through three steps:

    transform   v  = w / (scale * s_elem * s_row) + zero_point
    map         q  = the level nearest to v,  levels = { sum_i alpha_i b_i + shift : b in {-1, +1}^n_bits }
    back        w^ = scale * (q - zero_point)

With alpha = 2^(n_bits-2), .., 1, 1/2 and shift = (2^n_bits - 1) / 2 the levels are the integers 0 .. 2^n_bits - 1 and
the map is round-and-clip: a uniform quantizer. Learning the levels makes it a BCQ, learning the factors s (they move a
weight to another level without moving the levels) makes it FlexRound, learning both makes it FlexBCQ:

                        levels fixed    levels learned
    mapping fixed       rtn             bcq
    mapping learned     flexround       flexbcq

Any of them may start with error feedback, where columns of a weight compensate for each other's errors (bcq and
flexbcq do so by default in calibrate.py); rtn with error feedback is known as gptq. Whatever was learned, `fold` turns
it into plain BCQ: w^ = sum_i alpha*_i b_i + shift*.

    in the literature              here             shape
    Delta, z_U                     scale, zero_point (n_groups, 1)
    S_2, s_3 of FlexRound          s_elem, s_row    (n_groups, group_size), (out_features, 1)
    alpha, z_B                     alpha, shift     (n_groups, n_bits), (n_groups, 1)
    B                              codes            (n_groups, group_size) uint8, bit by bit the signs (see kernel.py)

    layer = FlexBCQLinear(linear.weight, n_bits=3, group_size=128)   # unified initialization
    layer(x)                                                         # fake-quantized, differentiable
    layer.pack()                                                     # -> kernel.BCQLinear
"""

import itertools
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernel import BCQLinear, columns_per_group

METHODS = {  # name -> (learn_mapping, learn_levels)
    "rtn": (False, False),
    "bcq": (False, True),
    "flexround": (True, False),
    "flexbcq": (True, True),
}
WITH_GPTQ = METHODS | {"gptq": METHODS["rtn"]}  # gptq is rtn plus error feedback
COLUMNS = 128  # handled one by one; the errors of all columns before them come in at once, by a matrix product


# ------------------------------------------------------------------------------------------------ levels and mapping


def sign_patterns(n_bits: int, like: Tensor) -> Tensor:
    """(2^n_bits, n_bits) in {-1, +1}: row c holds the bits of code c, the most significant first.

    >>> sign_patterns(2, torch.ones(1))
    tensor([[-1., -1.],
            [-1.,  1.],
            [ 1., -1.],
            [ 1.,  1.]])"""
    codes = torch.arange(2**n_bits, device=like.device)
    places = torch.arange(n_bits - 1, -1, -1, device=like.device)
    return ((codes[:, None] >> places) & 1).to(like.dtype) * 2 - 1


def level_features(n_bits: int, like: Tensor) -> Tensor:
    """(2^n_bits, n_bits + 1): a level is linear in (alpha_1, .., alpha_k, shift); row c holds the signs of code c and a
    1."""
    return F.pad(sign_patterns(n_bits, like), (0, 1), value=1.0)


def levels(alpha: Tensor, shift: Tensor) -> Tensor:
    """The value of every code. alpha: (n_groups, n_bits), shift: (n_groups, 1) -> (n_groups, 2^n_bits), unsorted.

    >>> levels(torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0]]))
    tensor([[-1.5000, -0.5000,  2.5000,  3.5000]])"""
    signs = sign_patterns(alpha.shape[1], alpha)
    if alpha.is_cuda:  # in float64: a GPU may round float32 factors (TF32), which `fold` does not do
        return (alpha.double() @ signs.double().T).to(alpha.dtype) + shift
    return alpha @ signs.T + shift


def uniform_levels(n_bits: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (n_bits,) and shift () that make code c the level c.

    >>> uniform_levels(3, torch.ones(1))
    (tensor([2.0000, 1.0000, 0.5000]), tensor(3.5000))"""
    alpha = 2.0 ** torch.arange(n_bits - 2, -2, -1, device=like.device, dtype=like.dtype)
    return alpha, alpha.sum()  # (2^n_bits - 1) / 2


def midpoints(sorted_levels: Tensor) -> Tensor:
    """(n_groups, m) ascending -> (n_groups, m - 1): where the nearest level changes; a tie goes to the lower level."""
    return (sorted_levels[:, 1:] + sorted_levels[:, :-1]) / 2


def nearest(v: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """Direct mapping: the code of the nearest level. v: (n_groups, group_size) -> codes, same shape, uint8.

    >>> alpha, shift = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0]])  # levels -1.5, 2.5, -0.5, 3.5 of codes 0 .. 3
    >>> nearest(torch.tensor([[-9.0, -0.7, 2.0, 3.1]]), alpha, shift)
    tensor([[0, 2, 1, 3]], dtype=torch.uint8)"""
    values, order = levels(alpha, shift).sort(dim=1)  # order[g, r]: the code of the r-th smallest level
    rank = torch.searchsorted(midpoints(values), v.contiguous())  # midpoints below v = rank of the nearest level
    return order.to(torch.uint8).gather(1, rank)


def nearest_nearby(v: Tensor, codes: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """Local mapping: the nearest among the present level and its two neighbours by value. Shapes as in `nearest`.

    differs: the released code takes codes +- 1 for neighbours, right only while the codes are in order of value."""
    values, order = levels(alpha, shift).sort(dim=1)
    rank = order.argsort(dim=1)  # rank[g, c]: the place of code c by value
    order = order.to(torch.uint8)

    # for each rank: the bounds beyond which a neighbour is nearer, and the codes of the two neighbours
    middle, infinity = midpoints(values), torch.full_like(values[:, :1], torch.inf)
    lower_of_rank = torch.cat((-infinity, middle), 1)
    upper_of_rank = torch.cat((middle, infinity), 1)
    below_of_rank = torch.cat((order[:, :1], order[:, :-1]), 1)
    above_of_rank = torch.cat((order[:, 1:], order[:, -1:]), 1)

    # look them up for each code, then for each weight
    index = codes.long()
    tables = (lower_of_rank, upper_of_rank, below_of_rank, above_of_rank)
    lower, upper, below, above = (table.gather(1, rank).gather(1, index) for table in tables)
    return torch.where(v > upper, above, torch.where(v <= lower, below, codes))


# ------------------------------------------------------------------------------------------------- initialization


def prefix_sums(x: Tensor) -> Tensor:
    """(n_groups, n) -> (n_groups, n + 1): column j is the sum of the first j.

    >>> prefix_sums(torch.tensor([[5.0, 1.0, 2.0]]))
    tensor([[0., 5., 6., 8.]])"""
    return F.pad(x.cumsum(1), (1, 0))


class SortedGroups:
    """What the alternating update needs to know about the weights.

    Within a group the problem is one-dimensional (ours): once the weights are sorted, those of a level form a run
    between two midpoints, and prefix sums give its count and its sum without looking at a weight again. Importances
    h_j weight counts, sums and the squared error, which is sum_j h_j (w_j - q_j)^2; without them every h_j is 1."""

    def __init__(self, w: Tensor, importance: Tensor | None = None):
        """w, importance: (n_groups, group_size)."""
        self.w, order = w.sort(dim=1)
        h = (torch.ones_like(w) if importance is None else importance.gather(1, order)).double()
        self.counts = prefix_sums(h)
        self.sums = prefix_sums(h * self.w)
        self.energy = (h * self.w.double().square()).sum(1, keepdim=True)

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """How many weights are nearest to each value, and their sum. All (n_groups, m); values ascending."""
        # level r owns the sorted weights ends[r] .. ends[r + 1]
        ends = torch.searchsorted(self.w, midpoints(values).to(self.w.dtype), right=True)
        ends = F.pad(ends, (1, 0), value=0)
        ends = F.pad(ends, (0, 1), value=self.w.shape[1])
        return self.counts.gather(1, ends).diff(dim=1), self.sums.gather(1, ends).diff(dim=1)


def alternating_update(
    groups: SortedGroups, alpha: Tensor, shift: Tensor, n_rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit levels (Xu et al. 2018) by turns: alpha and shift by least squares for given codes; then the nearest codes.

    alpha: (n_groups, n_bits), shift: (n_groups, 1), where to start
    Returns alpha, shift and the squared error of each group, (n_groups, 1), in float64. The error never rises."""
    theta = torch.cat((alpha, shift), 1).double()  # (n_groups, n_bits + 1)
    features = level_features(alpha.shape[1], theta)  # (2^n_bits, n_bits + 1)
    products = (features.unsqueeze(2) * features.unsqueeze(1)).flatten(1)  # (2^n_bits, (n_bits + 1)^2)

    # a little damping keeps the equations solvable where all weights agree in a bit
    eye = torch.eye(theta.shape[1], dtype=theta.dtype, device=theta.device)
    damping = (1e-9 * groups.counts[:, -1:, None]).clamp(min=1e-30) * eye

    for _ in range(n_rounds):
        # theta fixed: the nearest codes. How many weights does each level have, and what is their sum?
        values, order = (theta @ features.T).sort(dim=1)  # (n_groups, 2^n_bits)
        count, total = groups.split(values)

        # from the order of values to that of codes
        count_by_code = torch.zeros_like(count).scatter_(1, order, count)
        error_by_code = torch.zeros_like(total).scatter_(1, order, total - count * values)

        # codes fixed: the normal equations for the change of theta
        gram = (count_by_code @ products).unflatten(1, eye.shape)  # sum_j f_j f_j^T
        residual = error_by_code @ features  # sum_j f_j (w_j - q_j)
        theta = theta + torch.linalg.solve(gram + damping, residual)

    # sum_j (w_j - q_j)^2 = sum_j w_j^2 + sum over levels q of (n q^2 - 2 q sum of their w)
    values = (theta @ features.T).sort(dim=1).values
    count, total = groups.split(values)
    error = groups.energy + (values * (values * count - 2 * total)).sum(1, keepdim=True)
    return theta[:, :-1], theta[:, -1:], error.clamp(min=0)


def uniform_range(w: Tensor, n_bits: int, ratio: float = 1.0, whole: bool = True) -> tuple[Tensor, Tensor]:
    """scale and zero_point, (n_groups, 1) each, of uniform levels over `ratio` times the range of each group.

    whole: zero_point is an integer and the range includes 0, so that a weight of 0 stays 0, as RTN usually has it (once
    packed, up to the rounding of alpha and shift to fp16)

    >>> uniform_range(torch.tensor([[-1.0, 0.0, 2.0]]), n_bits=2)
    (tensor([[1.]]), tensor([[1.]]))"""
    low, high = w.amin(1, keepdim=True) * ratio, w.amax(1, keepdim=True) * ratio
    if whole:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**n_bits - 1)).clamp(min=1e-8)
    return scale, torch.round(-low / scale) if whole else -low / scale


def initialize(
    w: Tensor, n_bits: int, n_ratios: int, n_rounds: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unified initialization: for each of `n_ratios` clipping ratios, uniform levels improved by `n_rounds` rounds of
    alternating updates; each group keeps the result with the least squared error. With n_rounds=0: uniform levels as in
    RTN, with an integer zero_point and 0 in the range. w, importance: (n_groups, group_size) float.

    Returns scale, zero_point (n_groups, 1) and, in units of scale, alpha (n_groups, n_bits) and shift (n_groups, 1)."""
    found = [initialize_groups(part, n_bits, n_ratios, n_rounds, h) for part, h in chunks(w, importance)]
    # parameters must be contiguous: a fused Adam walks over their memory without looking at strides
    return tuple(torch.cat(parts).to(w.dtype) for parts in zip(*found))


def initialize_groups(w: Tensor, n_bits: int, n_ratios: int, n_rounds: int, importance: Tensor | None) -> list[Tensor]:
    """`initialize` for as many groups as fit into a cache."""
    groups = SortedGroups(w, importance)
    alpha_uniform, shift_uniform = uniform_levels(n_bits, w)
    best, best_error = None, torch.inf

    for ratio in torch.linspace(1, 0.2, n_ratios).tolist():
        # start from uniform levels, in units of w
        scale, zero_point = uniform_range(w, n_bits, ratio, whole=n_rounds == 0)
        start = scale * alpha_uniform, scale * (shift_uniform - zero_point)
        alpha, shift, error = alternating_update(groups, *start, n_rounds)

        # back to units of scale; what is uniform stays so to the last bit
        if n_rounds == 0:
            alpha, shift = alpha_uniform.expand(len(w), -1), shift_uniform.expand(len(w), 1)
        else:
            alpha, shift = alpha / scale, shift / scale + zero_point

        # per group, keep the best ratio so far
        found = [scale, zero_point, alpha, shift]
        if best is not None:
            found = [torch.where(error < best_error, new, old) for new, old in zip(found, best)]
        best = found
        best_error = error.clamp(max=best_error)
    return best


# ------------------------------------------------------------------------------------------------- error feedback


def damped(hessian: Tensor, share: float = 0.01) -> Tensor:
    """The Hessian divided by its mean diagonal, plus `share` times the identity: positive definite for any inputs.

    hessian: (in_features, in_features), sum of x x^T over inputs x. Raises ValueError if it is not finite.

    >>> damped(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))  # the second input is always 0
    tensor([[2.0100, 0.0000],
            [0.0000, 0.0100]])"""
    mean = hessian.diagonal().mean()
    if not mean.isfinite():
        raise ValueError("the inputs of the layer contain NaN or infinity, or are too large to be squared")
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return hessian / mean + share * eye if mean > 0 else eye


def upper_root(hessian: Tensor) -> Tensor:
    """R, upper triangular, with hessian = R R^T: a Cholesky factor computed from the last column to the first."""
    return torch.linalg.cholesky(hessian.flip(-2, -1)).flip(-2, -1)


def dequantize(codes: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """q, (out_features, in_features), of codes of this shape and alpha and shift of each group, as in `levels`."""
    return levels(alpha, shift).gather(1, codes.view(len(alpha), -1).long()).view(codes.shape)


def layer_error(w: Tensor, hessian: Tensor, codes: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """(out_features, 1): e H e^T with e = w - q, the squared error that each row makes in the layer's output."""
    error = w - dequantize(codes, alpha, shift)
    return ((error @ hessian) * error).sum(1, keepdim=True)


def error_feedback(w: Tensor, hessian: Tensor, alpha: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Choose codes column by column, each making up for the errors of those before (GPTQ, Frantar et al. 2023).

    w: (out_features, in_features); hessian: positive definite; alpha: (n_groups, n_bits), shift: (n_groups, 1)
    Returns the codes, uint8, and the adjusted weights, whose nearest codes they are; both have the shape of w.

    With H = R R^T the error of a row is |e R|^2, and since R is upper triangular, (e R)_k has no e_i with i > k in it:

        (e R)_k = e_k R_kk + sum_{i<k} e_i R_ik       smallest if q_k is nearest to w_k + sum_{i<k} e_i R_ik / R_kk

    GPTQ arrives at the same codes by way of the inverse of H; the form used here is LDLQ, from QuIP (Chee et al. 2023),
    which proves this. The columns of the largest inputs come first."""
    order = hessian.diagonal().argsort(descending=True)
    root = upper_root(hessian[order][:, order])
    feed = root / root.diagonal()  # R_ik / R_kk
    values = levels(alpha, shift).view(len(w), -1, 2 ** alpha.shape[1])  # (out_features, groups, 2^n_bits)
    group = (order // (w.shape[1] // values.shape[1])).tolist()  # of each column

    w = w[:, order]
    target, error, codes = w.clone(), torch.zeros_like(w), torch.empty_like(w, dtype=torch.uint8)
    for start in range(0, w.shape[1], COLUMNS):
        end = min(start + COLUMNS, w.shape[1])
        target[:, start:end] += error[:, :start] @ feed[:start, start:end]  # of all columns before these at once

        for k in range(start, end):
            target[:, k] += error[:, start:k] @ feed[start:k, k]
            value = values[:, group[k]]
            code = (value - target[:, k, None]).abs().argmin(1, keepdim=True)
            error[:, k] = w[:, k] - value.gather(1, code).squeeze(1)
            codes[:, k] = code.squeeze(1)

    back = order.argsort()
    return codes[:, back], target[:, back]


def refit_levels(w: Tensor, hessian: Tensor, codes: Tensor, alpha: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Codes fixed: least squares for all alpha and shift of a row together. Shapes as in `error_feedback`.

    A row is q = F theta, where F holds each weight's signs and a 1 in the columns of its group, and 0 elsewhere. The
    row's error is smallest where F^T H F (theta_new - theta) = F^T H (w - q)."""
    features = level_features(alpha.shape[1], w)  # (2^n_bits, n_bits + 1)
    theta = torch.cat((alpha, shift), 1).view(len(w), -1, features.shape[1])  # (out_features, groups, n_bits + 1)
    by_group = theta.shape[1], w.shape[1] // theta.shape[1]  # groups, group_size
    pull = (w - dequantize(codes, alpha, shift)) @ hessian  # (out_features, in_features)

    fitted, n_rows = [], max(1, 2**24 // (w.shape[1] * theta[0].numel()))  # rows at a time: H F takes 64 MB
    for old, code, pulled in zip(theta.split(n_rows), codes.split(n_rows), pull.split(n_rows)):
        # r: row, i: column, g and h: groups, s: column of a group, k and l: unknowns of a group
        f = features[code.long()].unflatten(1, by_group)
        hf = torch.einsum("ihs,rhsk->rihk", hessian.unflatten(1, by_group), f)
        gram = torch.einsum("rgsk,rgshl->rgkhl", f, hf.unflatten(1, by_group)).flatten(3).flatten(1, 2).double()
        residual = torch.einsum("rgs,rgsk->rgk", pulled.unflatten(1, by_group), f).flatten(1).double()

        # a little damping keeps the equations solvable where all weights agree in a bit
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += 1e-5 * diagonal.mean(1, keepdim=True)
        change = torch.cholesky_solve(residual.unsqueeze(2), torch.linalg.cholesky(gram))
        fitted.append(old + change.view_as(old).to(old.dtype))
    theta = torch.cat(fitted).flatten(0, 1)
    return theta[:, :-1], theta[:, -1:]


def feedback_passes(
    w: Tensor, hessian: Tensor, alpha: Tensor, shift: Tensor, n_passes: int, refit: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`n_passes` times: codes by error feedback, then refitted levels; each row keeps its best pass. refit=False: GPTQ.

    Shapes as in `error_feedback`, any Hessian. Returns codes, alpha, shift, and weights with these as nearest codes."""
    hessian, best, best_error = damped(hessian), None, torch.inf
    for _ in range(n_passes if refit else 1):
        codes, target = error_feedback(w, hessian, alpha, shift)
        if refit:
            alpha, shift = refit_levels(w, hessian, codes, alpha, shift)
        error = layer_error(w, hessian, codes, alpha, shift)

        found = [x.reshape(len(w), -1) for x in (codes, alpha, shift, target)]  # a row of each for a row of w
        best = found if best is None else [torch.where(error < best_error, *pair) for pair in zip(found, best)]
        best_error = error.clamp(max=best_error)

    codes, alpha, shift, target = best
    alpha, shift = alpha.view(-1, alpha.shape[1] // shift.shape[1]), shift.view(-1, 1)
    return codes, alpha, shift, into_cells(target, codes, alpha, shift)


def into_cells(w: Tensor, codes: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """Make each weight's code its nearest: a weight that a refit left nearer to another level moves onto its code's."""
    v = w.view(len(alpha), -1)
    is_inside = nearest(v, alpha, shift).view(codes.shape) == codes
    return torch.where(is_inside, w, dequantize(codes, alpha, shift))


def round_levels(codes: Tensor, alpha: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and shift rounded to fp16, one after the other, each making up for the errors of those before (ours).

    codes: (n_groups, group_size), alpha: (n_groups, n_bits), shift: (n_groups, 1)
    That is `error_feedback` with n_bits + 1 columns for a group: its weights are q = F theta, so an error e of theta
    costs e F^T F e^T. Otherwise a large alpha_i, rounded coarsely, would shift all weights of equal b_i together."""
    features = level_features(alpha.shape[1], alpha).double()  # (2^n_bits, n_bits + 1)
    rounded = []
    for code, *parts in chunks(codes, alpha, shift):
        # the largest first: the smallest has the finest steps, and the last word
        theta = torch.cat(parts, 1).double()
        order = theta.abs().argsort(1, descending=True)
        theta = theta.gather(1, order)

        # F^T F from the number of weights of each code
        counts = theta.new_zeros(len(code), len(features))
        counts.scatter_add_(1, code.long(), torch.ones_like(code, dtype=theta.dtype))
        f = features.T[order]  # (n_groups, n_bits + 1, 2^n_bits)
        gram = (f * counts.unsqueeze(1)) @ f.transpose(1, 2)
        root = upper_root(gram + 1e-6 * code.shape[1] * torch.eye(theta.shape[1], device=code.device))

        error, stored = torch.zeros_like(theta), torch.empty_like(theta)
        for k in range(theta.shape[1]):
            fed = (error[:, :k] * root[:, :k, k]).sum(1) / root[:, k, k]
            stored[:, k] = (theta[:, k] + fed).half()
            error[:, k] = theta[:, k] - stored[:, k]
        rounded.append(torch.empty_like(stored).scatter_(1, order, stored))
    theta = torch.cat(rounded).to(alpha.dtype)
    return theta[:, :-1], theta[:, -1:]


def packed_layer(codes: Tensor, alpha: Tensor, shift: Tensor, bias: Tensor | None) -> BCQLinear:
    """A layer as it ships: bit-planes, alpha and shift rounded to fp16, and the bias as it is.

    codes: (out_features, in_features); alpha, shift: as in `round_levels`; bias: (out_features,)"""
    alpha, shift = round_levels(codes.view(len(alpha), -1), alpha, shift)
    packed = BCQLinear.from_codes(codes, alpha.unflatten(0, (len(codes), -1)), shift.view(len(codes), -1))
    packed.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return packed


# ------------------------------------------------------------------------------------------------- the quantizer


class Quantize(torch.autograd.Function):
    """w^ = scale * (levels[codes] - zero_point), with the gradient of the paper written out.

    Rounding has no useful derivative, so the map passes gradients straight through: dq/dv = 1, and dq/dalpha_i = b_i
    with the codes held fixed (Bengio et al. 2013). Where |v - q| > tau * min |alpha_i| the level is too far away for
    that to be true and nothing flows, neither to v nor to the levels (gradient filtering; with tau = 1 and uniform
    levels, just after a mapping, these are exactly the clipped weights).
    With divisor = scale * s_row, u = v - zero_point = w / (divisor * s_elem) and g = dL/dw^:

        g_v            = g * scale                       where not filtered, else 0
        dL/dlog s_elem = -g_v * u
        dL/ddivisor    = -sum(g_v * u) / divisor         sums over the group
        dL/dscale      =  sum(g * w^) / scale            of the way back; that of the transform is in the divisor's
        dL/dalpha_i    =  sum(g_v * b_i),   dL/dshift = sum(g_v)

    Of tensors as large as the weight, only those that exist anyway are kept for the backward pass: w, log_s_elem, codes
    and w^."""

    @staticmethod
    def forward(
        ctx, w: Tensor, divisor: Tensor, scale: Tensor, zero_point: Tensor, log_s_elem: Tensor | None, alpha: Tensor,
        shift: Tensor, codes: Tensor, tau: float,
    ) -> Tensor:  # fmt: skip
        """w, log_s_elem: (n_groups, group_size); codes: the same, uint8; alpha: (n_groups, n_bits); divisor, scale,
        zero_point, shift: (n_groups, 1). Returns w^ like w, in scale's dtype."""
        values = scale * (levels(alpha, shift) - zero_point)  # of each code
        quantized = torch.empty_like(codes, dtype=values.dtype)
        for out, value, code in chunks(quantized, values, codes):
            torch.gather(value, 1, code.long(), out=out)

        ctx.save_for_backward(w, divisor, scale, log_s_elem, alpha, codes, quantized)
        ctx.tau = tau
        return quantized

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: dL/dw^. Returns the gradients of the arguments of `forward`, None for those that are constants."""
        g_log_s = torch.empty_like(g)  # as large as the weight, so it is filled in place
        sums = []
        for out, g_part, w, divisor, scale, log_s_elem, alpha, codes, quantized in chunks(
            g_log_s, g, *ctx.saved_tensors
        ):
            u = transform(w, divisor, log_s_elem)
            sums.append(gradients(g_part, u, divisor, scale, alpha, codes, quantized, ctx.tau, out))

        g_divisor, g_scale, g_alpha, g_shift = map(torch.cat, zip(*sums))
        g_log_s = g_log_s if ctx.needs_input_grad[4] else None
        return None, g_divisor, g_scale, None, g_log_s, g_alpha, g_shift, None, None


def gradients(
    g: Tensor, u: Tensor, divisor: Tensor, scale: Tensor, alpha: Tensor, codes: Tensor, quantized: Tensor, tau: float,
    g_log_s: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The formulas of `Quantize` for some groups. Writes dL/dlog s_elem to g_log_s; returns those of divisor, scale,
    alpha and shift. g, u, codes, quantized, g_log_s: (n_groups, group_size); the rest as in `Quantize`."""
    # what flows through the map: nothing where the level is too far away
    g_v = g * scale
    distance = (quantized / scale).sub_(u).abs_()  # |q - v|
    g_v.masked_fill_(distance > tau * alpha.abs().amin(1, keepdim=True), 0)

    # the levels: the sum where b_i = +1 minus the sum where it is -1
    n_bits = alpha.shape[1]
    g_shift = g_v.sum(1, keepdim=True)
    plus = [(g_v * ((codes >> (n_bits - 1 - i)) & 1)).sum(1, keepdim=True) for i in range(n_bits)]
    g_alpha = 2 * torch.cat(plus, 1) - g_shift

    # the mapping, and the way back
    torch.mul(g_v, u, out=g_log_s).neg_()
    g_divisor = g_log_s.sum(1, keepdim=True) / divisor
    g_scale = (g * quantized).sum(1, keepdim=True) / scale
    return g_divisor, g_scale, g_alpha, g_shift


def transform(w: Tensor, divisor: Tensor, log_s_elem: Tensor | None) -> Tensor:
    """u = w / (divisor * s_elem), all as in `Quantize.forward`; v is u + zero_point."""
    return w / divisor if log_s_elem is None else torch.exp(-log_s_elem).mul_(w).div_(divisor)


class FlexBCQLinear(nn.Module):
    """A linear layer whose weight is quantized on the fly: its two switches give all four `METHODS`.

    weight:        (out_features, in_features), kept in its dtype
    learn_mapping: scale, s_elem and s_row are parameters (as logarithms, from 0)
    learn_levels:  alpha and shift are fitted at the start and then trained
    n_ratios, n_rounds: as in `initialize`
    importance:    (in_features,), the mean or sum of squares of each input: the diagonal of the Hessian of the layer's
                   output error. None: all columns count alike
    tau:           as in `Quantize`
    bias:          (out_features,), added to the output as it is
    hessian, n_passes: as in `feedback_passes`, which starts from the initialization and leaves the weight in float32.
                   hessian None: every weight takes the nearest level
    Once the layer is built, only `remap` changes its codes, so `forward` is pure. Raises ValueError for n_bits outside
    1..8, a group size that does not divide in_features, NaN, or a weight that fp16 cannot hold."""

    def __init__(
        self, weight: Tensor, n_bits: int, group_size: int = -1, learn_mapping: bool = True, learn_levels: bool = True,
        *, n_ratios: int = 10, n_rounds: int = 8, importance: Tensor | None = None, tau: float = 1.0,
        bias: Tensor | None = None, hessian: Tensor | None = None, n_passes: int = 2,
    ):  # fmt: skip
        super().__init__()
        if n_bits not in range(1, 9):
            raise ValueError(f"{n_bits} bits: choose 1 to 8")
        if not weight.isfinite().all():
            raise ValueError("the weight contains NaN or infinity")
        check_fp16(weight, n_bits)
        self.shape, self.n_bits, self.tau = weight.shape, n_bits, tau

        # one row of w for each group
        w = weight.detach().reshape(-1, columns_per_group(weight.shape[1], group_size))
        if importance is not None:
            importance = importance.float().expand(weight.shape).reshape(w.shape)
        if not learn_levels:
            n_rounds = 0
            n_ratios = n_ratios if learn_mapping else 1  # standard RTN does not search for a clipping ratio
        scale, zero_point, alpha, shift = initialize(w.float(), n_bits, n_ratios, n_rounds, importance)

        self.register_buffer("w", w)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.alpha = nn.Parameter(alpha, requires_grad=learn_levels)
        self.shift = nn.Parameter(shift, requires_grad=learn_levels)
        self.log_scale = nn.Parameter(torch.zeros_like(scale)) if learn_mapping else None
        self.log_s_elem = nn.Parameter(torch.zeros_like(w, dtype=torch.float32)) if learn_mapping else None
        self.log_s_row = nn.Parameter(scale.new_zeros(weight.shape[0], 1)) if learn_mapping else None
        self.register_buffer("codes", nearest(self.v(), self.alpha, self.shift))
        if hessian is not None:
            self.feed_errors_back(hessian.float(), n_passes)

    @torch.no_grad()
    def feed_errors_back(self, hessian: Tensor, n_passes: int) -> None:
        """Take over codes, levels and weights from `feedback_passes`: training starts from its codes."""
        w, refit = self.w.float().view(self.shape), self.alpha.requires_grad
        alpha, shift = self.scale * self.alpha, self.scale * (self.shift - self.zero_point)
        codes, alpha, shift, target = feedback_passes(w, hessian, alpha, shift, n_passes, refit)

        self.codes, self.w = codes.view(self.w.shape), target.view(self.w.shape)
        if refit:
            self.alpha.copy_(alpha / self.scale)
            self.shift.copy_(shift / self.scale + self.zero_point)

    def mapping_parameters(self) -> list[nn.Parameter]:
        """What moves weights between levels: log scale, log s_elem, log s_row."""
        return [p for p in (self.log_scale, self.log_s_elem, self.log_s_row) if p is not None]

    def level_parameters(self) -> list[nn.Parameter]:
        """What moves the levels: alpha, shift."""
        return [p for p in (self.alpha, self.shift) if p.requires_grad]

    def full_scale(self) -> Tensor:
        """(n_groups, 1): scale times its learned factor."""
        return self.scale if self.log_scale is None else self.scale * torch.exp(self.log_scale)

    def divisor(self) -> Tensor:
        """(n_groups, 1): the scale of each group times s_row of the row it lies in."""
        if self.log_s_row is None:
            return self.scale
        log_s_row = self.log_s_row.repeat_interleave(len(self.w) // self.shape[0], dim=0)
        return self.full_scale() * torch.exp(log_s_row)

    def v(self) -> Tensor:
        """(n_groups, group_size): the weights after the transform, in units of the levels."""
        return transform(self.w, self.divisor(), self.log_s_elem).add_(self.zero_point)

    @torch.no_grad()
    def remap(self, local: bool = True) -> None:
        """Choose the codes again, for the current parameters: among neighbouring levels, or (local=False) among all."""
        if local:
            self.codes = nearest_nearby(self.v(), self.codes, self.alpha, self.shift)
        else:
            self.codes = nearest(self.v(), self.alpha, self.shift)

    def ranks(self) -> Tensor:
        """The place by value of the level each weight has, 0 for the lowest. (n_groups, group_size) uint8."""
        places = levels(self.alpha, self.shift).argsort(dim=1).argsort(dim=1).to(torch.uint8)
        return places.gather(1, self.codes.long())

    def quantized_weight(self) -> Tensor:
        """w^, (out_features, in_features) float, differentiable in the parameters."""
        parameters = self.divisor(), self.full_scale(), self.zero_point, self.log_s_elem, self.alpha, self.shift
        return Quantize.apply(self.w, *parameters, self.codes, self.tau).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return F.linear(x, self.quantized_weight(), self.bias)

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """The composition theorem: scale * (sum_i alpha_i b_i + shift - zero_point) = sum_i alpha*_i b_i + shift*.

        Returns codes (out, in), alpha* (out, in/group_size, n_bits) and shift* (out, in/group_size); scale, zero_point,
        s_elem and s_row are gone.

        >>> layer = FlexBCQLinear(torch.linspace(-1, 2, 64)[None], n_bits=2, learn_mapping=False, learn_levels=False)
        >>> layer.scale, layer.zero_point, layer.alpha.data, layer.shift.data
        (tensor([[1.]]), tensor([[1.]]), tensor([[1.0000, 0.5000]]), tensor([[1.5000]]))
        >>> codes, alpha, shift = layer.fold()
        >>> alpha, shift  # levels -1, 0, 1, 2
        (tensor([[[1.0000, 0.5000]]]), tensor([[0.5000]]))"""
        scale, out = self.full_scale(), self.shape[0]
        alpha, shift = scale * self.alpha, scale * (self.shift - self.zero_point)
        return self.codes.view(self.shape), alpha.view(out, -1, self.n_bits), shift.view(out, -1)

    def pack(self) -> BCQLinear:
        """The layer as it ships: bit-planes, alpha and shift in fp16, and the bias."""
        codes, alpha, shift = self.fold()
        return packed_layer(codes, alpha.flatten(0, 1), shift.flatten().unsqueeze(1), self.bias)


def check_fp16(weight: Tensor, n_bits: int) -> None:
    """Raises ValueError if the levels of this weight could not be stored in fp16."""
    largest = weight.abs().max().item()
    if largest > torch.finfo(torch.float16).max:
        raise ValueError(f"its largest weight, {largest:.3g}, is beyond the range of fp16, in which levels are stored")
    if 0 < largest / 2**n_bits < 2**-24:  # the smallest number
        raise ValueError(f"its largest weight, {largest:.3g}, is too small: fp16 stores levels in steps of 6e-8")


def chunks(*tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Walk over several tensors in step, a few groups at a time, so that what is computed from them fits into a CPU's
    cache, or keeps a GPU busy. Each is (n_groups, ...), the first (n_groups, group_size); None stays None."""
    n_weights = 2**18 if tensors[0].device.type == "cpu" else 2**22
    n_groups = max(1, n_weights // tensors[0].shape[1])
    return zip(*(itertools.repeat(None) if t is None else t.split(n_groups) for t in tensors))
