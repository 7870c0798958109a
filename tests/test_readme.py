"""What the README says is so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.encode()) <= 10 * 1024
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_its_pieces_of_python_run():
    names = {}
    pieces = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(pieces) == 2
    for piece in pieces:
        exec(piece, names)
    assert names["y"].shape == (1, 256)

    import torch

    layer = names["PowersOfTwo"](torch.randn(32, 64), n_bits=3)
    exponents = layer.pack().alpha.float().abs().log2()
    assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize("line", re.findall(r"^\| (`\w+\.\w+`.*?) \| (\d+) \|", README, re.M), ids=lambda row: row[0])
def test_lines_of_the_files_are_about_right(line):
    files, lines = re.findall(r"`([\w.]+)`", line[0]), int(line[1])
    counted = sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in files)
    assert abs(lines - counted) <= 0.05 * counted, counted
