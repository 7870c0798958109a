"""Several processes under torchrun, on one machine or two, do what one does; so do several threads. And when one of
them fails, all end and the error is said. With gloo on the CPU: of NCCL only the choice can be seen here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import blocks_finished, call
from torch.distributed.distributed_c10d import Backend, BackendConfig

from calibrate import main
from support import parallel

slow = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
SETTINGS = ["--samples", "8", "--epochs", "2", "--batch-size", "4", "--bits", "3", "--group-size", "32"]
# error feedback makes a code depend on all before it, so that what differs in the last digit soon differs in a code
SETTINGS += ["--feedback-passes", "0", "--finish-steps", "2"]
HANGS = 1200  # seconds: nothing here takes a tenth of that, unless the machine has other work


def torchrun_command(*arguments, program="calibrate.py", where=("--standalone", "--nproc-per-node", "2")):
    return [sys.executable, "-m", "torch.distributed.run", *where, str(program), *map(str, arguments)]


def torchrun(*arguments, program="calibrate.py"):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = torchrun_command(*arguments, program=program)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS)


def start_two_machines(*arguments, program="calibrate.py"):
    """Two agents of torchrun with a process each, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for number in range(2):
        where = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
        where += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = torchrun_command(*arguments, program=program, where=where)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        agents.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    return agents


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def report(out):
    return json.loads((out / "calibration.json").read_text())


def assert_same_losses(a, b, tolerance=1e-3):
    for ours, theirs in zip(a["blocks"], b["blocks"], strict=True):
        for key in ("loss_before", "loss_after"):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance)
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=tolerance)


@pytest.fixture(scope="module")
def options(toy, text):
    return ["--model", toy, "--text", text, *SETTINGS]


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """The report of a single process."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert call(main, *options, "--out", out).code == 0
    return report(out)


@pytest.fixture(scope="module")
def two(options, tmp_path_factory):
    """The report of two processes."""
    out = tmp_path_factory.mktemp("two") / "out"
    result = torchrun(*options, "--out", out)
    assert result.returncode == 0 and os.listdir(out.parent) == ["out"], result.stderr
    return report(out)


@pytest.fixture
def planted(tmp_path):
    """A function: calibrate.py with some lines before it starts, as a program."""

    def write(lines):
        program = tmp_path / "planted.py"
        start = "import calibrate, eval, torch\nfrom support import parallel\n"
        program.write_text(f"{start}{lines}\ncalibrate.main()\n")
        return program

    return write


# ------------------------------------------------------------------------------------------------------ the same result


@slow
def test_two_processes_give_the_losses_of_one(one, two):
    assert_same_losses(one, two)
    assert one["settings"] == two["settings"]


@slow
def test_error_feedback_of_two_processes_is_as_good_as_that_of_one(options, tmp_path):
    options = [*options, "--feedback-passes", "2", "--no-baselines", "--out"]
    assert call(main, *options, tmp_path / "one").code == 0 == torchrun(*options, tmp_path / "two").returncode
    assert_same_losses(report(tmp_path / "one"), report(tmp_path / "two"), 5e-2)


def test_numbers_have_gloo_beside_nccl():
    assert BackendConfig(Backend(parallel.backends("cuda"))).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
    assert BackendConfig(Backend(parallel.backends("cpu"))).get_device_backend_map()["cpu"] == "gloo"


@slow
def test_two_processes_compute_on_the_cpu_of_a_machine_that_has_a_gpu(options, two, planted, tmp_path):
    program = planted("torch._C._get_accelerator = lambda *_: torch.device('cuda')")
    result = torchrun(*options, "--device", "cpu", "--out", tmp_path / "out", program=program)
    assert result.returncode == 0, result.stderr
    assert_same_losses(report(tmp_path / "out"), two, 1e-9)


@pytest.mark.parametrize("asked, own", [("cuda", "cuda:3"), ("cuda:0", "cuda:3"), ("cpu", "cpu")])
def test_each_process_has_a_gpu_of_its_own(asked, own, monkeypatch):
    assert parallel.own_device(asked) == asked
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parallel.own_device(asked) == own


DIFFERENT_START = """
quantize_layers = calibrate.quantize_layers
def differently(*arguments):
    quantizers = quantize_layers(*arguments)
    for q in quantizers.values() if parallel.rank() else ():
        q.alpha.data *= 1.5
        q.codes, q.w = 7 - q.codes, 2 * q.w
    return quantizers
calibrate.quantize_layers = differently
"""


LITTLE_MEMORY = """
from support import plan
peak_and_total = plan.peak_and_total
plan.peak_and_total = lambda device: (0, 1000) if parallel.rank() else peak_and_total(device)
"""


@slow
def test_no_process_begins_a_finish_that_does_not_fit_on_the_device_of_another(options, planted, tmp_path):
    options = [*options, "--finish-steps", "4", "--no-baselines", "--out", tmp_path / "out"]
    result = torchrun(*options, program=planted(LITTLE_MEMORY))
    assert result.returncode == 0 and report(tmp_path / "out")["finish"] is None, result.stderr


@slow
def test_all_start_training_from_what_the_first_has_initialized(options, two, planted, tmp_path):
    """GPUs may round differently; here the other process initializes something else altogether."""
    program = planted(DIFFERENT_START)
    result = torchrun(*options, "--no-baselines", "--out", tmp_path / "out", program=program)
    assert result.returncode == 0, result.stderr
    assert_same_losses(report(tmp_path / "out"), two | {"perplexity": report(tmp_path / "out")["perplexity"]}, 1e-9)
    assert report(tmp_path / "out")["perplexity"]["flexbcq"] == pytest.approx(two["perplexity"]["flexbcq"], rel=1e-9)


COUNT_WINDOWS = """
run_blocks = eval.run_blocks
def counting(checkpoint, windows, *arguments):
    with open(f"{FOLDER}/{parallel.rank()}", "a") as file:
        print(len(windows), file=file)
    return run_blocks(checkpoint, windows, *arguments)
eval.run_blocks = counting
"""


@slow
@pytest.mark.parametrize("n_windows, shares", [(7, (4, 3)), (1, (1, None))])
def test_perplexities_are_shared_among_the_processes(n_windows, shares, options, planted, tmp_path):
    program, asked = planted(f"FOLDER = {str(tmp_path)!r}{COUNT_WINDOWS}"), ["--eval-windows", n_windows]
    result = torchrun(*options, *asked, "--out", tmp_path / "two", program=program)
    assert result.returncode == 0, result.stderr

    counts = [path.read_text().split()[1:] if path.exists() else [] for path in (tmp_path / "0", tmp_path / "1")]
    # what follows the rehearsal: original, rtn, flexbcq
    assert counts == [3 * [str(share)] if share else [] for share in shares]
    assert call(main, *options, *asked, "--out", tmp_path / "one").code == 0
    assert_same_losses(report(tmp_path / "one"), report(tmp_path / "two"))


# ------------------------------------------------------------------------------------------------------------- failures


@slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--bits", "9"], "--bits 9: choose 1 to 8"),
        (
            ["--batch-size", "1"],
            "--batch-size 1: must divide --samples 8 and be a multiple of the number of processes (2)",
        ),
    ],
)
def test_error_of_all_processes_is_one_line(options, message, toy, text, tmp_path):
    result = torchrun("--model", toy, "--text", text, "--out", tmp_path / "out", *SETTINGS, *options)
    assert result.returncode and len(errors(result)) == 1 and message in errors(result)[0], result.stderr
    assert list(tmp_path.iterdir()) == []


def kill_child(process, number=-1):
    """The last process that another has started, which of those of torchrun is the last rank."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[number]), signal.SIGKILL)


@slow
def test_death_of_one_process_ends_all_with_one_line_and_finished_blocks_are_kept(toy, text, tmp_path):
    options = ["--model", toy, "--text", text, "--out", tmp_path / "out", *SETTINGS, "--epochs", "20"]
    with subprocess.Popen(torchrun_command(*options), stderr=subprocess.PIPE, text=True) as launcher:
        while blocks_finished(tmp_path / "out") < 1:
            time.sleep(0.01)
        kill_child(launcher)
        lines = [line for line in launcher.stderr.read().splitlines() if line.startswith("error: ")]
    assert launcher.returncode and len(lines) <= 1 and os.listdir(tmp_path) == ["out.partial"]
    resumed = torchrun(*options)
    assert resumed.returncode == 0 and os.listdir(tmp_path) == ["out"], resumed.stderr


@slow
def test_two_machines_of_which_one_dies_and_one_process_goes_on(options, tmp_path):
    """Many epochs: the first block must be finished before the second machine is shot down."""
    options = [*options, "--epochs", "20", "--finish-steps", "4", "--out", tmp_path / "out"]
    agents = start_two_machines(*options)
    while blocks_finished(tmp_path / "out") < 1:
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.01)
    first_block = json.loads((tmp_path / "out.partial" / "calibration.json").read_text())["blocks"][0]
    kill_child(agents[1])
    for agent in agents:
        agent.communicate(timeout=HANGS)
        assert agent.returncode
    assert os.listdir(tmp_path) == ["out.partial"]

    assert call(main, *options).code == 0 and os.listdir(tmp_path) == ["out"]
    assert call(main, *options[:-1], tmp_path / "whole").code == 0
    assert report(tmp_path / "out")["blocks"][0] == first_block
    assert_same_losses(report(tmp_path / "out"), report(tmp_path / "whole"), 1e-2)


FAILS_IN_RANK_1 = """
train_block = calibrate.train_block
def fails(*arguments):
    if parallel.rank() == 1:
        raise TypeError("planted")
    train_block(*arguments)
calibrate.train_block = fails
"""


@slow
@pytest.mark.parametrize("machines", [1, 2])
def test_an_unexpected_error_of_any_process_is_printed_with_its_traceback(machines, options, planted, tmp_path):
    options, program = [*options, "--out", tmp_path / "out"], planted(FAILS_IN_RANK_1)
    if machines == 1:
        result = torchrun(*options, program=program)
        assert result.returncode
        said = result.stderr
    else:
        agents = start_two_machines(*options, program=program)
        said = "".join(agent.communicate(timeout=HANGS)[1] for agent in agents)
        assert all(agent.returncode for agent in agents)
    assert said.count("TypeError: planted") == 1 and said.count("in fails") == 1, said


def test_an_error_is_printed_when_torchrun_is_gone():
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "1"}
    command = [sys.executable, "-c", "from support import parallel; parallel.report('error: planted')"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | there, timeout=60)
    assert errors(result) == ["error: planted"]


# -------------------------------------------------------------------------------------------------------------- threads


@slow
@pytest.mark.parametrize("method", ["bcq", "flexbcq"])
def test_one_and_two_threads_give_the_same_bytes_but_for_feedback_and_finish(method, text, tmp_path):
    """The bundled model, whose layers are large enough to be shared among threads. (In error feedback a last digit
    differs and becomes another code, in the finish it becomes another alpha.)"""
    few = ["--text", text, "--samples", 2, "--method", method, "--feedback-passes", 0, "--finish-steps", 0]
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert call(main, *few, "--out", tmp_path / str(n)).code == 0
    finally:
        torch.set_num_threads(before)
    for shard in (tmp_path / "1").glob("*.safetensors"):
        assert (tmp_path / "2" / shard.name).read_bytes() == shard.read_bytes(), shard.name
