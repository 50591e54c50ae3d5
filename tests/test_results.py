"""The rows of comparisons: medians of what was measured, the same again when read, and empty where nothing was."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.results import Result, environment, markdown, read, summary, write

ROW = summary(
    "wan", "ours", 20, evaluations=[20, 20, 20, 20], psnr=[30.0, 20.0, 40.0, 50.0], ssim=torch.tensor([0.9, 0.7, 0.8]),
    seconds=(1.0, 2.0),
)  # fmt: skip
FULL = summary("wan", "full", 50, evaluations=[50, 50], psnr=[math.inf, math.inf], ssim=[1.0, 1.0])


def test_a_row_holds_medians():
    assert (ROW.psnr, ROW.psnr_p10, ROW.seconds) == (35.0, 20.0, 1.5)
    assert ROW.ssim == pytest.approx(0.8)
    assert ROW.psnr_se == pytest.approx((500 / 3) ** 0.5 / 2)  # deviations 5, 15, 5, 15 from the mean of 35
    assert math.isnan(ROW.stlpips)
    assert (FULL.psnr, FULL.psnr_p10, FULL.psnr_se) == (math.inf, math.inf, 0.0)


def test_what_is_written_is_read(tmp_path):
    write([FULL, ROW], tmp_path / "table.csv")
    again = read(tmp_path / "table.csv")
    assert [str(row) for row in again] == [str(row) for row in (FULL, ROW)]  # NaN is not equal to itself
    head, full, _ = (tmp_path / "table.csv").read_text().splitlines()
    assert head == "field,method,nfe,evaluations,psnr,psnr_p10,psnr_se,ssim,stlpips,psnr_true,seconds"
    assert full == "wan,full,50,50.0,inf,inf,0.0,1.0,,,"
    assert all(isinstance(row, Result) for row in again)


def test_markdown_leaves_out_what_nobody_measured():
    table = markdown([FULL, ROW]).splitlines()
    assert "ST-LPIPS" not in table[0]
    assert table[2] == "| wan | full | 50 | ∞ | ∞ | 0.0 | 1.0000 |  |"
    assert table[3] == "| wan | ours | 20 | 35.0 | 20.0 | 6.5 | 0.8000 | 1.5 |"


def test_the_environment_says_what_it_was():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["cpu"]
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 40
