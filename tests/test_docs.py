"""The examples of the README and the guide run as they stand, one after the other, as a reader would run them."""

import re
from pathlib import Path

import pytest
import torch

from tests import hosts

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/guide.md", "docs/adapters.md", "docs/baselines.md"]  # whose examples run
HOSTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/hosts").glob("*.md"))


def run(scope, *pages):
    """The examples of pages, one after the other, in one scope; how many of them the last page has."""
    with torch.set_grad_enabled(True):  # an example may switch gradients off for good
        for page in pages:
            blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
            for block in blocks:
                exec(block, scope)
    return len(blocks)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    assert run(scope, page)
    assert scope["x_0"].isfinite().all()
    assert "evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("page", HOSTS)
def test_the_examples_of_a_host_run_after_the_overviews(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = hosts.stand_ins(monkeypatch)
    assert run(scope, "docs/hosts.md", page) or page == "docs/hosts/comfyui.md"  # which needs no Python
    if page != "docs/hosts/comfyui.md":
        assert scope["x_0"].isfinite().all()
        assert len(scope["x_0"].flatten()) > 0


def test_every_host_has_a_page():
    overview = (ROOT / "docs/hosts.md").read_text()
    assert len(HOSTS) == 9
    assert all(page.removeprefix("docs/") in overview for page in HOSTS)


OTHERS = ("hosts", "diffusers", "theory", "fields", "paper", "paper_reproduced", "peers", "baselines", "comparison")


@pytest.mark.parametrize("page", [*PAGES, *HOSTS, *(f"docs/{name}.md" for name in OTHERS)])
def test_every_file_that_is_named_is_there(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:sencache|solvers|benchmarks|tests|docs)/[\w./]*)`", text)
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    for file in named:
        assert (ROOT / file).exists(), file
    for file in linked:
        assert (ROOT / page).parent.joinpath(file).exists(), file
