"""The method: levels, mapping, alternating update, gradient, fold."""

import itertools
import json

import pytest
import torch

from flexbcq import (
    METHODS,
    FlexBCQLinear,
    Quantize,
    SortedGroups,
    alternating_update,
    initialize,
    levels,
    nearest,
    nearest_nearby,
    round_levels,
    sign_patterns,
    uniform_levels,
    uniform_range,
)
from kernel import BCQLinear

torch.manual_seed(0)


def random_groups(n_groups=20, size=96, dtype=torch.float32):
    return torch.randn(n_groups, size, dtype=dtype)


def layer_in_training(method, n_bits, group_size, out=6, width=192, seed=0):
    """A layer with every parameter moved away from its start and the codes mapped again, as after some training."""
    torch.manual_seed(seed)
    layer = FlexBCQLinear(torch.randn(out, width) * 0.02, n_bits, group_size, *METHODS[method], n_ratios=3, n_rounds=3)
    with torch.no_grad():
        for p in layer.mapping_parameters() + layer.level_parameters():
            p.add_(torch.randn_like(p) * 0.1)
    layer.remap(local=False)
    return layer


def dequantize(codes, alpha, shift):
    """codes (out, in), alpha (out, groups, n_bits), shift (out, groups) -> weights, straight from the definition."""
    out, groups, n_bits = alpha.shape
    signs = sign_patterns(n_bits, alpha)[codes.long()].view(out, groups, -1, n_bits)
    return ((signs * alpha.unsqueeze(2)).sum(-1) + shift.unsqueeze(-1)).view(codes.shape)


@pytest.mark.parametrize(
    "method, n_bits, group_size", list(itertools.product(METHODS, range(1, 9), (32, 64, 96, 192, -1)))
)
def test_uq_after_bcq_is_one_bcq(method, n_bits, group_size):
    layer = layer_in_training(method, n_bits, group_size)
    v = layer.v()
    codes = nearest(v, layer.alpha, layer.shift)
    q = levels(layer.alpha, layer.shift).gather(1, codes.long())
    back = (layer.full_scale() * (q - layer.zero_point)).view(layer.shape)
    folded = dequantize(*layer.fold())
    assert (folded - back).abs().max() <= 1e-6 * back.abs().max()
    assert (layer.quantized_weight() - back).abs().max() <= 1e-6 * back.abs().max()


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_rtn_is_round_and_clip_to_the_last_bit(n_bits):
    weight = torch.randn(8, 128)
    scale, zero_point = uniform_range(weight, n_bits)
    rounded = torch.clamp(torch.round(weight / scale + zero_point), 0, 2**n_bits - 1)
    layer = FlexBCQLinear(weight, n_bits, -1, *METHODS["rtn"])
    assert torch.equal(layer.codes, rounded.to(torch.uint8))
    assert torch.equal(layer.quantized_weight(), scale * (rounded - zero_point))


def test_bcq_with_one_bit_is_sign_and_mean():
    weight = random_groups(4, 128)
    weight = torch.cat((weight, -weight), 1)  # symmetric, so the best shift is 0
    layer = FlexBCQLinear(weight, 1, -1, *METHODS["bcq"], n_ratios=1)
    expected = weight.sign() * weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(layer.quantized_weight(), expected, rtol=1e-5, atol=1e-6)


def brute_force_update(w, importance, alpha, shift, n_rounds):
    """Alternating update as written in the paper: every weight against every level, weighted least squares by lstsq."""
    w, theta = w.double(), torch.cat((alpha, shift), 1).double()
    features = torch.cat((sign_patterns(alpha.shape[1], w), torch.ones(2 ** alpha.shape[1], 1, dtype=w.dtype)), 1)
    root = importance.double().sqrt().unsqueeze(2)
    for _ in range(n_rounds):
        codes = (w.unsqueeze(2) - (theta @ features.T).unsqueeze(1)).abs().argmin(2)
        theta = torch.linalg.lstsq(root * features[codes], root * w.unsqueeze(2), driver="gelsd").solution.squeeze(2)
    codes = (w.unsqueeze(2) - (theta @ features.T).unsqueeze(1)).abs().argmin(2)
    return theta[:, :-1], theta[:, -1:], codes


def uneven(w):
    """Importances of which some are a thousand times as large as others."""
    return 10.0 ** (-3 * torch.rand_like(w))


def uniform_start(w, n_bits):
    alpha, shift = uniform_levels(n_bits, w)
    scale, zero_point = uniform_range(w, n_bits)
    return scale * alpha, scale * (shift - zero_point)


@pytest.mark.parametrize("n_bits, in_order, weighted", list(itertools.product((1, 2, 3, 4), *2 * [(True, False)])))
def test_sorted_alternating_update_is_the_brute_force_one(n_bits, in_order, weighted):
    """in_order=False starts with the smallest alpha first: the order of codes is then not the order of levels."""
    w = random_groups(size=256)
    alpha, shift = uniform_start(w, n_bits)
    start = alpha if in_order else alpha.flip(1), shift
    importance = uneven(w) if weighted else torch.ones_like(w)
    groups = SortedGroups(w, importance) if weighted else SortedGroups(w)
    alpha, shift, _ = alternating_update(groups, *start, n_rounds=4)
    alpha_expected, shift_expected, codes = brute_force_update(w, importance, *start, n_rounds=4)
    torch.testing.assert_close(alpha, alpha_expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shift, shift_expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(nearest(w.double(), alpha, shift), codes.to(torch.uint8))


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4, 8))
def test_error_of_alternating_update_never_rises(n_bits):
    w = random_groups()
    groups = SortedGroups(w, uneven(w))
    errors = torch.cat([alternating_update(groups, *uniform_start(w, n_bits), n)[2] for n in range(12)], 1)
    assert (errors.diff(dim=1) <= 1e-9 * errors[:, :1]).all()


@pytest.mark.parametrize("n_bits", (2, 3, 4))
def test_reported_error_is_the_squared_distance_to_the_levels(n_bits):
    w = random_groups()
    importance = uneven(w)
    alpha, shift, error = alternating_update(SortedGroups(w, importance), *uniform_start(w, n_bits), 5)
    q = levels(alpha, shift).gather(1, nearest(w.double(), alpha, shift).long())
    expected = (importance * (w.double() - q).square()).sum(1, keepdim=True)
    torch.testing.assert_close(error, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4))
def test_weights_that_are_a_bcq_already_stay_exact(n_bits):
    alpha = torch.tensor([[0.9, 0.4, 0.21, 0.06]])[:, :n_bits].repeat(5, 1)
    shift = torch.full((5, 1), 0.03)
    w = levels(alpha, shift)[:, torch.randint(2**n_bits, (256,))]
    found, _, error = alternating_update(SortedGroups(w), alpha * 1.02, shift, n_rounds=3)
    assert error.max() < 1e-10
    torch.testing.assert_close(found, alpha.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method, n_bits", list(itertools.product(METHODS, (1, 3, 8))))
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 64),
        torch.full((3, 64), 0.7),
        torch.full((3, 64), -1e-3),
        torch.randn(1, 64),
        torch.randn(5, 32).bfloat16(),
    ],
    ids=["zeros", "constant", "small constant", "one row", "bfloat16"],
)
def test_odd_weights_give_finite_numbers_no_farther_than_the_largest_weight(weight, method, n_bits):
    layer = FlexBCQLinear(weight, n_bits, 32, *METHODS[method])
    packed = layer.pack().dequantize()
    assert packed.isfinite().all()
    largest = weight.float().abs().max()
    assert (packed - weight.float()).abs().max() <= 1.01 * largest + 1e-6
    if n_bits == 8 and weight.unique().numel() == 1:
        torch.testing.assert_close(packed, weight.float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_columns_count_by_their_importance(method):
    """Those that count nothing may be anything; a layer whose columns all count nothing is still finite."""
    weight = torch.cat((torch.randn(8, 32), 4 * torch.randn(8, 32)), 1)
    importance = torch.tensor([1.0] * 32 + [0.0] * 32)
    layer, plain = (FlexBCQLinear(weight, 3, -1, *METHODS[method], importance=h) for h in (importance, None))
    errors = [(q.quantized_weight() - weight).square()[:, :32].mean() for q in (layer, plain)]
    assert errors[0] < 0.5 * errors[1] or (method == "rtn" and errors[0] == errors[1])
    assert (
        FlexBCQLinear(weight, 3, -1, *METHODS[method], importance=0 * importance).pack().dequantize().isfinite().all()
    )


def test_grid_of_clipping_ratios_never_loses_to_none():
    w = random_groups() ** 3  # heavy tails, where clipping pays
    for n_bits, n_rounds in itertools.product((2, 3), (0, 15)):
        errors = []
        for n_ratios in (1, 20):
            scale, zero_point, alpha, shift = initialize(w, n_bits, n_ratios, n_rounds)
            q = levels(alpha, shift).gather(1, nearest(w / scale + zero_point, alpha, shift).long())
            errors.append((w - scale * (q - zero_point)).square().sum(1))
        assert (errors[1] <= errors[0] * 1.0001).all() and errors[1].sum() < 0.99 * errors[0].sum()


# ------------------------------------------------------------------------------------------------------ mapping


def crossing_levels(n_groups, n_bits):
    """alphas close to each other and unordered: the order of codes is not the order of values."""
    return 0.5 + torch.rand(n_groups, n_bits), torch.randn(n_groups, 1)


def neighbours(codes, alpha, shift):
    """Codes of the level below, the same, and above by value, (n_groups, size, 3), by sorting in plain Python."""
    result = []
    for group_codes, values in zip(codes.tolist(), levels(alpha, shift).tolist()):
        order = sorted(range(len(values)), key=values.__getitem__)
        ranks = [order.index(c) for c in group_codes]
        result.append([[order[max(r - 1, 0)], order[r], order[min(r + 1, len(order) - 1)]] for r in ranks])
    return torch.tensor(result)


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4, 8))
def test_direct_mapping_finds_the_nearest_level(n_bits):
    v, (alpha, shift) = random_groups(), crossing_levels(20, n_bits)
    values = levels(alpha, shift)
    expected = (v.unsqueeze(2) - values.unsqueeze(1)).abs().amin(2)
    found = (v - values.gather(1, nearest(v, alpha, shift).long())).abs()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4, 8))
def test_local_mapping_is_the_nearest_of_three_neighbours_by_value(n_bits):
    v, (alpha, shift) = random_groups(), crossing_levels(20, n_bits)
    codes = torch.randint(2**n_bits, v.shape).to(torch.uint8)
    values = levels(alpha, shift)
    candidates = neighbours(codes, alpha, shift)
    expected = (v.unsqueeze(2) - values.unsqueeze(1).expand(-1, v.shape[1], -1).gather(2, candidates)).abs().amin(2)
    found = (v - values.gather(1, nearest_nearby(v, codes, alpha, shift).long())).abs()
    torch.testing.assert_close(found, expected)


def test_local_mapping_is_the_direct_one_when_moves_are_small():
    v, (alpha, shift) = random_groups(), crossing_levels(20, 3)
    codes = nearest(v, alpha, shift)
    step = levels(alpha, shift).sort(1).values.diff(dim=1).amin(1, keepdim=True)  # no move beyond one level
    moved = v + (2 * torch.rand_like(v) - 1) * step
    assert not torch.equal(nearest(moved, alpha, shift), codes)
    assert torch.equal(nearest_nearby(moved, codes, alpha, shift), nearest(moved, alpha, shift))


# ------------------------------------------------------------------------------------------------------ gradient


def plain_formula(w, divisor, scale, zero_point, log_s_elem, alpha, shift, codes, tau):
    """The quantizer in operations that autograd knows; q + (v - v.detach()) is the straight-through estimator."""
    v = w / (divisor * torch.exp(log_s_elem)) + zero_point
    q = levels(alpha, shift).gather(1, codes.long()) + (v - v.detach())
    too_far = (v - q).abs() > tau * alpha.abs().amin(1, keepdim=True)
    q = torch.where(too_far, q.detach(), q)
    return scale * (q - zero_point)


@pytest.mark.parametrize("n_bits, tau", list(itertools.product((1, 2, 3, 5, 8), (0.5, 1.0, torch.inf))))
def test_backward_by_hand_is_autograd_of_the_plain_formula(n_bits, tau):
    torch.manual_seed(n_bits)
    w = random_groups(7, 64, torch.float64)
    alpha, shift = (x.double() for x in crossing_levels(7, n_bits))
    divisor, scale = torch.rand(2, 7, 1).double() + 0.5
    leaves = [divisor, scale, torch.randn(7, 64).double() * 0.3, alpha, shift]
    zero_point, codes = torch.randn(7, 1).double(), torch.randint(2**n_bits, w.shape).to(torch.uint8)
    gradient, results = torch.randn_like(w), []
    for function in (Quantize.apply, plain_formula):
        divisor, scale, *others = inputs = [x.clone().requires_grad_() for x in leaves]
        y = function(w, divisor, scale, zero_point, *others, codes, tau)
        results.append((y, *torch.autograd.grad(y, inputs, gradient)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_levels_learn_the_same_with_and_without_a_mapping_to_learn():
    weight, x = torch.randn(8, 64), torch.randn(5, 64)
    layers = [FlexBCQLinear(weight, 3, 32, *METHODS[method]) for method in ("bcq", "flexbcq")]
    for layer in layers:
        layer(x).square().sum().backward()
    assert layers[0].alpha.grad.abs().min() > 0
    for name in ("alpha", "shift"):
        torch.testing.assert_close(*(getattr(layer, name).grad for layer in layers))


def test_filtering_of_uniform_levels_is_the_clipping_of_their_range():
    layer = FlexBCQLinear(torch.randn(8, 64), 3, -1, *METHODS["flexround"], n_ratios=50)
    layer.quantized_weight().sum().backward()
    v = layer.v()
    clipped = (v < -0.5) | (v > 7.5)
    assert clipped.any()
    assert torch.equal(layer.log_s_elem.grad == 0, clipped | (layer.w == 0))


def test_forward_leaves_the_codes_alone_and_remap_renews_them():
    layer = layer_in_training("flexbcq", 3, 64)
    codes = layer.codes.clone()
    with torch.no_grad():
        layer.log_s_elem.add_(torch.randn_like(layer.log_s_elem))
    layer(torch.randn(2, 192))
    assert torch.equal(layer.codes, codes)
    layer.remap()
    assert not torch.equal(layer.codes, codes)


@pytest.mark.parametrize(
    "method, names",
    [("rtn", set()), ("bcq", {"alpha", "shift"}), ("flexround", {"log_scale", "log_s_elem", "log_s_row"})],
)
def test_switches_decide_what_is_learned(method, names):
    layer = layer_in_training(method, 3, 64)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == names
    assert {name for name, p in layer_in_training("flexbcq", 3, 64).named_parameters() if p.requires_grad} >= names


@pytest.mark.parametrize("fused", (True, False))
def test_optimizers_change_parameters_and_nothing_else(fused):
    """A fused optimizer writes through the memory of its parameters: they must not be strided or share it."""
    layer = layer_in_training("flexbcq", 3, 64)
    parameters, buffers = dict(layer.named_parameters()), {name: b.clone() for name, b in layer.named_buffers()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(parameters.values(), lr=0.5, fused=fused).step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), before[name] - 0.5)
    assert all(torch.equal(b, buffers[name]) for name, b in layer.named_buffers())


def test_training_holds_at_most_24_bytes_per_weight(tmp_path):
    """Weights, codes, parameters, gradients, Adam and temporaries of a chain of four layers, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        chain = [FlexBCQLinear(torch.randn(1024, 1024).bfloat16(), 3, n_ratios=1) for _ in range(4)]
        optimizer = torch.optim.Adam([p for layer in chain for p in layer.parameters()], fused=True)
        for _ in range(3):
            for layer in chain:
                layer.remap()
            torch.nn.Sequential(*chain)(torch.ones(1, 1024)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    peak = max(itertools.accumulate(change for _, change in changes))
    assert 15 < peak / (4 * 1024 * 1024) <= 24


def test_training_on_correlated_inputs_beats_looking_at_the_weights_alone():
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    x = torch.randn(256, 16) @ torch.randn(16, 128) + 0.1 * torch.randn(256, 128)  # correlated, as activations are
    losses = {}
    for method in METHODS:
        layer = FlexBCQLinear(weight, 2, -1, *METHODS[method])
        groups = [{"params": layer.mapping_parameters(), "lr": 5e-3}, {"params": layer.level_parameters(), "lr": 5e-4}]
        optimizer = torch.optim.Adam([g for g in groups if g["params"]] or [torch.zeros(1)])
        for step in range(100 if METHODS[method][0] else 0):
            if step % 2 == 0:
                layer.remap()
            optimizer.zero_grad()
            (layer(x) - x @ weight.T).square().mean().backward()
            optimizer.step()
        losses[method] = (layer(x) - x @ weight.T).square().mean().item()
    assert max(losses["flexround"], losses["flexbcq"]) < 0.5 * losses["bcq"] < losses["rtn"]


# ------------------------------------------------------------------------------------------------------- rounding


def rounded_one_by_one(codes, alpha, shift):
    """The textbook form, one group: round the largest to fp16, fit the rest by dense least squares, and so on."""
    f = torch.cat((sign_patterns(alpha.shape[1], alpha), torch.ones(2 ** alpha.shape[1], 1)), 1).double()[
        codes[0].long()
    ]
    theta = torch.cat((alpha, shift), 1)[0].double()
    q, left = f @ theta, theta.abs().argsort(descending=True).tolist()
    while left:
        rest = torch.linalg.lstsq(f[:, left], q[:, None], driver="gelsd").solution
        value = rest[0].half().double()
        theta[left[0]] = value
        q = q - f[:, left.pop(0)] * value
    return theta


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4, 6))
def test_levels_are_rounded_one_by_one_each_making_up_for_those_before(n_bits):
    torch.manual_seed(n_bits)
    for _ in range(20):
        codes = torch.randint(2**n_bits, (1, 256)).to(torch.uint8)
        alpha, shift = torch.rand(1, n_bits) * 2.0 ** torch.arange(n_bits), torch.randn(1, 1)
        ours = torch.cat(round_levels(codes, alpha, shift), 1)[0].double()
        torch.testing.assert_close(ours, rounded_one_by_one(codes, alpha, shift), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ratio", (300, 870))
def test_a_large_weight_does_not_move_its_row_when_levels_become_fp16(ratio):
    torch.manual_seed(0)
    w = torch.randn(16, 4096) * 0.02
    w[:, 7] = -0.02 * ratio * (1 + 0.3 * torch.rand(16))
    layer = FlexBCQLinear(w, 4, learn_mapping=False, n_ratios=3)
    codes, alpha, shift = layer.fold()
    exact, packed, plain = (
        layer.quantized_weight(),
        layer.pack().dequantize(),
        BCQLinear.from_codes(codes, alpha, shift),
    )
    moved, moved_plain = ((x - exact)[:, 8:].mean(1).abs().mean() for x in (packed, plain.dequantize()))
    assert moved < 0.5 * moved_plain


def test_codes_that_agree_in_a_bit_and_zeros_are_rounded_to_finite_levels():
    for codes in (torch.zeros(2, 64), torch.tensor([[0, 5] * 32, [7] * 64])):
        alpha, shift = torch.rand(2, 3) + 0.1, torch.randn(2, 1)
        q, stored = (
            levels(*x).gather(1, codes.long()) for x in ((alpha, shift), round_levels(codes.byte(), alpha, shift))
        )
        torch.testing.assert_close(stored, q, rtol=1e-3, atol=1e-3)
    layer = FlexBCQLinear(torch.zeros(32, 64), 3, 64, learn_mapping=False, learn_levels=False)
    assert not layer.pack().dequantize().any()


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("n_bits", (0, 9, -1))
def test_bits_out_of_range_are_refused(n_bits):
    with pytest.raises(ValueError, match="choose 1 to 8"):
        FlexBCQLinear(torch.randn(4, 64), n_bits)


def test_group_size_that_does_not_divide_lists_those_that_do():
    with pytest.raises(ValueError, match="in_features 192 .* groups of 128 .*try 32, 64, 96, 192"):
        FlexBCQLinear(torch.randn(4, 192), 3, 128)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        FlexBCQLinear(torch.full((4, 64), torch.nan), 3)
