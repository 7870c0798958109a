"""tutorial.ipynb and support/lesson.py: every cell runs, the stored page is whole, every prediction is answered, the
solutions printed on the page are right and other answers wrong, sliders draw what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from eval import perplexity
from flexbcq import FlexBCQLinear
from support import lesson as tools
from support.checkpoint import Checkpoint
from support.data import load_tokenizer
from support.settings import TINY

PATH = Path(__file__).parent.parent / "tutorial.ipynb"
CELLS = nbformat.read(PATH, 4).cells
PROSE = "\n\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")

RIGHT = {  # as the page has them, folded
    int(number): solution for number, solution in re.findall(r"\*\*Exercise (\d+)\..*?```python\n(.*?)```", PROSE, re.S)
}
WRONG = {
    1: ["my_rate = 50 / 15.01", "my_rate = 4.54 / 50", "my_rate = '11'"],
    2: ["my_ruler = (1.4 / 4, 1)", "my_ruler = (1.4 / 3, 0.643)", "my_ruler = 1"],
    3: ["my_alphas = [0.8, 0.35, 0.15]", "my_alphas = [0.3, 0.4, 0.5]", "my_alphas = 'abc'"],
    4: [
        "my_word = sum(2 ** (4 - j) for j in range(5) if planes[3, j, 1] > 0)",
        "my_word = sum(2**j for j in range(5) if planes[3, j, 2] > 0)",
        "my_word = [1, 0]",
    ],
    5: ["my_factor = 1.1", "my_factor = 0.95", "my_factor = '0.9'"],
    6: [RIGHT[6].replace("* filtered", ""), RIGHT[6].replace("-(", "("), "my_gradient = 3"],
    7: [
        RIGHT[7].replace("+ (w[0]", "- (w[0]"),
        "def my_pair(w, hessian):\n    return w.round()",
        "def my_pair(w, hessian):\n    return 'up'",
    ],
    8: ["my_group_size = 160", "my_group_size = 64", "my_group_size = '192'"],
    9: ["my_perplexity = 4.5", "my_perplexity = 0.25", "my_perplexity = '4'"],
    10: [
        RIGHT[10].replace("n_bits - 1 - i", "i"),
        "def my_product(codes, alpha, shift, x):\n    return levels(alpha, shift[:, None]).gather(1, codes.long()) @ x",
        "def my_product(codes, alpha, shift, x):\n    return 0",
    ],
    11: [
        "my_gigabytes = 20 * n / 1e9",
        "my_gigabytes = n * bits_per_weight(2, 128) / 8 / 1e9",
        "my_gigabytes = ''",
    ],
    12: [
        "def my_best_bit(w):\n    return (w - w.mean()).abs().mean().item(), w.mean().item()",
        "def my_best_bit(w):\n    s, z, a, b = initialize(w[None], 1, 50, 15)\n"
        "    return (s * a).item(), (s * (b - z)).item()",
        "def my_best_bit(w):\n    return 'left', 'right'",
    ],
    13: [
        "def my_layer(seed):\n    return quantizer(3).pack()",
        "def my_layer(seed):\n    return quantizer(4, 'bcq', **feedback).pack()",
        "def my_layer(seed):\n    return weight",
    ],
}


def text_of(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


class Lesson:
    """The notebook in a kernel of its own, which stays for more cells."""

    def __init__(self):
        self.notebook = nbformat.read(PATH, 4)
        self.client = NotebookClient(self.notebook, timeout=1800, resources={"metadata": {"path": str(PATH.parent)}})

    def run_all(self):
        for i, cell in enumerate(self.notebook.cells):
            self.client.execute_cell(cell, i)  # raises what the cell raises

    def run(self, source: str) -> str:
        self.notebook.cells.append(nbformat.v4.new_code_cell(source))
        return text_of(self.client.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1))

    def tagged(self, tag: str):
        return next(cell for cell in self.notebook.cells if tag in cell.metadata.get("tags", []))


@pytest.fixture(scope="module")
def lesson():
    """The lesson with few steps, run to its end."""
    lesson = Lesson()
    with mock.patch.dict(os.environ, LESSON_QUICK="1"), lesson.client.setup_kernel():
        lesson.run_all()
        yield lesson


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("number", RIGHT)
def test_an_exercise_is_unsolved_at_first_then_wrong_then_right(lesson, number):
    check = lesson.tagged(f"check-{number}")
    assert text_of(check) == f"exercise {number}: not solved yet\n"
    for answer in WRONG[number]:
        said = lesson.run(answer.strip() + "\n\n" + check.source)
        assert f"exercise {number}: wrong, try again" in said, answer
    said = lesson.run(RIGHT[number].strip() + "\n\n" + check.source)
    assert said.endswith(f"exercise {number}: right\n"), said


def test_every_section_has_a_summary_and_an_exercise_with_hint_and_solution():
    titles = re.findall(r"^## (\d+)\. ", PROSE, re.M)
    assert titles == [str(n) for n in range(1, 13)]
    assert PROSE.count("> **In short.**") == 12
    assert sorted(RIGHT) == sorted(WRONG) == list(range(1, 14))
    assert PROSE.count("<summary>hint</summary>") == PROSE.count("<summary>solution</summary>") == 13


def test_every_prediction_is_answered_before_the_next_one():
    asked = 0
    for cell in CELLS:
        if cell.cell_type == "markdown" and "**Predict" in cell.source:
            assert asked == 0, f"not answered before {cell.source[:80]!r}"
            asked = 1
        elif cell.cell_type == "code" and "Seen: " in text_of(cell):
            asked = 0
    assert asked == 0


def test_cells_are_short_and_stand_below_prose():
    for cell in CELLS:
        if cell.cell_type == "code":
            assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= 16, cell.source
            assert max(map(len, cell.source.splitlines())) <= 120, cell.source
    assert sum(cell.cell_type == "code" for cell in CELLS) < 2 * sum(cell.cell_type == "markdown" for cell in CELLS)


def test_no_formula_escapes_an_underscore():
    assert r"\_" not in PROSE  # MathJax 2, in nbconvert and nbviewer, would show the backslash


def test_no_formula_hides_in_a_fold():
    folded = re.findall(r"<details>.*?</details>", PROSE, re.S)
    assert folded and not any("$" in text for text in folded)  # typeset while it is hidden, it has a wrong width


def test_the_stored_page_is_whole_small_and_from_one_run():
    text = PATH.read_text("utf-8")
    code = [cell for cell in CELLS if cell.cell_type == "code"]
    assert len(text) < 3e6 and [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert any("mean of 3 seeds)" in text_of(cell) for cell in code), "stored from a quick run"
    assert not re.search(r"/(home|tmp|root|Users|usr|var)/", text)
    assert "widgets" not in json.loads(text)["metadata"]


def test_every_stored_picture_has_a_text_for_those_who_cannot_see_it():
    shown = [output.data["text/html"] for cell in CELLS for output in cell.get("outputs", []) if "data" in output]
    pictures = [page for page in shown if page.startswith("<img")]
    assert len(pictures) >= 25
    assert all(len(re.match(r'<img alt="([^"]*)"', page).group(1)) > 30 for page in pictures)


def test_the_readme_leads_to_the_lesson():
    assert "tutorial.ipynb" in PATH.with_name("README.md").read_text("utf-8").split("## ")[0]


def test_the_first_cell_fetches_the_repository_where_there_is_none(tmp_path):
    git = ["git", "-C", str(tmp_path / "origin"), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "flexbcq.py").write_text("fetched = True\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(git + command, check=True)

    (tmp_path / "colab").mkdir()
    cell = next(cell for cell in CELLS if cell.id == "colab").source
    cell = re.sub(r"REPOSITORY = .*", f"REPOSITORY = {(tmp_path / 'origin').as_uri()!r}", cell)
    program = cell + "\nimport flexbcq\nassert flexbcq.fetched"
    for _ in range(2):  # again after the kernel was restarted
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "colab", check=True)


@pytest.mark.slow
def test_the_lesson_runs_in_full():
    lesson = Lesson()
    with mock.patch.dict(os.environ), lesson.client.setup_kernel():
        os.environ.pop("LESSON_QUICK", None)
        lesson.run_all()


# --------------------------------------------------------------------------------------------------------- its helpers


@pytest.fixture
def row():
    return torch.randn(1, 256, generator=torch.Generator().manual_seed(0))


def test_the_ruler_has_the_error_of_rtn_at_its_full_range_only(row):
    rtn = FlexBCQLinear(row, 3, learn_mapping=False, learn_levels=False)
    error = tools.error_percent(rtn.quantized_weight(), row)
    assert tools.draw_ruler(row, 3, 1.0) == pytest.approx(error, rel=1e-4)
    assert tools.draw_ruler(row, 3, 0.5) != pytest.approx(error, rel=1e-2)


def test_an_outlier_harms_the_others_more_on_a_ruler(row):
    ruler, fitted = tools.draw_outlier(row, 3, 30.0)
    assert ruler > 2 * fitted
    assert ruler > 3 * tools.draw_outlier(row, 3, 1.0)[0]


def test_levels_by_hand_have_the_error_of_the_levels(row):
    layer = FlexBCQLinear(row, 2, learn_mapping=False)
    alpha, shift = (x.flatten().tolist() for x in layer.fold()[1:])
    error = tools.error_percent(layer.quantized_weight(), row)
    assert tools.draw_levels(row, alpha, shift[0], error) == pytest.approx(error, rel=1e-4)
    assert tools.draw_levels(row, [2 * alpha[0], alpha[1]], shift[0], error) > error


def test_the_staircase_is_filtered_nowhere_everywhere_or_where_levels_are_far():
    alpha, shift = [1.9, 1.1, 0.4], 3.5
    share = [tools.draw_staircase(alpha, shift, tau) for tau in (0.0, 1.0, 100.0)]
    assert share[0] > 99 and share[2] < 1 and 20 < share[1] < 80


def test_a_continued_prompt_begins_with_the_prompt_and_is_shown_as_code():
    model, tokenizer = Checkpoint(TINY).model(), load_tokenizer(TINY)
    texts = tools.continuations({"original": model}, tokenizer, "def <b>", 4)
    with mock.patch.object(tools, "display") as display:
        tools.show_texts(texts)
    assert texts["original"].startswith("def <b>") and len(texts["original"]) > len("def <b>")
    page = display.call_args.args[0].data
    assert "text-align: left" in page and "monospace" in page and "def &lt;b&gt;" in page


def test_on_a_page_that_is_only_read_a_slider_draws_once_where_it_starts():
    seen = []
    tools.move(lambda **values: seen.append(values), ratio=(0.5, 0.0, 1.0, 0.1), bits=[3, 2], text="x")
    assert seen == [{"ratio": 0.5, "bits": 3, "text": "x"}]


def test_a_live_slider_draws_again_when_it_is_moved():
    seen = []
    with mock.patch.object(tools, "is_live", return_value=True), mock.patch.object(tools, "display") as display:
        tools.move(lambda **values: seen.append(values), ratio=(0.5, 0.0, 1.0, 0.1), bits=[3, 2], text="x")
    ratio, bits, text, _ = display.call_args.args[0].children
    ratio.value, bits.value, text.value = 0.7, 2, "y"
    assert seen[0] == {"ratio": 0.5, "bits": 3, "text": "x"} and seen[-1] == {"ratio": 0.7, "bits": 2, "text": "y"}


def test_window_losses_are_those_of_the_perplexity():
    checkpoint, windows = Checkpoint(TINY), torch.arange(128).view(2, 64)
    mean = tools.window_losses(checkpoint, windows, "cpu").mean()
    assert mean.exp().item() == pytest.approx(perplexity(checkpoint, windows), rel=1e-5)


def test_an_interval_over_windows_ignores_what_both_models_find_hard():
    hard = 3 * torch.rand(20, generator=torch.Generator().manual_seed(0))
    more, width = tools.difference(hard + 0.01, hard)
    assert more == pytest.approx(1.005, rel=1e-3) and width < 1e-3
