"""The examples of the README and the guide run as they stand, one after the other, as a reader would run them."""

import re
from pathlib import Path

import pytest
import torch

from tests import hosts

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/guide.md", "docs/adapters.md", "docs/hosts.md"]  # whose examples run


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    scope: dict = hosts.stand_ins(monkeypatch) if page == "docs/hosts.md" else {}
    with torch.set_grad_enabled(True):  # an example may switch gradients off for good
        for block in blocks:
            exec(block, scope)
    assert scope["x_0"].isfinite().all()
    assert "evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("page", [*PAGES, "docs/theory.md", "docs/fields.md"])
def test_every_file_that_is_named_is_there(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:sencache|solvers|benchmarks|tests|docs)/[\w./]*)`", text)
    linked = re.findall(r"\]\(([\w./]+)\)", text)
    for file in named:
        assert (ROOT / file).exists(), file
    for file in linked:
        assert (ROOT / page).parent.joinpath(file).exists(), file
