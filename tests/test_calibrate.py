"""Calibration end to end: the files, their perplexity, determinism, what each option changes."""

import json
import shutil

import pytest
import torch
from helpers import FEW_STEPS, call, perplexity_by_transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate import main
from eval import perplexity
from flexbcq import METHODS, FlexBCQLinear
from kernel import BCQLinear
from llama import linears, rope_tables
from support.checkpoint import Checkpoint
from support.data import cut, load_texts, load_tokenizer, read_text, standard_library_text, tokenize
from support.settings import Settings


@pytest.fixture(scope="module")
def packed(toy, text, tmp_path_factory):
    """The toy quantized by each method, and once more by flexbcq as plain weights: {name: folder}."""
    root, folders = tmp_path_factory.mktemp("packed"), {}
    for name in [*METHODS, "dequantized"]:
        folders[name] = root / name
        method = ["--dequantized"] if name == "dequantized" else ["--method", name]
        result = call(main, "--model", toy, "--out", folders[name], "--text", text, "--bits", 2, *method, *FEW_STEPS)
        assert result.code == 0, result.err
    return folders


@pytest.fixture(scope="module")
def windows(toy, text):
    return cut(tokenize(load_tokenizer(toy), read_text(text), "text", 64), 64)


def test_in_memory_packed_and_dequantized_models_have_one_perplexity(packed, windows):
    streamed = perplexity(Checkpoint(packed["flexbcq"]), windows)
    model = Checkpoint(packed["flexbcq"]).model()
    with torch.inference_mode():
        losses = [torch.nn.functional.cross_entropy(model(w[None])[0, :-1], w[1:]) for w in windows]
    assert streamed == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert streamed == pytest.approx(perplexity_by_transformers(packed["dequantized"], windows), rel=1e-3)


def test_dequantized_folder_opens_in_transformers_and_generates_the_same(packed):
    folder = packed["dequantized"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt = tokenizer("def f(x):", return_tensors="pt")
    theirs = model.generate(**prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(theirs, Checkpoint(folder).model().generate(prompt.input_ids, 20))


@pytest.mark.parametrize("method", METHODS)
def test_folder_holds_planes_for_every_linear_and_the_rest_untouched(method, packed, toy):
    source, checkpoint = load_file(toy / "model.safetensors"), Checkpoint(packed[method])
    block = checkpoint.block(0)
    assert not linears(block) and sum(isinstance(m, BCQLinear) for m in block.modules()) == 7
    stored = {}
    for shard in packed[method].glob("*.safetensors"):
        stored |= load_file(shard)
    for name, tensor in source.items():
        if "_proj" in name:
            assert name not in stored
            assert stored[name.replace("weight", "alpha")].dtype == torch.float16
        else:
            assert torch.equal(stored[name], tensor) and stored[name].dtype == torch.bfloat16
    config = json.loads((packed[method] / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"], config["method"], config["seed"]) == (
        "flexbcq",
        2,
        32,
        method,
        0,
    )


@pytest.mark.parametrize("kind, bits", [([], 2 + 16 * 3 / 32), (["--dequantized"], 16)], ids=["packed", "dequantized"])
def test_table_says_what_the_files_hold(kind, bits, toy, text, tmp_path):
    """Mistral's folders hold all weights once more in a file that no index names."""
    model = shutil.copytree(toy, tmp_path / "model")
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    options = ["--text", text, "--out", tmp_path / "out", "--method", "rtn", "--bits", 2, "--group-size", 32, *kind]
    *_, original, rtn, _ = call(main, "--model", model, *options, *FEW_STEPS).out.splitlines()
    sizes = [sum(f.stat().st_size for f in folder.glob("model*.safetensors")) for folder in (model, tmp_path / "out")]
    assert original.split()[2:] == ["16.000", f"{sizes[0] / 1e6:.1f}", "MB"]
    assert rtn.split()[-3:] == [f"{bits:.3f}", f"{sizes[1] / 1e6:.1f}", "MB"]


def test_report_holds_losses_perplexities_and_a_plot(packed, toy, text):
    report = json.loads((packed["flexbcq"] / "calibration.json").read_text())
    assert len(report["blocks"]) == 2 and set(report["perplexity"]) == {"original", "rtn", "flexbcq"}
    assert report["bits_per_weight"] == 2 + 16 * 3 / 32
    assert all(b["loss_after"] < b["loss_before"] for b in report["blocks"])
    assert (packed["flexbcq"] / "calibration.png").read_bytes().startswith(b"\x89PNG")
    held_out = read_text(text)[len(read_text(text)) * 9 // 10 :]
    windows = cut(tokenize(load_tokenizer(toy), held_out, "text", 64), 64)
    for name, folder in (("original", toy), ("flexbcq", packed["flexbcq"]), ("rtn", packed["rtn"])):
        assert report["perplexity"][name] == pytest.approx(perplexity(Checkpoint(folder), windows), rel=1e-6)


def test_same_seed_same_bytes_and_another_seed_other_bytes(packed, toy, text, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        call(main, "--model", toy, "--out", tmp_path / name, "--text", text, "--bits", 2, "--seed", seed, *FEW_STEPS)
    shards = sorted(p.name for p in packed["flexbcq"].glob("*.safetensors"))
    for shard in shards:
        assert (tmp_path / "same" / shard).read_bytes() == (packed["flexbcq"] / shard).read_bytes()
    assert (tmp_path / "other" / shards[0]).read_bytes() != (packed["flexbcq"] / shards[0]).read_bytes()


@pytest.mark.parametrize("option", ([], ["--no-importance"]), ids=["importance", "weights alone"])
@torch.inference_mode()
def test_initialization_weighs_columns_by_the_inputs_they_meet(option, toy, text, tmp_path):
    """Block 0 as written by bcq, against what `FlexBCQLinear` makes of inputs computed here, layer by layer."""
    options = ["--model", toy, "--text", text, "--bits", 2, "--method", "bcq", *FEW_STEPS]
    options += ["--feedback-passes", 0, *option]
    assert call(main, *options, "--out", tmp_path / "out").code == 0
    checkpoint = Checkpoint(toy)
    settings = Settings(method="bcq", text=text, samples=8, seq_len=64, eval_seq_len=64, eval_windows=1)
    block, x = checkpoint.block(0), checkpoint.embedding(torch.bfloat16)(load_texts(checkpoint, settings)[0]).float()
    reads = {"self_attn.q_proj": block.input_layernorm(x)}
    x = x + block.self_attn(reads["self_attn.q_proj"], *rope_tables(checkpoint.config, 64))
    reads["mlp.up_proj"] = block.post_attention_layernorm(x)
    gate, up = (linear(reads["mlp.up_proj"]) for linear in (block.mlp.gate_proj, block.mlp.up_proj))
    reads["mlp.down_proj"] = torch.nn.functional.silu(gate) * up
    written = Checkpoint(tmp_path / "out").block(0)
    for name, inputs in reads.items():
        weight = checkpoint.tensor(f"model.layers.0.{name}.weight")
        importance = None if option else inputs.square().sum((0, 1))
        expected = FlexBCQLinear(weight, 2, 32, *METHODS["bcq"], importance=importance).pack().dequantize()
        torch.testing.assert_close(written.get_submodule(name).dequantize(), expected, rtol=2e-3, atol=1e-5)


@pytest.fixture(scope="module")
def written(toy, text, tmp_path_factory):
    """A function from options to what a calibration with them puts on record, and the bytes of its second block; at a
    rate at which training helps, or else it would be undone, from a quick initialization."""

    def calibrate(*options):
        out = tmp_path_factory.mktemp("written") / "out"
        quick = ["--mapping-rate", 2e-3, "--n-ratios", 2, "--n-rounds", 2, "--no-baselines", "--eval-windows", 1]
        result = call(main, "--model", toy, "--out", out, "--text", text, "--bits", 4, *FEW_STEPS, *quick, *options)
        assert result.code == 0, result.err
        config = json.loads((out / "config.json").read_text())
        return config["quantization_config"], (out / "model-00002-of-00003.safetensors").read_bytes()

    return calibrate


@pytest.fixture(scope="module")
def plain(written):
    return written()


@pytest.mark.parametrize(
    "switch",
    ["--mapping-rate 0.01", "--level-rate 0.01", "--period 1", "--tau 0.5", "--no-learn-shift"]
    + ["--original-input 0", "--n-ratios 5", "--n-rounds 5", "--no-importance", "--feedback-passes 1"]
    + ["--finish-steps 0", "--finish-rate 0.1"],
)
def test_every_switch_changes_what_is_written_and_is_on_record(switch, plain, written):
    name = switch.split()[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
    on_record, block_1 = written(*switch.split())
    assert on_record[name] != plain[0][name] and on_record | {name: plain[0][name]} == plain[0]
    assert block_1 != plain[1]


def test_without_local_mapping_weights_jump(toy, text, tmp_path):
    """At a rate so high that weights pass several levels between two mappings."""
    options = ["--model", toy, "--text", text, "--bits", 4, *FEW_STEPS, "--mapping-rate", 0.3, "--no-baselines"]
    far = []
    for switch in ("--local", "--no-local"):
        assert call(main, *options, switch, "--out", tmp_path / switch).code == 0
        report = json.loads((tmp_path / switch / "calibration.json").read_text())
        far.append(sum(report["blocks"][0]["moves"][4:]))  # share of weights that moved by 4 levels or more
    assert far[0] == 0 < far[1]  # 8 steps have three mappings


@pytest.mark.parametrize("method, without", [("gptq", "rtn"), ("bcq", "bcq"), ("flexbcq", "flexbcq")])
def test_error_feedback_lowers_the_loss_and_is_on_record(method, without, packed, toy, text, tmp_path):
    """Of block 0, on which both see the same inputs; the baseline rtn is without it."""
    option = ["--method", "gptq"] if method == "gptq" else ["--method", method, "--feedback-passes", 0]
    result = call(main, "--model", toy, "--text", text, "--bits", 2, *option, *FEW_STEPS, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    folders = [tmp_path / "out", packed[without]] if method == "gptq" else [packed[method], tmp_path / "out"]
    fed, plain = (json.loads((folder / "calibration.json").read_text()) for folder in folders)
    for loss in ("loss_before", "loss_after"):
        assert fed["blocks"][0][loss] < 0.98 * plain["blocks"][0][loss]
    assert fed["perplexity"]["rtn"] == plain["perplexity"]["rtn"]
    passes = [report["settings"]["feedback_passes"] for report in (fed, plain)]
    assert passes == [1 if method == "gptq" else 2, 0]


def test_the_preset_of_the_paper_removes_each_departure_and_leaves_the_rest(toy, text, tmp_path):
    options = ["--model", toy, "--text", text, "--bits", 2, "--no-baselines", "--samples", 4, "--epochs", 1, "--paper"]
    result = call(main, *options, "--group-size", 32, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    departures = {
        "n_ratios": 50,  # ours: 10 clipping ratios
        "n_rounds": 15,  # and 8 rounds from each
        "level_rate": 5e-4,  # 2e-3
        "importance": False,  # errors of the initialization count alike
        "learn_shift": False,  # the shift is fitted, not trained
        "feedback_passes": 0,
        "finish_steps": 0,
    }
    ours = Settings()
    for name, value in report["settings"].items():
        if name in departures:
            assert value == departures[name] != getattr(ours, name)
        elif name not in ("bits", "samples", "seq_len", "epochs", "batch_size", "group_size"):
            assert value == getattr(ours, name), name
    assert "finish" not in report

    overridden = call(main, *options, "--n-ratios", 3, "--group-size", 32, "--out", tmp_path / "other")
    assert overridden.code == 0
    assert json.loads((tmp_path / "other" / "calibration.json").read_text())["settings"]["n_ratios"] == 3


@pytest.mark.parametrize("rate, is_kept", [(1, False), (1e-3, True)])
def test_training_that_made_a_block_worse_is_undone_and_said(rate, is_kept, toy, text, tmp_path):
    """Without training, bcq gives the bytes to compare with: the second block sees what the first one leaves."""
    options = ["--model", toy, "--text", text, "--bits", 3, "--no-baselines", "--finish-steps", 0, *FEW_STEPS]
    rates = ["--mapping-rate", rate, "--level-rate", rate / 10]
    trained = call(main, *options, *rates, "--out", tmp_path / "trained")
    assert trained.code == 0, trained.err
    assert call(main, *options, "--method", "bcq", "--out", tmp_path / "bcq").code == 0
    blocks = json.loads((tmp_path / "trained" / "calibration.json").read_text())["blocks"]
    assert [block["training_kept"] for block in blocks] == [is_kept] * 2
    assert ("(kept from before training, which did not lower it)" in trained.err) == (not is_kept)
    for shard in sorted(path.name for path in (tmp_path / "bcq").glob("*.safetensors")):
        same = (tmp_path / "trained" / shard).read_bytes() == (tmp_path / "bcq" / shard).read_bytes()
        assert same == (not is_kept or shard.startswith("model-00003"))


def test_evaluation_has_a_window_and_a_length_of_its_own(toy, text, tmp_path):
    """The report of a run without baselines, against perplexity measured on the windows that were asked for."""
    options = ["--eval-text", text, "--eval-seq-len", 32, "--eval-windows", 3, "--no-baselines", *FEW_STEPS]
    result = call(main, "--model", toy, "--out", tmp_path / "out", "--text", text, "--seq-len", 64, *options)
    assert result.out.splitlines()[-1].startswith("text.txt, seq_len 32, 3 windows")
    windows = cut(tokenize(load_tokenizer(toy), read_text(text), "text", 32), 32)[:3]
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())["perplexity"]
    assert found == {"flexbcq": pytest.approx(perplexity(Checkpoint(tmp_path / "out"), windows), rel=1e-6)}


def test_report_counts_how_far_codes_moved(packed):
    """In training alone: rtn and bcq have nothing to report, and most weights stay where they are or nearby."""
    for method, folder in packed.items():
        for block in json.loads((folder / "calibration.json").read_text())["blocks"]:
            assert ("moves" in block) == (method not in ("rtn", "bcq"))
            if moves := block.get("moves"):
                assert len(moves) == 4 and sum(moves) == pytest.approx(1) and moves[0] > moves[1] > moves[3]


def test_evaluation_text_is_never_calibrated_on(toy, tmp_path):
    """Only the last tenth differs between two texts: the files are the same, the perplexities are not."""
    folders = []
    for i, ending in enumerate(("alpha beta gamma ", "one two three four ")):
        text = tmp_path / f"{i}.txt"
        text.write_text("for x in range(10): print(x)\n" * 300 + (ending * 100)[:900])
        folders.append(tmp_path / f"out{i}")
        assert call(main, "--model", toy, "--out", folders[i], "--text", text, *FEW_STEPS).code == 0
    reports = [json.loads((f / "calibration.json").read_text()) for f in folders]
    assert reports[0]["perplexity"] != reports[1]["perplexity"] and reports[0]["settings"] == reports[1]["settings"]
    shard = "model-00001-of-00003.safetensors"
    assert (folders[0] / shard).read_bytes() == (folders[1] / shard).read_bytes()


def test_bundled_model_is_hurt_by_rtn_and_helped_by_flexbcq(tmp_path):
    """On files of the standard library that it was not trained on, at 2 bits, with few steps."""
    text = tmp_path / "library.py"
    text.write_text(standard_library_text(held_out=True), "utf-8")
    few = ["--samples", 16, "--seq-len", 64, "--epochs", 2, "--n-ratios", 2]
    evaluation = ["--text", text, "--eval-seq-len", 512, "--eval-windows", 6]
    result = call(main, "--out", tmp_path / "out", "--bits", 2, *few, *evaluation)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())["perplexity"]
    assert found["original"] < 20
    assert found["rtn"] > 2 * found["original"]
    assert found["flexbcq"] < 0.5 * found["rtn"]
    for word in ("original", "rtn, 2 bits", "flexbcq, 2 bits", "bits per weight", "seconds"):
        assert word in result.out
    assert "block 6/6" in result.err and "->" in result.err and "min left" in result.err
