"""Error feedback: GPTQ's codes, refitted levels, and inputs of every kind."""

import pytest
import torch
import torch.nn.functional as F

from calibrate import input_hessians
from flexbcq import (
    METHODS,
    FlexBCQLinear,
    damped,
    error_feedback,
    feedback_passes,
    layer_error,
    levels,
    nearest,
    refit_levels,
    sign_patterns,
    uniform_levels,
    uniform_range,
    upper_root,
)
from llama import rope_tables
from support.checkpoint import Checkpoint
from support.settings import Settings

GROUPS = pytest.mark.parametrize("group_size", (-1, 32))
OUT, WIDTH = 5, 320  # two panels of columns and a half


def correlated_inputs(n_tokens, width):
    """(n_tokens, width) float64: columns of very different size that go with each other."""
    mixing = torch.eye(width).double() + torch.randn(width, width).double() / width**0.5
    return torch.randn(n_tokens, width).double() @ mixing * torch.randn(width).double().exp()


def random_case(n_bits, group_size, uniform=False):
    """Weights, a Hessian, and levels per group: uniform over its range, or anything around it, in any order."""
    torch.manual_seed(0)
    w, x = torch.randn(OUT, WIDTH).double(), correlated_inputs(400, WIDTH)
    scale, zero_point = uniform_range(w.view(-1, WIDTH if group_size == -1 else group_size), n_bits)
    alpha, shift = uniform_levels(n_bits, w)
    alpha, shift = scale * alpha, scale * (shift - zero_point)
    if not uniform:
        alpha, shift = alpha[:, torch.randperm(n_bits)] * (0.5 + torch.rand_like(alpha)), shift + 0.1 * scale
    return w, x.T @ x, alpha, shift


def folded(layer):
    """codes, alpha and shift of a layer as the functions of this section take them."""
    codes, alpha, shift = layer.fold()
    return codes, alpha.flatten(0, 1), shift.reshape(-1, 1)


# --------------------------------------------------------------------------------------------------------- the codes


def textbook_gptq(w, hessian, alpha, shift):
    """After each column its error is spread over those left, by the inverse of what is left of the Hessian; then the
    column leaves the inverse (Frantar et al. 2023, section 3)."""
    w, codes, target = w.clone(), torch.zeros_like(w, dtype=torch.uint8), torch.zeros_like(w)
    values = levels(alpha, shift).view(OUT, -1, 2 ** alpha.shape[1])
    left = hessian.diagonal().argsort(descending=True).tolist()
    while left:
        j = left[0]
        value = values[:, j * values.shape[1] // WIDTH]
        code = (value - w[:, j : j + 1]).abs().argmin(1)
        codes[:, j], target[:, j] = code, w[:, j]

        inverse = torch.linalg.inv(hessian[left][:, left])
        error = w[:, j] - value.gather(1, code[:, None])[:, 0]
        w[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes, target


@GROUPS
@pytest.mark.parametrize("n_bits, uniform", [(1, False), (2, False), (3, False), (3, True), (4, True), (8, True)])
def test_error_feedback_is_gptq_with_a_dense_inverse_and_one_column_at_a_time(n_bits, uniform, group_size):
    w, hessian, alpha, shift = random_case(n_bits, group_size, uniform)
    codes, target = error_feedback(w, damped(hessian), alpha, shift)
    codes_expected, target_expected = textbook_gptq(w, damped(hessian), alpha, shift)
    assert torch.equal(codes, codes_expected)
    torch.testing.assert_close(target, target_expected, rtol=1e-8, atol=1e-8)


def test_root_of_the_hessian_is_upper_triangular_and_gives_it_back():
    hessian = damped(random_case(3, -1)[1])
    root = upper_root(hessian)
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root @ root.T, hessian)


def test_without_correlations_error_feedback_is_the_nearest_level():
    w, _, alpha, shift = random_case(3, 32)
    codes, target = error_feedback(w, torch.rand(WIDTH).double().add(0.1).diag(), alpha, shift)
    assert torch.equal(codes.view(-1, 32), nearest(w.view(-1, 32), alpha, shift)) and torch.equal(target, w)


# -------------------------------------------------------------------------------------------------------- the levels


@GROUPS
@pytest.mark.parametrize("n_bits", (1, 2, 4))
def test_refit_is_least_squares_under_the_full_hessian(n_bits, group_size):
    """|(w - F theta) R|^2 by lstsq, one row at a time, with all columns of F written out."""
    w, hessian, alpha, shift = random_case(n_bits, group_size)
    hessian = damped(hessian)
    codes, _ = error_feedback(w, hessian, alpha, shift)
    found = torch.cat(refit_levels(w, hessian, codes, alpha, shift), 1).view(OUT, -1)
    root, groups = upper_root(hessian), len(alpha) // OUT
    features = F.pad(sign_patterns(n_bits, w), (0, 1), value=1.0)[codes.long()]  # (out, in, n_bits + 1)
    for row, f, theta in zip(w, features, found):
        design = torch.block_diag(*f.chunk(groups))  # (in, groups * (n_bits + 1))
        expected = torch.linalg.lstsq(root.T @ design, root.T @ row[:, None], driver="gelsd").solution[:, 0]
        errors = [((row - design @ t) @ root).square().sum() for t in (theta, expected)]
        assert errors[0] <= errors[1] * (1 + 1e-5)
        torch.testing.assert_close(theta, expected, rtol=1e-2, atol=1e-3)


def test_refit_of_a_few_rows_at_a_time_is_that_of_all():
    """72 rows so wide that 32 go at a time, against 9 of them."""
    torch.manual_seed(0)
    w, alpha, shift = torch.randn(9, 2048), torch.rand(9 * 64, 3), torch.randn(9 * 64, 1)
    codes, hessian = torch.randint(8, w.shape).to(torch.uint8), torch.randn(2048, 2048)
    hessian = damped(hessian @ hessian.T)
    w8, codes8, alpha8, shift8 = (x.repeat(8, 1) for x in (w, codes, alpha, shift))
    results = zip(refit_levels(w8, hessian, codes8, alpha8, shift8), refit_levels(w, hessian, codes, alpha, shift))
    for whole, alone in results:
        torch.testing.assert_close(whole, alone.repeat(8, 1), rtol=1e-2, atol=1e-3)


def test_refit_leaves_alone_what_no_weight_tells():
    """All weights of a group have one code: only the sum of alpha and shift is known; nothing runs away."""
    w, hessian, alpha, shift = random_case(3, 32)
    codes = torch.full_like(w, 5, dtype=torch.uint8)
    alpha_found, shift_found = refit_levels(w, damped(hessian), codes, alpha, shift)
    change = torch.cat((alpha_found - alpha, shift_found - shift), 1)
    assert change.isfinite().all() and change.abs().max() < 2 * w.abs().max()
    torch.testing.assert_close(change.abs(), change[:, 3:].abs().expand_as(change), rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4))
def test_each_of_feedback_refit_and_more_passes_lowers_the_error_of_the_output(n_bits):
    w, hessian, alpha, shift = random_case(n_bits, 32)
    rounded = nearest(w.view(-1, 32), alpha, shift).view(w.shape)
    results = [feedback_passes(w, hessian, alpha, shift, n, refit) for n, refit in ((1, False), (1, True), (8, True))]
    candidates = [(rounded, alpha, shift), *(result[:3] for result in results)]
    errors = [layer_error(w, damped(hessian), *candidate).sum() for candidate in candidates]
    assert all(later < 0.98 * earlier for earlier, later in zip(errors, errors[1:]))


@GROUPS
def test_a_row_never_ends_worse_for_another_pass(group_size):
    w, hessian, alpha, shift = random_case(2, group_size)
    passes = [feedback_passes(w, hessian, alpha, shift, n)[:3] for n in range(1, 7)]
    errors = torch.cat([layer_error(w, damped(hessian), *found) for found in passes], 1)
    assert (errors.diff(dim=1) <= 0).all()


@GROUPS
@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_weights_whose_mapping_gives_the_codes_of_the_feedback(method, group_size):
    """rtn with error feedback is gptq: its levels stay uniform to the last bit."""
    w, hessian, *_ = random_case(3, group_size)
    layer = FlexBCQLinear(w.float(), 3, group_size, *METHODS[method], hessian=hessian, n_passes=3)
    plain = FlexBCQLinear(w.float(), 3, group_size, *METHODS[method])
    errors = [layer_error(w.float(), damped(hessian).float(), *folded(q)).sum() for q in (layer, plain)]
    assert errors[0] < 0.7 * errors[1] and not torch.equal(layer.codes, plain.codes)
    assert torch.equal(layer.alpha, plain.alpha) == (method in ("rtn", "flexround"))

    codes = layer.codes.clone()
    for local in (True, False):
        layer.remap(local)
        assert torch.equal(layer.codes, codes)


# -------------------------------------------------------------------------------------------------------- the inputs


@pytest.mark.parametrize("n_bits", (1, 3, 8))
@pytest.mark.parametrize("case", ("dead columns", "dead group", "all dead", "one token", "huge token", "huge", "tiny"))
def test_odd_inputs_give_finite_levels_no_farther_than_the_weights(case, n_bits):
    torch.manual_seed(0)
    w, x = torch.randn(6, 128), correlated_inputs(300, 128).float()
    if case == "dead columns":
        x[:, ::3] = 0
    elif case == "dead group":
        x[:, :32] = 0
    elif case == "all dead":
        x.zero_()
    elif case == "one token":
        x = x[:1]
    elif case == "huge token":
        x[0] *= 1e4
    else:
        x *= 1e12 if case == "huge" else 1e-12

    layer = FlexBCQLinear(w, n_bits, 32, *METHODS["bcq"], hessian=x.T @ x, n_passes=3)
    packed = layer.pack().dequantize()
    assert packed.isfinite().all() and packed.abs().max() <= 3 * w.abs().max()
    if case == "all dead":
        nearest_only = FlexBCQLinear(w, n_bits, 32, *METHODS["bcq"]).pack().dequantize()
        assert (packed - w).square().sum() <= 1.001 * (nearest_only - w).square().sum()


def test_inputs_that_are_not_finite_are_refused():
    hessian = torch.eye(64)
    hessian[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        FlexBCQLinear(torch.randn(4, 64), 3, 32, *METHODS["bcq"], hessian=hessian, n_passes=1)


@torch.inference_mode()
def test_hessians_are_those_of_the_inputs_that_each_layer_meets(toy):
    """Against products of inputs computed here, layer by layer."""
    checkpoint = Checkpoint(toy)
    block, rope = checkpoint.block(0), rope_tables(checkpoint.config, 64)
    x = torch.randn(3, 64, 64).bfloat16()
    found = input_hessians(block, x, rope)

    h = block.input_layernorm(x.float())
    reads = {f"self_attn.{name}_proj": h for name in "qkv"}
    h = x + block.self_attn(h, *rope)
    reads |= {f"mlp.{name}_proj": block.post_attention_layernorm(h) for name in ("gate", "up")}
    reads["mlp.down_proj"] = F.silu(block.mlp.gate_proj(reads["mlp.up_proj"])) * block.mlp.up_proj(reads["mlp.up_proj"])
    assert found.keys() == reads.keys() | {"self_attn.o_proj"}
    for name, inputs in reads.items():
        torch.testing.assert_close(found[name], torch.einsum("bti,btj->ij", inputs, inputs), rtol=1e-4, atol=1e-3)
    assert found["self_attn.v_proj"] is found["self_attn.q_proj"] and found["mlp.up_proj"] is found["mlp.gate_proj"]


def test_rtn_with_error_feedback_goes_by_its_name():
    with pytest.raises(ValueError, match="--method gptq"):
        Settings(method="rtn", feedback_passes=1)
    with pytest.raises(ValueError, match="--method rtn"):
        Settings(method="gptq", feedback_passes=0)
    assert [Settings(method=m).feedback_passes for m in ("rtn", "gptq", "flexbcq")] == [0, 1, 2]


def test_a_second_pass_needs_levels_that_can_be_fitted():
    with pytest.raises(ValueError, match="levels of gptq are fixed"):
        Settings(method="gptq", feedback_passes=2)
