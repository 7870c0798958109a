"""The programs that measure a packed model, on a toy: what they print, not how fast anything is."""

import re
import sys

import pytest
from helpers import call

import calibrate
from experiments import decode, int8, peers
from kernel import paths


@pytest.fixture(scope="module")
def packed(toy, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "packed"
    options = ["--method", "rtn", "--group-size", 32, "--samples", 2, "--seq-len", 32, "--eval-windows", 1]
    assert call(calibrate.main, "--model", toy, "--text", text, "--out", out, *options).code == 0
    return out


def test_speeds_of_all_contestants_are_in_the_table(packed, toy, tmp_path):
    options = ["--prompt", 8, "--tokens", 2, "--rounds", 1, "--device", "cpu", "--out", tmp_path / "speeds"]
    result = call(decode.main, packed, toy, *options)
    assert result.code == 0 and (tmp_path / "speeds.md").read_text() == result.out[:-1]
    for name in (f"packed, {paths('cpu')[0]}", "original, float32", "transformers, bfloat16"):
        assert re.search(rf"\| {name} \| \d+ \| \d+\.\d \|\n", result.out), name


def test_folders_of_one_name_are_refused(packed, toy, tmp_path):
    result = call(decode.main, packed, packed, toy, "--device", "cpu", "--out", tmp_path / "speeds")
    assert result.code == 2 and "PACKED: " in result.err and not (tmp_path / "speeds.md").exists()


def test_the_price_of_bytes_is_measured_by_kernels_that_ran(packed, text):
    result = call(int8.main, packed, text, "--seq-len", 64, "--windows", 1)
    exact, *rounded = result.out.splitlines()
    assert result.code == 0 and exact.endswith("largest change of a token's loss 0.00")
    assert len(rounded) == (f"{paths('cpu')[0]}_int8" in paths("cpu"))
    assert not any("standard error 0.00 %" in line for line in rounded)


def test_a_missing_peer_is_named_with_the_remedy(toy, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    result = call(peers.main, toy, text, "--block", 0, "--group-size", 32, "--samples", 1, "--seq-len", 64)
    assert result.code == 2 and result.err.strip().endswith("pip install gptqmodel")
