"""Calibration end to end: the files, their perplexity, determinism, bad input."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import call, perplexity_by_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate import main
from eval import perplexity
from flexbcq import METHODS, FlexBCQLinear
from kernel import BCQLinear
from llama import linears, rope_tables
from support.checkpoint import Checkpoint
from support.data import cut, load_texts, load_tokenizer, read_text, tokenize
from support.settings import TINY, Settings

FEW_STEPS = ["--samples", "8", "--epochs", "2", "--batch-size", "2", "--group-size", "32"]


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
    options = ["--model", toy, "--text", text, "--bits", 2, "--method", "bcq", *FEW_STEPS, *option]
    assert call(main, *options, "--out", tmp_path / "out").code == 0
    checkpoint = Checkpoint(toy)
    settings = Settings(text=text, samples=8, seq_len=64, eval_seq_len=64, eval_windows=1)
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


@pytest.mark.parametrize(
    "switch",
    ["--mapping-rate 0.01", "--level-rate 0.01", "--period 1", "--no-local", "--tau 0.5", "--no-learn-shift"]
    + ["--original-input 0", "--n-ratios 2", "--n-rounds 3", "--no-importance"],
)
def test_every_switch_changes_what_is_written_and_is_on_record(switch, toy, text, tmp_path):
    """At a rate that moves many codes in the few steps there are."""
    written = []
    for name, option in ("plain", []), ("switched", switch.split()):
        rate = [] if "mapping" in switch else ["--mapping-rate", 0.3]
        options = ["--text", text, "--bits", 4, *FEW_STEPS, "--no-baselines", *rate, *option]
        assert call(main, "--model", toy, "--out", tmp_path / name, *options).code == 0
        settings = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        block_1 = tmp_path / name / "model-00002-of-00003.safetensors"
        written.append((settings, block_1.read_bytes()))
    key = switch.split()[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
    assert written[0][0][key] != written[1][0][key]
    assert written[0][1] != written[1][1]


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
    """The README's main command with few steps, at 2 bits."""
    result = call(main, "--out", tmp_path / "out", "--bits", 2, "--samples", 16, "--epochs", 4)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())["perplexity"]
    assert found["original"] < 20
    assert found["rtn"] > 2 * found["original"]
    assert found["flexbcq"] < 0.5 * found["rtn"]
    for word in ("original", "rtn, 2 bits", "flexbcq, 2 bits", "bits per weight", "seconds"):
        assert word in result.out
    assert "block 6/6" in result.err and "->" in result.err and "min left" in result.err


# ------------------------------------------------------------------------------------------------------ bad input


def test_output_folder_in_use_is_refused_and_left_alone(toy, text, tmp_path):
    (tmp_path / "precious").write_text("data")
    result = call(main, "--model", toy, "--text", text, "--out", tmp_path, *FEW_STEPS)
    assert result.code == 2 and "exists and is not empty" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_quantized_model_is_refused(packed, text, tmp_path):
    result = call(main, "--model", packed["rtn"], "--text", text, "--out", tmp_path / "out")
    assert result.code == 2 and "is quantized already" in result.err


def test_full_disk_before_the_first_block_gets_one_line_and_leaves_nothing(toy, text, tmp_path):
    """No file may grow beyond 10 kB: writing the first shard fails as on a full disk."""
    limit = "import resource, calibrate; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); calibrate.main()"
    options = ["--model", toy, "--text", text, "--out", tmp_path / "out", *FEW_STEPS]
    result = subprocess.run([sys.executable, "-c", limit, *map(str, options)], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "could not write model-00001-of-00003.safetensors" in result.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite_names_the_block(toy, text, tmp_path):
    model = shutil.copytree(toy, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1e18)  # its square is beyond float32
    save_file(tensors, model / "model.safetensors")
    result = call(main, "--model", model, "--text", text, "--out", tmp_path / "out", *FEW_STEPS)
    assert result.code == 2 and "model.layers.0: the loss is" in result.err


def test_interrupt_before_the_first_block_gets_one_line_and_leaves_nothing(toy, text, tmp_path):
    options = ["--model", toy, "--text", text, "--out", tmp_path / "out", "--samples", 64, "--epochs", 1000]
    command = [sys.executable, "calibrate.py", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "loss" in line:  # training has begun
                break
        process.send_signal(2)
        rest = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in rest
    assert rest.strip().splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- the plan, and memory


def test_dry_run_prints_the_plan_and_writes_nothing(toy, text, tmp_path):
    options = ["--model", toy, "--text", text, "--out", tmp_path / "out", *FEW_STEPS]
    result = call(main, *options, "--dry-run")
    assert result.code == 0 and list(tmp_path.iterdir()) == []
    for line in ("out: 0.001 GB of", "activations in memory: 0.000 GB of", "perplexity of the original on 4 windows: "):
        assert line in result.out
    assert result.out.splitlines()[-1].startswith("2 blocks of 8 steps, 0.0")
    peak = float(re.search(r"cpu: ([0-9.]+) GB of .* at the peak", result.out)[1])
    assert 0.1 < peak < 10  # PyTorch and what the tests before have left


def test_wrong_rope_shows_in_the_plan(tmp_path):
    """The bundled model with positions that turn a thousand times as slowly."""
    found = []
    for model in (TINY, shutil.copytree(TINY, tmp_path / "model")):
        if model != TINY:
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"rope_theta": 1e12}))
        result = call(
            main, "--model", model, "--text", TINY / "train.py", "--seq-len", 128, "--method", "rtn", "--dry-run"
        )
        found.append(float(result.out.split("perplexity of the original on")[1].split()[2]))
    assert found[1] > 1.5 * found[0]


def test_offloaded_activations_give_the_same_bytes_and_leave_no_file(packed, toy, text, tmp_path):
    (tmp_path / "disk").mkdir()
    options = ["--offload", tmp_path / "disk", "--bits", 2, *FEW_STEPS]
    assert call(main, "--model", toy, "--out", tmp_path / "out", "--text", text, *options).code == 0
    for shard in packed["flexbcq"].glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    assert list((tmp_path / "disk").iterdir()) == []


def peak_megabytes(*options):
    """The largest resident memory of a calibration in a process of its own, mapped files included."""
    program = "import calibrate; calibrate.main(); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", program, *map(str, options)]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(text, tmp_path):
    """4, 16 and 64 random blocks of the bundled model's width."""
    config = json.loads((TINY / "config.json").read_text())
    peaks = {}
    for n_blocks in (4, 16, 64):
        model, out = shutil.copytree(TINY, tmp_path / f"model{n_blocks}"), tmp_path / f"out{n_blocks}"
        (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_blocks}))
        tensors = {}
        for name, t in load_file(TINY / "model.safetensors").items():
            if "layers" not in name:
                tensors[name] = t
            elif "layers.0" in name:
                noise = (torch.randn(t.shape).mul(0.02).to(t.dtype) for _ in range(n_blocks))
                tensors |= {name.replace("layers.0", f"layers.{i}"): x for i, x in enumerate(noise)}
        save_file(tensors, model / "model.safetensors")
        options = ["--samples", 2, "--epochs", 1, "--seq-len", 128, "--method", "flexround"]
        peaks[n_blocks] = peak_megabytes("--model", model, "--text", text, "--out", out, *options)
        print(
            f"{n_blocks} blocks, {(model / 'model.safetensors').stat().st_size / 1e6:.0f} MB: {peaks[n_blocks]:.0f} MB"
        )
    assert peaks[64] < 1.05 * peaks[4]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bcq", "flexbcq"])
def test_one_and_two_threads_give_the_same_bytes(method, text, tmp_path):
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            options = ["--text", text, "--out", tmp_path / str(n), "--samples", 2, "--method", method]
            assert call(main, *options).code == 0
    finally:
        torch.set_num_threads(before)
    for shard in (tmp_path / "1").glob("*.safetensors"):
        assert (tmp_path / "2" / shard.name).read_bytes() == shard.read_bytes()
