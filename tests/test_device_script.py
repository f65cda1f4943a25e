"""The prepared measurement for a CUDA device, as far as it goes without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


def run_script(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name != "SMOLLM2"}
    return subprocess.run(
        ["bash", "tests/device.sh", *options],
        cwd=ROOT,
        env={**known, "PYTHON": sys.executable, "OUT": str(out), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_device_it_says_so_in_one_line_and_measures_nothing(tmp_path: Path) -> None:
    done = run_script(tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    done = run_script(tmp_path / "out", "--fast")
    assert done.returncode == 2
    assert "--fast" in done.stderr


def test_a_quick_run_leaves_lines_and_a_table(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--quick")
    assert done.returncode == 0, done.stderr
    assert "SmolLM2 is skipped" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "large-base.jsonl").read_text().splitlines()]
    written, stepped_over = (line["result"] for line in lines)
    assert (written["exact"], written["written"]) == (5, 5)
    assert stepped_over["steps"] == 20
    assert "written" not in stepped_over
    table = (tmp_path / "device.md").read_text()
    assert table == done.stdout
    assert table.count("| random-qwen3 |") == 2


@pytest.mark.slow
def test_a_base_that_is_named_is_measured_as_well(tmp_path: Path, base: Path) -> None:
    done = run_script(tmp_path, "--quick", SMOLLM2=str(base))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "device.md").read_text().count(f"| {base.name} |") == 2
    assert (tmp_path / "write-scaling.jsonl").read_text()
