"""tutorial.ipynb: every cell runs, the stored page is whole, exercises take right answers and no wrong ones."""

import os
import re
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parent.parent / "tutorial.ipynb"

RIGHT = {
    1: "my_group_size = 192",
    2: "my_alphas = [0.5, 0.4, 0.3]",
    3: """
def my_product(codes, alpha, shift, x):
    y, n_bits = shift * x.sum(), alpha.shape[1]
    for i in range(n_bits):
        signs = ((codes >> (n_bits - 1 - i)) & 1).float() * 2 - 1
        y = y + alpha[:, i] * (signs @ x)
    return y
""",
    4: """
def my_gradient(g, scale, filtered):  # v and with it q move along with the zero-point, but where the gradient stops
    return -(g * scale * filtered).sum(1, keepdim=True)
""",
    5: """
def my_best_bit(w):
    w, m = w.double().sort().values, torch.arange(1, len(w))
    below = w.cumsum(0)[:-1]
    above = w.sum() - below
    i = (below**2 / m + above**2 / (len(w) - m)).argmax()  # the squared error is sum(w^2) minus this
    low, high = below[i] / m[i], above[i] / (len(w) - m[i])
    return ((high - low) / 2).item(), ((high + low) / 2).item()
""",
    6: """
def my_layer(seed):  # once the codes are final, the outputs are linear in alpha and shift: least squares on the outputs
    layer = FlexBCQLinear(weight, 3)
    train(layer, seed)
    codes = layer.fold()[0]
    signs = sign_patterns(3, weight)[codes.long()]
    basis = torch.cat((signs, torch.ones_like(signs[..., :1])), -1)  # (out, in, 4)
    x = x_train.flatten(0, 1).to(DEVICE)
    gram = x.T @ x  # (in, in)
    left, right = basis.mT @ gram @ basis, basis.mT @ (weight @ gram).unsqueeze(-1)
    theta = torch.linalg.solve(left.double(), right.double()).squeeze(-1)
    return BCQLinear.from_codes(codes, theta[:, None, :3], theta[:, 3:])
""",
}
WRONG = {
    1: "my_group_size = 160",
    2: "my_alphas = [0.8, 0.35, 0.15]",
    3: RIGHT[3].replace("n_bits - 1 - i", "i"),
    4: RIGHT[4].replace("* filtered", ""),
    5: "def my_best_bit(w):\n    return (w - w.mean()).abs().mean().item(), w.mean().item()",
    6: "def my_layer(seed):\n    return FlexBCQLinear(weight, 3).pack()",
}


def text_of(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


class Lesson:
    """The notebook in a kernel of its own, which stays for more cells."""

    def __init__(self):
        self.notebook = nbformat.read(PATH, 4)
        self.client = NotebookClient(self.notebook, timeout=900, resources={"metadata": {"path": str(PATH.parent)}})

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


@pytest.mark.parametrize("number", RIGHT)
def test_an_exercise_is_unsolved_at_first_then_wrong_then_right(lesson, number):
    check = lesson.tagged(f"check-{number}")
    assert text_of(check) == f"exercise {number}: not solved yet\n"
    for solution, word in ((WRONG[number], "wrong, try again"), (RIGHT[number], "right")):
        said = lesson.run(solution.strip() + "\n\n" + check.source)
        assert said.endswith(f"exercise {number}: {word}\n"), said


def test_cells_are_short_and_stand_below_prose():
    cells = nbformat.read(PATH, 4).cells
    for cell in cells:
        if cell.cell_type == "code":
            assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= 15, cell.source
    assert sum(cell.cell_type == "code" for cell in cells) < 2 * sum(cell.cell_type == "markdown" for cell in cells)


def test_the_stored_page_is_whole_small_and_from_one_run():
    text, cells = PATH.read_text("utf-8"), nbformat.read(PATH, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(text) < 3e6 and [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert all(output.name == "stdout" for cell in code for output in cell.outputs if output.output_type == "stream")
    assert sum(output.output_type == "display_data" for cell in code for output in cell.outputs) >= 20
    assert any("32 samples to train on" in text_of(cell) for cell in code), "stored from a quick run"
    assert not re.search(r"/(home|tmp|root|Users|usr|var)/", text)


def test_every_section_is_in_the_readme():
    titles = re.findall(r"^## (\d+)\. ", "\n".join(c.source for c in nbformat.read(PATH, 4).cells), re.M)
    assert titles == [str(n) for n in range(1, 13)]
    assert "tutorial.ipynb" in PATH.with_name("README.md").read_text("utf-8").split("## ")[0]


@pytest.mark.slow
def test_the_lesson_runs_in_full():
    lesson = Lesson()
    with mock.patch.dict(os.environ), lesson.client.setup_kernel():
        os.environ.pop("LESSON_QUICK", None)
        lesson.run_all()
