"""Imports run downwards, and the contract that says so would notice if they did not."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINT = Path(sys.executable).parent / "lint-imports"


def lint(folder):
    return subprocess.run(
        [str(LINT), "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_layers_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_an_import_upwards_is_caught(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "asympo_megatron", tmp_path / "asympo_megatron", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    mutant = tmp_path / "asympo_megatron" / "objectives" / "asympo.py"
    mutant.write_text(mutant.read_text() + "\nimport asympo_megatron.mcore\nimport omegaconf\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "layers BROKEN" in done.stdout
    assert "objectives and parallel are pure torch BROKEN" in done.stdout
