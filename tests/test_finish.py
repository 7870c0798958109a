"""The finish: its gradient, its memory of the best state, its place in a run, and that it can be killed."""

import json
import shutil

import pytest
import torch
from helpers import FEW_STEPS, call, contents

import support.finish
from calibrate import main
from flexbcq import METHODS, FlexBCQLinear
from kernel import BCQLinear
from llama import linears, rope_tables
from support.checkpoint import Checkpoint
from support.command import coarse_products
from support.finish import FixedCodesLinear, mean_divergence, step, swap, train_levels
from support.settings import Settings

SETTINGS = Settings(finish_steps=24, finish_rate=5e-3, batch_size=1, device=torch.device("cpu"))


@pytest.fixture
def quantized(toy):
    """(checkpoint, packed blocks): the toy with every layer rounded to 2 bits."""
    checkpoint = Checkpoint(toy)
    blocks = [checkpoint.block(i) for i in range(2)]
    for block in blocks:
        for name, linear in linears(block).items():
            block.set_submodule(name, FlexBCQLinear(linear.weight, 2, 32, *METHODS["bcq"], n_ratios=1).pack())
    return checkpoint, blocks


def random_ids(*shape, seed=0):
    return torch.randint(2048, shape, generator=torch.Generator().manual_seed(seed))


def packed_layers(blocks):
    """Those of blocks that are trained, or not any more."""
    for block in blocks:
        list(swap(block, FixedCodesLinear, FixedCodesLinear.pack))
    return [m for block in blocks for m in block.modules() if isinstance(m, BCQLinear)]


def last_states(checkpoint, blocks, ids):
    rope, x = rope_tables(checkpoint.config, ids.shape[1]), checkpoint.embed(ids)
    with torch.no_grad():
        for block in blocks:
            x = block(x, *rope)
    return x


def test_a_layer_with_fixed_codes_computes_what_it_packs(quantized):
    packed = packed_layers(quantized[1])[0]
    packed.bias = torch.nn.Parameter(torch.randn(packed.out_features), requires_grad=False)
    layer, x = FixedCodesLinear(packed), torch.randn(3, packed.in_features)
    torch.testing.assert_close(layer(x), x @ packed.dequantize().T + packed.bias)
    with torch.no_grad():
        layer.theta.add_(torch.randn_like(layer.theta) * 0.1)
    torch.testing.assert_close(layer(x), x @ layer.pack().dequantize().T + layer.pack().bias, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer.pack().bit_planes, packed.bit_planes)


def test_gradient_block_by_block_is_autograd_of_the_whole_model(quantized, toy, monkeypatch):
    """And the loss is the divergence by its definition, without the first token."""
    monkeypatch.setattr(support.finish, "HEAD_TOKENS", 7)
    checkpoint, blocks = quantized
    ids, original, model = random_ids(1, 20), Checkpoint(toy).model(), Checkpoint(toy).model()

    # the textbook: one graph through all blocks
    thetas = []
    for mine, whole in zip(blocks, model.model.layers):
        for name in linears(whole):
            layer = FixedCodesLinear(mine.get_submodule(name))
            whole.set_submodule(name, layer)
            thetas.append(layer.theta)
    p, q = original(ids).softmax(-1)[:, 1:], model(ids).softmax(-1)[:, 1:]
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    expected.backward()

    found = [layer.theta for block in blocks for _, layer in swap(block, BCQLinear, FixedCodesLinear)]
    rope, target = (
        rope_tables(checkpoint.config, 20),
        last_states(checkpoint, Checkpoint(toy).model().model.layers, ids),
    )
    x = checkpoint.embed(ids)
    assert mean_divergence(blocks, checkpoint.head(), x, target, rope) == pytest.approx(expected.item(), rel=1e-4)
    step(blocks, checkpoint.head(), x, target[0], rope)
    for ours, theirs in zip(found, thetas):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_finish_lowers_the_divergence_and_changes_nothing_but_alpha_and_shift(quantized):
    checkpoint, blocks = quantized
    before = [{k: t.clone() for k, t in block.state_dict().items()} for block in blocks]
    losses = train_levels(checkpoint, blocks, random_ids(8, 32), random_ids(4, 32, seed=1), SETTINGS)
    assert len(losses) == 5 and min(losses) < 0.98 * losses[0]
    packed_layers(blocks)
    for old, block in zip(before, blocks):
        for key, tensor in block.state_dict().items():
            assert torch.equal(tensor, old[key]) != key.endswith(("alpha", "shift"))


def test_the_best_state_that_was_seen_stays_and_none_worse_than_the_first(quantized):
    checkpoint, blocks = quantized
    ids, held_out = random_ids(8, 32), random_ids(4, 32, seed=1)
    rough = Settings(finish_steps=8, finish_rate=3e-2, batch_size=1, device=torch.device("cpu"))
    losses = train_levels(checkpoint, blocks, ids, held_out, rough)
    packed_layers(blocks)
    still = Settings(finish_steps=1, finish_rate=0.0, batch_size=1, device=torch.device("cpu"))
    assert train_levels(checkpoint, blocks, ids, held_out, still)[0] == pytest.approx(min(losses), rel=1e-3)

    before = [layer.alpha.clone() for layer in packed_layers(blocks)]
    ruinous = Settings(finish_steps=4, finish_rate=1.0, batch_size=1, device=torch.device("cpu"))
    losses = train_levels(checkpoint, blocks, ids, held_out, ruinous)
    assert losses[-1] > losses[0]
    for old, layer in zip(before, packed_layers(blocks)):
        torch.testing.assert_close(layer.alpha, old, rtol=2e-3, atol=1e-6)


def test_products_are_coarse_in_the_steps_and_exact_in_what_is_measured(quantized, monkeypatch):
    seen = {"step": set(), "mean_divergence": set()}

    def spy(name):
        original = getattr(support.finish, name)

        def spied(*arguments):
            seen[name].add(torch.backends.cuda.matmul.allow_tf32)
            return original(*arguments)

        monkeypatch.setattr(support.finish, name, spied)

    spy("step"), spy("mean_divergence")
    monkeypatch.setattr(support.finish, "coarse_products", lambda device: coarse_products(torch.device("cuda")))
    train_levels(*quantized, random_ids(8, 32), random_ids(4, 32, seed=1), SETTINGS)
    assert seen == {"step": {True}, "mean_divergence": {False}}


def test_the_rate_is_lower_in_small_groups_and_from_4_bits_on():
    groups = {(4, -1): 1e-3, (3, 64): 1e-3, (2, 32): 1e-3, (3, 32): 5e-4, (4, 128): 2.5e-4, (4, 64): 1.25e-4}
    for (bits, group_size), rate in groups.items():
        assert Settings(bits=bits, group_size=group_size).finish_rate == rate
    assert Settings(bits=4, group_size=64, finish_rate=0.01).finish_rate == 0.01


# ----------------------------------------------------------------------------------------------------------- in a run


def command(model, text, out):
    """A short calibration at 2 bits with a short finish."""
    options = ["--bits", 2, "--no-baselines", *FEW_STEPS, "--finish-steps", 4]
    return ["--model", model, "--text", text, "--out", out, *options]


@pytest.fixture(scope="module")
def runs(toy, text, tmp_path_factory):
    """A function from more options to the folder of a run on the toy."""
    root = tmp_path_factory.mktemp("finish")

    def calibrate(name, *more):
        result = call(main, *command(toy, text, root / name), *more)
        assert result.code == 0, result.err
        return root / name

    return calibrate


def test_a_run_that_was_killed_in_its_finish_ends_in_the_same_bytes(runs):
    """Killed before the report says so, while files are replaced, and just before the end."""
    finished, blocks_only = runs("finished"), runs("blocks-only", "--finish-steps", 0)
    report = json.loads((finished / "calibration.json").read_text())
    assert len(report["finish"]["divergence"]) == 5
    shards = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors")
    assert all((finished / name).read_bytes() != (blocks_only / name).read_bytes() for name in shards)

    for state in ("blocks only", "one file staged", "one file replaced", "all replaced"):
        partial = finished.with_name(f"{state}.partial")
        shutil.copytree(finished, partial)
        if state != "all replaced":
            shutil.copy(blocks_only / shards[1], partial)
            (partial / "finish").mkdir()
            shutil.copy(finished / shards[1], partial / "finish")
        if state in ("blocks only", "one file staged"):
            shutil.copy(blocks_only / shards[0], partial)
            before = {key: value for key, value in report.items() if key != "finish"}
            (partial / "calibration.json").write_text(json.dumps(before))
        if state == "blocks only":
            shutil.rmtree(partial / "finish")
        assert contents(runs(state)) == contents(finished), state


def test_samples_of_the_blocks_are_the_same_with_and_without_a_finish(runs):
    reports = [json.loads((runs(f"n{n}", "--finish-steps", n) / "calibration.json").read_text()) for n in (0, 4)]
    assert "finish" not in reports[0] and "finish" in reports[1]
    assert [b["loss_after"] for b in reports[0]["blocks"]] == [b["loss_after"] for b in reports[1]["blocks"]]


def test_a_model_that_does_not_fit_is_quantized_without(toy, text, tmp_path, monkeypatch):
    monkeypatch.setattr("support.plan.peak_and_total", lambda device: (0, 1000))
    result = call(main, *command(toy, text, tmp_path / "out"))
    assert result.code == 0
    assert "not enough memory, here or on another device: going on without the finish" in result.out
    report, config = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("calibration", "config"))
    assert report["finish"] is None and config["quantization_config"]["finish_steps"] == 0


def fail(*_):
    raise OSError("disk full")


@pytest.mark.parametrize("dies", ["calibrate.finish", "support.finish.write_json", "calibrate.complete"])
@pytest.mark.parametrize("memory", [("much", "little"), ("little", "much")], ids="then".join)
def test_a_run_is_resumed_with_more_or_less_memory(memory, dies, toy, text, tmp_path, monkeypatch):
    """What counts is the memory where the blocks are done: before that, there or after."""
    sizes, out = {"much": (0, 10**12), "little": (0, 1000)}, tmp_path / "out"
    if memory[0] == "little" and dies == "calibrate.finish":
        dies = "calibrate.leave_out"
    with monkeypatch.context() as patch:
        patch.setattr("support.plan.peak_and_total", lambda device: sizes[memory[0]])
        patch.setattr(dies, fail)
        assert "the same command resumes there" in call(main, *command(toy, text, out)).err
    monkeypatch.setattr("support.plan.peak_and_total", lambda device: sizes[memory[1]])
    assert call(main, *command(toy, text, out)).code == 0

    decided_by = memory[0] if dies == "calibrate.complete" else memory[1]
    report, config = (json.loads((out / f"{name}.json").read_text()) for name in ("calibration", "config"))
    assert bool(report["finish"]) == (decided_by == "much") and not (out / "finish").exists()
    assert config["quantization_config"]["finish_steps"] == (4 if report["finish"] else 0)


def test_space_for_a_finish_that_does_not_fit_is_not_asked_for(toy, text, tmp_path, monkeypatch):
    monkeypatch.setattr("support.plan.peak_and_total", lambda device: (0, 1000))
    result = call(main, *command(toy, text, tmp_path / "out"), "--dry-run")
    assert result.code == 0 and "without the finish" in result.out and "--finish-steps 4, states" not in result.out


def test_levels_that_are_fixed_have_no_finish():
    with pytest.raises(ValueError, match="the levels of flexround are not trained"):
        Settings(method="flexround", finish_steps=4)
