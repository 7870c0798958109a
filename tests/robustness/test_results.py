"""The results page, and the runs it is made of."""

import json
import shutil
import threading
import time

import pytest
from helpers import call

from experiments import page, results


def test_the_page_is_what_the_records_say():
    store = json.loads(page.STORE.read_text("utf-8"))
    assert page.PAGE.read_text("utf-8") == page.markdown(store)
    assert page.summary(store["runs"]) in page.README.read_text("utf-8")


@pytest.fixture
def small(toy, text, tmp_path, monkeypatch):
    """Command line options for a toy in place of both models, one cell and two ablations; writes to tmp_path."""
    shutil.copy(text, tmp_path / "wiki.valid.tokens")
    shutil.copy(text, tmp_path / "wiki.test.raw")
    short = "--samples 4 --seq-len 64 --epochs 1 --eval-seq-len 32"
    monkeypatch.setattr(page, "SETTING", short)
    monkeypatch.setattr(page, "ABLATED", f"--model {toy} --text {tmp_path / 'wiki.valid.tokens'} {short}")
    monkeypatch.setattr(page, "CELLS", [(3, -1)])
    monkeypatch.setattr(page, "MAIN", (3, -1))
    monkeypatch.setattr(page, "SEEDED", [(3, -1)])
    monkeypatch.setattr(page, "TUNED", {(3, -1): "--mapping-rate 0.01"})
    monkeypatch.setattr(page, "LONGER", {(3, -1): "--samples 8"})
    monkeypatch.setattr(page, "ablations", lambda: {"mapping": ["--period 1"], "filtering": ["--tau 1e9"]})
    shutil.copy(page.README, tmp_path)
    for name in ("STORE", "PLOT", "PAGE", "README"):
        monkeypatch.setattr(page, name, tmp_path / getattr(page, name).name)
    return ["--model", toy, "--data", tmp_path]


def test_what_is_missing_is_measured_and_the_rest_is_kept(small, tmp_path):
    first, *others = wanted = page.wanted()
    assert len(wanted) == 2 * (3 + 2) + 4 + 2 * 3 + 4 + 2 + 2
    assert call(results.main, *small, "--runs", 1).code == 2  # too little for a page
    store = json.loads((tmp_path / "results.json").read_text())
    assert list(store["runs"]) == [first] and store["runs"][first]["perplexity"].keys() == {
        "original",
        "rtn",
        "flexbcq",
    }
    made_up = {"original": 1234.5, "rtn": 12.0, "bcq": 13.0, "flexround": 14.0, "flexbcq": 100.0}
    missing = [page.options(method, 3, -1) for method in ("rtn", "bcq")]
    store["runs"] |= {
        chosen: store["runs"][first] | {"perplexity": made_up} for chosen in wanted if chosen not in missing
    }
    store["runs"][others[0]]["perplexity"] = made_up | {"flexbcq": 110.0}
    (tmp_path / "results.json").write_text(json.dumps(store))
    assert call(results.main, *small, "--jobs", 2).code == 0
    text, runs = (tmp_path / "RESULTS.md").read_text(), json.loads((tmp_path / "results.json").read_text())["runs"]
    assert "All runs were made" in text and "original has 1234.50; rtn has 12.00 and 12.00" in " ".join(text.split())
    assert "The lowest is flexbcq's in 0 of 2 full lines." in text  # 14 of flexround is below 100
    assert "| `--seed 1` | 110.00 (+10.0%) | 100.00 (+0.0%) |" in text
    assert "| 3 bits, a row | `--mapping-rate 0.01` | 14.00 | 100.00 |" in text
    rtn = runs[missing[0]]["perplexity"]["rtn"]
    table = next(line for line in text.splitlines() if line.startswith("| 3 bits, a row |"))
    assert f"| {rtn:,.1f} |" in table and table in (tmp_path / "README.md").read_text()
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_narrowest_margin_is_counted_seed_by_seed(monkeypatch):
    monkeypatch.setattr(page, "CELLS", [(3, 64)])
    perplexities = {"rtn": [30], "bcq": [11, 11.5, 11], "flexround": [20, 20, 20], "flexbcq": [10, 12, 10]}
    runs = {
        page.options(method, 3, 64, page.FEW, seed): {"perplexity": {method: value}, "bits_per_weight": 4}
        for method, found in perplexities.items()
        for seed, value in zip(["", *page.SEEDS], found)
    }
    said = "The narrowest margin is 4.7%: 3 bits, groups of 64, flexbcq before bcq for 2 of 3 seeds."
    assert said in " ".join(page.main_table(runs).split())


def test_a_run_that_fails_is_named_with_its_reason(small, tmp_path):
    (tmp_path / "wiki.valid.tokens").write_text("short")
    result = call(results.main, *small)
    assert result.code == 2 and "calibrate.py --device" in result.err
    assert "tokens are less than one window of 64" in result.err.strip().splitlines()[-1]


def test_what_runs_beside_one_that_fails_is_kept(small, tmp_path, monkeypatch):
    first, second = page.wanted()[:2]
    failed = threading.Event()

    def measure(chosen, args):
        if chosen == first:
            failed.set()
            raise OSError("no luck")
        failed.wait()
        time.sleep(0.2)
        return {"perplexity": {}}

    monkeypatch.setattr(results, "measure", measure)
    (tmp_path / "results.json").write_text('{"runs": {}, "step": {}}')
    assert call(results.main, *small, "--jobs", 2).err.strip().endswith("error: no luck")
    assert second in json.loads((tmp_path / "results.json").read_text())["runs"]


def test_missing_texts_are_named(toy, tmp_path):
    result = call(results.main, "--model", toy, "--data", tmp_path)
    assert result.code == 2 and "no folder with wiki.valid.tokens and wiki.test.raw" in result.err
