"""The results page, and the runs it is made of."""

import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import call

from eval import main as eval_main
from experiments import page, results


def test_the_page_is_what_the_records_say():
    store = json.loads(page.STORE.read_text("utf-8"))
    assert page.PAGE.read_text("utf-8") == page.markdown(store)


def test_the_table_of_the_readme_is_that_of_the_page():
    table = page.side_by_side(json.loads(page.STORE.read_text("utf-8"))["runs"], page.CELLS).partition("\n\n")[0]
    assert table in (page.ROOT / "README.md").read_text("utf-8")


@pytest.fixture
def small(toy, text, tmp_path, monkeypatch):
    """Command line options for a toy in place of both models, one cell and two ablations; writes to tmp_path."""
    shutil.copy(text, tmp_path / "wiki.valid.tokens")
    shutil.copy(text, tmp_path / page.TEXT)
    short = "--samples 4 --seq-len 64 --epochs 1 --eval-seq-len 32"
    monkeypatch.setattr(page, "SETTING", short)
    monkeypatch.setattr(page, "EVAL_SEQ_LEN", 32)
    monkeypatch.setattr(page, "ABLATED", f"--model {toy} --text {tmp_path / 'wiki.valid.tokens'} {short} --bits 2")
    monkeypatch.setattr(page, "CELLS", [(3, -1)])
    monkeypatch.setattr(page, "BETWEEN", [])
    monkeypatch.setattr(page, "MAIN", (3, -1))
    monkeypatch.setattr(page, "STAGED", [(3, -1)])
    monkeypatch.setattr(page, "ablations", lambda: {"mapping": ["--period 1"], "filtering": ["--tau 1e9"]})
    monkeypatch.setattr(page, "TASK_CELLS", [(3, -1)])
    for name in ("STORE", "PLOT", "PEERS", "PAGE"):
        monkeypatch.setattr(page, name, tmp_path / getattr(page, name).name)
    return ["--model", toy, "--data", tmp_path, "--jobs", 2]


@pytest.fixture
def made_up(small):
    """A store with every run, flexbcq behind flexround; one ablation, with another seed, is worse than the others."""
    real = json.loads((page.ROOT / "experiments" / "results.json").read_text("utf-8"))
    record = next(run for run in real["runs"].values() if "moves" in run)
    perplexities = {"original": 1234.5, "rtn": 12.0, "gptq": 12.5, "bcq": 13.0, "flexround": 14.0, "flexbcq": 100.0}
    tasks = {"BLiMP": "1010", "LAMBADA": "01", "PIQA": "11"}
    record |= {"perplexity": perplexities, "whole": 111.1, "tasks": tasks | {"kl_mean": 0.25, "same_token": 0.5}}
    runs = {chosen: record for chosen in page.wanted()}
    worse = page.ablation("--seed 1")
    runs[worse] = record | {"perplexity": record["perplexity"] | {"flexbcq": 110.0}}
    return real | {"runs": runs, "tasks": tasks | {"BLiMP": "1111"}, "whole": 2345.6}


def test_the_page_compares_the_runs(made_up):
    assert len(page.wanted()) == 6 + (3 + 2) + 3 + 2 * 2
    text = " ".join(page.markdown(made_up).split())
    assert "It shows " in text and "original has 1234.50, rtn 12.00." in text
    assert "original has 1234.50 (2345.60 on the whole test set)." in text
    assert "| perplexity, whole test set | bits per weight | flexbcq | | --- | ---: | ---: | | 3 bits, a row |" in text
    assert "flexbcq is lowest in 0 of 1 complete rows." in text  # 14 of flexround is below 100
    assert "| `--seed 1` | 110.00 | +10.0% |" in text
    assert "No switch makes more than twice the difference of a seed." in text
    assert "| feedback, blocks | `--method flexbcq --finish-steps 0` | 100.0 |" in text


def test_what_is_missing_is_measured_and_the_rest_is_kept(small, made_up, tmp_path):
    missing = [page.options(method, 3, -1) for method in ("rtn", "flexbcq")]
    kept = {chosen: run for chosen, run in made_up["runs"].items() if chosen not in missing}
    without_whole = {key: x for key, x in made_up["runs"][missing[1]].items() if key != "whole"}
    (tmp_path / "results.json").write_text(json.dumps(made_up | {"runs": kept | {missing[1]: without_whole}}))
    result = call(results.main, *small)
    assert result.code == 0, result.err
    store = json.loads((tmp_path / "results.json").read_text())
    measured = {chosen: store["runs"].pop(chosen) for chosen in missing}
    assert store["runs"] == kept
    assert measured[missing[1]]["whole"] > 100 and "tasks" in measured[missing[1]]
    rtn = measured[missing[0]]["perplexity"]["rtn"]
    assert rtn > 100 and f"| {page.rounded(rtn)} |" in (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tasks(tmp_path):
    """A folder with a few items of each task."""
    line = {"LAMBADA": {"context": "def read", "continuation": "self"}}
    line["BLiMP"] = {"sentence_good": "import sys", "sentence_bad": "sys import"}
    line["PIQA"] = {"query": "for i in", "choices": ["range", "while"], "gold": 0}
    for name, (path, _) in page.TASKS.items():
        file = tmp_path / "tasks" / path / "one.jsonl" if name == "BLiMP" else tmp_path / "tasks" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((json.dumps(line[name]) + "\n") * 30)
    return tmp_path / "tasks"


def test_a_run_without_answers_is_made_again_and_answers(small, made_up, tasks, toy, tmp_path):
    chosen = page.options("bcq", 3, -1)
    runs = made_up["runs"] | {chosen: {key: x for key, x in made_up["runs"][chosen].items() if key != "tasks"}}
    store = {key: x for key, x in made_up.items() if key != "tasks"} | {"runs": runs}
    (tmp_path / "results.json").write_text(json.dumps(store))
    assert call(results.main, *small, "--tasks", tasks).code == 0
    store = json.loads((tmp_path / "results.json").read_text())
    assert {name: run for name, run in store["runs"].items() if run != made_up["runs"][name]}.keys() == {chosen}

    # the original's answers are those of eval.py, and its result is not the original
    for name, (path, limit) in page.TASKS.items():
        said = call(eval_main, "--model", toy, "--task", tasks / path, "--limit", limit).out
        mean, _ = page.percent([int(right) for right in store["tasks"][name]])
        assert said.startswith(f"accuracy {mean:.1f}% +- ") and f"{min(limit, 30)} items" in said
    found = store["runs"][chosen]["tasks"]
    assert found["kl_mean"] > 0 and 0 < found["same_token"] < 1
    assert f"| {found['kl_mean']:.3f} | {found['same_token']:.1%} |" in (tmp_path / "RESULTS.md").read_text()


def test_answers_are_compared_item_by_item(made_up):
    """All models agree on LAMBADA and PIQA; on BLiMP the original answers two of four items that the others do not."""
    text = page.task_table(made_up)
    assert "| original | 100.0 ± 0.0 | 50.0 ± 35.4 | 100.0 ± 0.0 |  |  |  |" in text
    assert "| 3 bits, bcq | 50.0 ± 25.0 | 50.0 ± 35.4 | 100.0 ± 0.0 | -16.7 ± 8.3 | 0.250 | 50.0% |" in text
    against = "flexbcq against the best of the others, difference of the mean of the three tasks:\n"
    assert f"{against}+0.0 ± 0.0 points (rtn) at 3 bits." in text
    made_up["runs"].pop(page.options("gptq", 3, -1))
    text = page.task_table(made_up)
    assert "| 3 bits, gptq |  |  |  |  |  |  |" in text and "flexbcq against" not in text


def test_a_folder_without_the_tasks_is_said(small, tmp_path):
    result = call(results.main, *small, "--tasks", tmp_path)
    assert result.code == 2 and "give a folder with blimp, cloze/lambada_openai.jsonl, cloze/piqa.jsonl" in result.err


def test_too_few_runs_for_a_page_are_kept_and_the_next_is_named(small, tmp_path):
    result = call(results.main, *small, "--runs", 1)
    lacking = min(set(page.required()) - {page.wanted()[0]})
    assert result.code == 2 and f"make {lacking} first" in result.err
    store = json.loads((tmp_path / "results.json").read_text())
    assert [*store["runs"]] == page.wanted()[:1] and {"step", "whole"} <= store.keys()
    assert [*store["runs"][page.wanted()[0]]["perplexity"]] == ["original", "rtn"]


def test_the_narrowest_margin_is_counted_seed_by_seed():
    perplexities = {method: [20, 20, 20] for method in page.METHODS}
    perplexities |= {"rtn": [30], "bcq": [11, 11.5, 11], "flexbcq": [10, 12, 10]}
    runs = {
        page.options(method, 3, 64, seed): {
            "perplexity": {"flexbcq" if method == "paper" else method: value},
            "bits_per_weight": 4,
        }
        for method, found in perplexities.items()
        for seed, value in zip(["", *page.SEEDS], found)
    }
    said = "The narrowest margin is 4.7%: 3 bits, groups of 64, flexbcq before bcq with 2 of 3 seeds."
    assert said in " ".join(page.side_by_side(runs, [page.MAIN]).split())


def test_other_sizes_of_groups_are_shown_as_far_as_they_are_measured(made_up, monkeypatch):
    assert "Other sizes" not in page.markdown(made_up)
    monkeypatch.setattr(page, "BETWEEN", [(3, 128), (3, 32)])
    assert page.options("bcq", 3, 32) == page.wanted()[-4]
    made_up["runs"][page.options("bcq", 3, 32)] = made_up["runs"][page.options("bcq", 3, -1)]
    shown = page.markdown(made_up).partition("Other sizes of groups in this picture:\n\n")[2].splitlines()
    assert shown[2].startswith("| 3 bits, groups of 32 |") and shown[2].endswith("|  |  | 13.00 |  |  |  |")
    assert shown[3] == ""


def test_a_machine_is_recorded_with_what_its_matrix_products_use(monkeypatch):
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    assert ("MKL with AVX2" in results.machine("cpu", 1)) == torch.backends.mkl.is_available()


def test_a_run_that_fails_is_named_with_its_reason(small, tmp_path):
    (tmp_path / "wiki.valid.tokens").write_text("short")
    result = call(results.main, *small)
    assert result.code == 2 and "calibrate.py --device" in result.err
    assert "tokens are less than one window of 64" in result.err.strip().splitlines()[-1]


def test_what_runs_beside_one_that_fails_is_kept(small, tmp_path, monkeypatch):
    first, second = page.wanted()[:2]
    failed = threading.Event()

    def measure(chosen, *_):
        if chosen == first:
            failed.set()
            raise OSError("no luck")
        failed.wait()
        time.sleep(0.2)
        return {"perplexity": {}}

    monkeypatch.setattr(results, "measure", measure)
    (tmp_path / "results.json").write_text('{"runs": {}, "step": {}, "whole": 1.0}')
    assert call(results.main, *small).err.strip().endswith("error: no luck")
    assert second in json.loads((tmp_path / "results.json").read_text())["runs"]


def test_two_processes_on_one_store_keep_what_each_has_measured(small, tmp_path, monkeypatch):
    """Another process finishes a run while this one is measuring."""
    first, second = page.wanted()[:2]
    store = tmp_path / "results.json"
    store.write_text('{"runs": {}, "step": {}, "whole": 1.0}')
    asked = []

    def measure(chosen, *_):
        asked.append(chosen)
        with results.changing_store() as theirs:
            theirs["runs"][second] = {"by": "the other"}
        return {"by": "this one"}

    monkeypatch.setattr(results, "measure", measure)
    call(results.main, *small[:4], "--jobs", 1, "--runs", 2)
    assert json.loads(store.read_text())["runs"] == {first: {"by": "this one"}, second: {"by": "the other"}}
    assert asked == [first]


def test_jobs_and_processes_change_the_store_one_after_the_other(tmp_path):
    """Three processes, each with four threads, add what they have measured at the same time."""
    store = tmp_path / "results.json"
    program = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "from experiments import page, results\n"
        f"page.STORE = Path({str(store)!r})\n"
        "def add(i):\n"
        "    with results.changing_store() as found: found['runs'][f'{sys.argv[1]} {i}'] = i\n"
        "list(ThreadPoolExecutor(4).map(add, range(40)))"
    )
    adding = [subprocess.Popen([sys.executable, "-c", program, str(n)]) for n in range(3)]
    assert [process.wait() for process in adding] == [0, 0, 0]
    assert len(json.loads(store.read_text())["runs"]) == 120


def test_missing_texts_are_named(toy, tmp_path):
    result = call(results.main, "--model", toy, "--data", tmp_path)
    assert result.code == 2 and "give a folder with wiki.valid.tokens and wiki.test.joined.txt" in result.err
