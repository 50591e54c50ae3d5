"""The page about diffusers runs as it stands, on a tiny Wan with a text encoder, loaded from a folder."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

from tests.tiny_text import saved_wan

PAGE = (Path(__file__).parent.parent / "docs/diffusers.md").read_text()


@pytest.fixture
def saved(tmp_path):
    return saved_wan(tmp_path / "wan")


def test_the_page_runs(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SENCACHE_FOLDER", str(tmp_path / "profiles"))
    smaller = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": str(saved),
        "height=480, width=832, num_frames=81, num_inference_steps=50": (
            "height=16, width=16, num_frames=5, num_inference_steps=10, max_sequence_length=8, output_type='latent'"
        ),
        "nfe=20": "nfe=4",
    }
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        for large, small in smaller.items():
            block = block.replace(large, small)
        exec(block, scope)
    assert scope["x_0"].isfinite().all()
    assert isinstance(scope["pipe"], diffusers.WanPipeline)
    assert len(scope["handle"].plan.nodes) < 10
    printed = capsys.readouterr().out
    assert re.search(r"evaluations +8 +8", printed)  # 4 times, with and without the prompt


def test_every_file_that_the_page_names_is_there():
    for file in re.findall(r"\]\(([\w./]+)\)", PAGE):
        assert (Path(__file__).parent.parent / "docs" / file).exists(), file
    assert "benchmarks.pipelines" in PAGE
    assert (Path(__file__).parent.parent / "benchmarks/pipelines.py").exists()
