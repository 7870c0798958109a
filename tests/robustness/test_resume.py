"""Killed, interrupted, out of space: the same command goes on, and ends in the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from helpers import FEW_STEPS, blocks_finished, call, contents, snapshot

from calibrate import main
from support.checkpoint import Checkpoint, whole_file
from support.resume import LOCK, REPORT, fingerprints

SETTINGS = ["--samples", "8", "--epochs", "4", "--batch-size", "2", "--bits", "2", "--group-size", "32"]
SETTINGS += ["--finish-steps", "4"]


def command(model, text, out, *more):
    return ["--model", str(model), "--text", str(text), "--out", str(out), *SETTINGS, *map(str, more)]


@contextmanager
def when_finished(out, n_blocks, act):
    """Call `act` when so many blocks are finished."""

    def watch():
        while blocks_finished(out) < n_blocks:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def interrupted_after(out, n_blocks):
    """Ctrl-C arrives when so many blocks are finished."""
    return when_finished(out, n_blocks, lambda: os.kill(os.getpid(), signal.SIGINT))


@pytest.fixture(scope="module")
def whole(toy, text, tmp_path_factory):
    """What a run gives that nobody interrupts: packed, as ordinary weights, and with embedding and lm_head packed."""
    folders = {}
    for kind in ((), ("--dequantized",), ("--head-bits", "6")):
        folders[kind] = tmp_path_factory.mktemp("whole") / "out"
        result = call(main, *command(toy, text, folders[kind], *kind))
        assert result.code == 0, result.err
    return folders


@pytest.fixture(scope="module")
def half(toy, text, tmp_path_factory):
    """The folder that holds out.partial with one finished block of two, and what the interrupted run said."""
    folder = tmp_path_factory.mktemp("half")
    with interrupted_after(folder / "out", 1):
        result = call(main, *command(toy, text, folder / "out"))
    return folder, result


@pytest.fixture
def begun(half, tmp_path):
    return shutil.copytree(half[0], tmp_path / "begun") / "out"


def test_interrupted_run_keeps_its_blocks_and_says_how_to_go_on(half):
    folder, result = half
    last = result.err.strip().splitlines()[-1]
    assert result.code == 130 and last.startswith("error: interrupted; ")
    assert last.endswith("out.partial keeps 1 finished block: the same command resumes there")
    assert [path.name for path in folder.iterdir()] == ["out.partial"]


@pytest.mark.parametrize(
    "kind", [(), ("--dequantized",), ("--head-bits", "6")], ids=lambda kind: "".join(kind) or "packed"
)
def test_resumed_run_ends_in_the_bytes_of_an_uninterrupted_one(kind, whole, toy, text, tmp_path):
    with interrupted_after(tmp_path / "out", 1):
        assert call(main, *command(toy, text, tmp_path / "out", *kind)).code == 130
    result = call(main, *command(toy, text, tmp_path / "out", *kind))
    assert result.code == 0 and "block 1/2" not in result.err, result.err
    assert contents(tmp_path / "out") == contents(whole[kind])


def test_run_killed_while_it_finishes_goes_on_from_any_of_its_states(whole, toy, text, tmp_path):
    """All blocks finished, and all but the last dequantized; then the same with nothing but the report missing."""
    kind = ("--dequantized",)
    partial = shutil.copytree(whole[kind], tmp_path / "out.partial")
    shutil.copy(sorted(whole[()].glob("model-*"))[1], partial)  # still in bit-planes
    (partial / "config.json").unlink()
    (partial / "model.safetensors.index.json.tmp").write_text("{")
    assert call(main, *command(toy, text, tmp_path / "out", *kind)).code == 0
    assert contents(tmp_path / "out") == contents(whole[kind])


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--bits", "3"], "was started with bits 2, not 3"),
        (["--method", "flexround", "--finish-steps", "0"], "was started with method flexbcq, not flexround"),
        (["--seed", "1"], "was started with seed 0, not 1"),
        (["--epochs", "11"], "was started with epochs 4, not 11"),
        (["--dequantized"], "was started with dequantized False, not True"),
        (["--head-bits", "6"], "was started with head_bits None, not 6"),
        (["--text", __file__], "was started with calibration text "),
        (["--eval-text", __file__], "was started with calibration text "),
    ],
)
def test_other_settings_refuse_to_go_on_and_touch_nothing(changed, message, begun, toy, text):
    before = snapshot(begun.parent)
    result = call(main, *command(toy, text, begun, *changed))
    assert result.code == 2 and message in result.err
    assert "repeat the original options and files, or delete" in result.err.strip().splitlines()[-1]
    assert snapshot(begun.parent) == before


def test_the_same_tokens_in_other_windows_are_another_text(toy):
    ids, checkpoint = torch.arange(128), Checkpoint(toy)
    long, short = (fingerprints(checkpoint, {"text": ids.view(-1, seq_len)}) for seq_len in (64, 32))
    assert long["text"].startswith("2 x 64 tokens ") and long["text"] != short["text"]


def test_changed_source_refuses_to_go_on_and_is_named(begun, toy, text, tmp_path):
    """One bit somewhere in a weight."""
    model = shutil.copytree(toy, tmp_path / "model")
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (model / "model.safetensors").write_bytes(data)
    result = call(main, *command(model, text, begun))
    assert result.code == 2 and "out.partial: was started with model.safetensors " in result.err


@pytest.mark.parametrize("damage", ["{", "[]", '{"settings": 3}', '{"settings": {}}', "no blocks"])
def test_damaged_report_is_named(damage, begun, toy, text):
    path = begun.parent / "out.partial" / REPORT
    if damage == "no blocks":
        damage = path.read_text().replace('"blocks"', '"stones"')
    path.write_text(damage)
    result = call(main, *command(toy, text, begun))
    assert result.code == 2 and "calibration.json: damaged" in result.err and "to start again" in result.err


def test_damaged_shard_is_named_and_nothing_is_deleted(begun, toy, text):
    shard = next((begun.parent / "out.partial").glob("model-*"))
    os.truncate(shard, 1000)
    result = call(main, *command(toy, text, begun))
    assert result.code == 2 and f"{shard.name}: missing or damaged" in result.err
    assert shard.exists()


def test_folder_of_somebody_else_is_left_alone(toy, text, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.tmp").write_text("data")
    result = call(main, *command(toy, text, tmp_path / "out"))
    assert result.code == 2 and "holds no calibration.json, so it is no run; give another --out" in result.err
    assert snapshot(tmp_path) == {"out.partial/precious.tmp": b"data"}


def test_second_process_on_one_output_is_refused(begun, toy, text):
    lock = begun.parent / "out.partial" / LOCK
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdin=-1, stdout=-1)
    try:
        holder.stdout.readline()
        before = snapshot(begun.parent)
        result = call(main, *command(toy, text, begun))
        assert result.code == 2 and "another process is at work there" in result.err
        assert snapshot(begun.parent) == before
    finally:
        holder.communicate(b"\n")
    assert call(main, *command(toy, text, begun)).code == 0


def test_interrupt_before_the_first_block_gets_one_line_and_leaves_nothing(toy, text, tmp_path):
    arguments = command(toy, text, tmp_path / "out", "--samples", 64, "--epochs", 1000)
    with subprocess.Popen([sys.executable, "calibrate.py", *arguments], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "loss" in line:  # training has begun
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in rest
    assert rest.strip().splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_modules", [1, 300])
@pytest.mark.parametrize("program", ["calibrate.py", "eval.py"])
def test_interrupt_while_libraries_are_imported_gets_one_line(program, n_modules):
    """When so many modules of PyTorch have been imported; Python says so."""
    with subprocess.Popen([sys.executable, "-X", "importtime", program], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            n_modules -= " torch." in line
            if not n_modules:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in rest
    assert rest.strip().splitlines()[-1] == "error: interrupted"


def test_full_disk_before_the_first_block_gets_one_line_and_leaves_nothing(toy, text, tmp_path):
    """No file may grow beyond 10 kB: writing the first shard fails as on a full disk."""
    limit = "import resource, calibrate; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); calibrate.main()"
    arguments = command(toy, text, tmp_path / "out", *FEW_STEPS)
    result = subprocess.run([sys.executable, "-c", limit, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "could not write model-00001-of-00003.safetensors" in result.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match=r"could not write file \(no space\)"), whole_file(path) as temporary:
        temporary.write_text("ha")
        assert path.read_text() == "old"
        raise OSError("no space")
    assert snapshot(tmp_path) == {"file": b"old"}
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert snapshot(tmp_path) == {"file": b"new"}


# ------------------------------------------------------------------------------------------------------ slow


def start(*arguments):
    return subprocess.Popen([sys.executable, "calibrate.py", *arguments], stdout=-1, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_bytes(whole, toy, text, tmp_path):
    out, moments = tmp_path / "out", random.Random(0)
    begin = time.time()
    assert start(*command(toy, text, out)).wait() == 0
    duration, states = time.time() - begin, set()
    for _ in range(20):
        if out.exists():  # it was faster than the kill
            assert contents(out) == contents(whole[()])
            shutil.rmtree(out)
        process = start(*command(toy, text, out))
        time.sleep(moments.uniform(0.3, 1.1) * duration)
        process.kill()
        process.communicate()
        states.add(blocks_finished(out))
    assert len(states) > 1  # the kills did not all come too early
    assert out.exists() or start(*command(toy, text, out)).wait() == 0
    assert contents(out) == contents(whole[()])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk):
    with open(disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


def test_disk_that_fills_up_ends_with_one_line_and_goes_on_when_there_is_space(disk, whole, toy, text):
    """Another program takes all of it after the first block."""
    with when_finished(disk / "out", 1, lambda: fill(disk)):
        result = call(main, *command(toy, text, disk / "out"))
    last = result.err.strip().splitlines()[-1]
    assert result.code == 2 and "could not write" in last and "No space left on device" in last
    assert last.endswith("keeps 1 finished block: the same command resumes there")
    (disk / "ballast").unlink()
    assert call(main, *command(toy, text, disk / "out")).code == 0
    assert contents(disk / "out") == contents(whole[()])


def test_disk_that_is_too_small_is_refused_before_anything_is_written(disk, toy, text):
    fill(disk)
    result = call(main, *command(toy, text, disk / "out"))
    assert result.code == 2 and "out: needs 0.001 GB, but there are only 0.000 GB; free some" in result.err
    result = call(main, *command(toy, text, disk.parent / "out", "--offload", disk))
    assert result.code == 2 and f"--offload {disk}: needs" in result.err
    assert [path.name for path in disk.iterdir()] == ["ballast"]
