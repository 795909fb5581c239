"""Examples for slime, miles, NeMo-RL, prime-rl, ROLL, Megatron; the loss alone; an objective of another package."""

import ast
import importlib
import re
import runpy
import sys
import tomllib
from argparse import Namespace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import recorded_context_parallel
import recorded_whole
from omegaconf import OmegaConf

from asympo_megatron.advantages import ESTIMATORS
from asympo_megatron.integrations.cp_local import objective_of
from asympo_megatron.objectives import build_objective, registry

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "integrations"
SHOWN = ("slime.sh", "miles.sh", "slime_miles_asympo.yaml", "prime_rl.toml", "roll.yaml", "nemo_rl_run_grpo.py")
SCRIPTS = {
    "nemo_rl_run_grpo": "nemo_rl",
    "megatron_lm_pretrain": "megatron_lm",
    "megatron_bridge_pretrain": "megatron_bridge",
}


def adapter(monkeypatch, name):
    recorded = {
        "slime": recorded_context_parallel.slime_modules,
        "miles": recorded_context_parallel.miles_modules,
    }
    modules = recorded[name]() if name in recorded else recorded_whole.MODULES.get(name, {})
    recorded_context_parallel.install(monkeypatch, modules)
    path = f"asympo_megatron.integrations.{name}"
    monkeypatch.delitem(sys.modules, path, raising=False)
    module = importlib.import_module(path)
    monkeypatch.delitem(sys.modules, path)
    return module


@pytest.mark.parametrize("name", ["slime", "miles"])
def test_a_script_names_functions_that_exist(monkeypatch, name):
    module = adapter(monkeypatch, name)
    paths = re.findall(rf"asympo_megatron\.integrations\.{name}\.(\w+)", (EXAMPLES / f"{name}.sh").read_text())
    assert paths
    assert all(callable(getattr(module, path)) for path in paths)


def test_the_custom_config_of_slime_and_miles_builds_the_objective():
    values = OmegaConf.to_container(OmegaConf.load(EXAMPLES / "slime_miles_asympo.yaml"))
    args = Namespace(normalize_advantages=False, calculate_per_token_loss=False, **values)
    assert objective_of(args) == build_objective("asympo", nll_floor=1e-3)
    assert args.asympo_advantage in ESTIMATORS


def test_the_prime_rl_file_calls_the_adapter(monkeypatch):
    loss = tomllib.loads((EXAMPLES / "prime_rl.toml").read_text())["trainer"]["loss"]
    module = adapter(monkeypatch, "prime_rl")
    assert loss["import_path"] == f"{module.__name__}.{module.asympo_loss.__name__}"
    kwargs = loss["kwargs"]
    assert kwargs.pop("tokens_per_response") > 0
    build_objective(kwargs.pop("objective"), **kwargs)


def test_the_roll_file_passes_the_adapters_checks(monkeypatch):
    module = adapter(monkeypatch, "roll")
    config = OmegaConf.to_container(OmegaConf.load(EXAMPLES / "roll.yaml"))
    worker = config["actor_train"]
    assert worker["worker_cls"] == f"{module.__name__}.{module.ASymPOWorker.__name__}"
    assert worker["apply_loss_scale"]
    for name, off in module._OFF.items():
        assert config.get(name, off) == off


@pytest.mark.parametrize("stem", SCRIPTS)
def test_a_python_example_imports_names_that_exist(monkeypatch, stem):
    module = adapter(monkeypatch, SCRIPTS[stem])
    tree = ast.parse((EXAMPLES / f"{stem}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == module.__name__]
    names = [alias.name for node in nodes for alias in node.names]
    assert names
    assert [name for name in names if not hasattr(module, name)] == []


def test_the_loss_alone_raises_the_right_response(capsys):
    runpy.run_path(str(ROOT / "examples" / "01_loss_only.py"), run_name="__main__")
    right, wrong = zip(*re.findall(r"right ([\d.]+), wrong ([\d.]+)", capsys.readouterr().out), strict=True)
    assert [float(value) for value in right] == sorted(map(float, right), reverse=True)
    assert float(right[-1]) < float(right[0]) < float(wrong[-1])


def test_an_objective_of_another_package_is_found_by_name_and_by_path(monkeypatch):
    folder = ROOT / "examples" / "extension"
    monkeypatch.syspath_prepend(folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    ((name, path),) = project["entry-points"][registry.ENTRY_POINT_GROUP].items()
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint(name, path, group)])
    assert build_objective(name, tilt=0.5) == build_objective(path, tilt=0.5)
    tree = importlib.import_module(path.partition(":")[0])
    assert type(build_objective(name)) is tree.Entropic


@pytest.mark.parametrize("file", SHOWN)
def test_the_page_shows_what_the_examples_hold(file):
    page = (ROOT / "docs" / "integrations.md").read_text()
    section = page.split(f"../examples/integrations/{file}")[1]
    shown = re.search(r"```\w*\n(.*?)```", section, flags=re.DOTALL).group(1)
    held = " ".join((EXAMPLES / file).read_text().split())
    assert [line for line in shown.splitlines() if line.strip(" \\") not in held] == []
