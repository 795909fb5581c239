"""Example configurations load, validate and name real options; scripts are sound."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asympo_megatron.config import load_config, preset_names, warm_start_config
from asympo_megatron.objectives import build_objective

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
GPU_CONFIGS = [path for path in CONFIGS if "math" in path.stem]
SCRIPTS = sorted([*(ROOT / "examples").glob("*/*.sh"), *(ROOT / "examples").glob("*/*.sbatch"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("source", [*CONFIGS, *preset_names()], ids=lambda source: getattr(source, "stem", source))
def test_a_config_loads_and_its_objective_builds(source):
    config = load_config(source)
    build_objective(config.objective.name, **config.objective.options)
    assert config.run.name == getattr(source, "stem", source)
    first = warm_start_config(config)
    if first is not None:
        build_objective(first.objective.name, **first.objective.options)


def test_all_three_gpu_models_are_there():
    assert [path.stem for path in GPU_CONFIGS] == ["llama3p2_3b_math", "qwen3_1p7b_math", "qwen3_4b_math"]


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.stem)
def test_a_gpu_config_fits_its_machine(path):
    from megatron.core.transformer import TransformerConfig

    config = load_config(path)
    arguments = config.rollout.engine_args
    first_serving = int(arguments[arguments.index("--base-gpu-id") + 1])
    serving = int(arguments[arguments.index("--tp-size") + 1]) * config.rollout.num_engines
    replica = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    assert config.run.local_ranks % replica == 0
    assert config.run.local_ranks <= first_serving, "a GPU would train and serve"
    assert first_serving + serving == 8
    assert config.model.megatron.keys() <= {field.name for field in dataclasses.fields(TransformerConfig)}
    assert "none has been tuned or run on a GPU" in " ".join(path.read_text().replace("#", " ").split())


def test_the_made_task_is_right_and_the_same_every_time(tmp_path):
    program = [sys.executable, str(ROOT / "examples" / "make_sort_letters.py")]
    for name in ("a.jsonl", "b.jsonl"):
        subprocess.run([*program, str(tmp_path / name)], check=True, timeout=60)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 8000
    for row in rows:
        assert list(row["answer"]) == sorted(row["prompt"].removeprefix("sort "))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_stops_at_the_first_error(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    if script.name != "settings.sh":  # sourced by the others
        assert "set -euo pipefail" in script.read_text()
        assert script.suffix == ".sbatch" or script.stat().st_mode & 0o111, "not executable"


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], check=True, timeout=120, cwd=ROOT)
