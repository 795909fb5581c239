"""Examples for verl, TRL, SkyRL, AReaL and OpenRLHF name what the adapters have; docs/integrations.md shows them."""

import ast
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from recorded import areal_modules, load_adapter, openrlhf_modules, trl_async_modules, trl_modules

from asympo_megatron.objectives import build_objective

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
DOCS = Path(__file__).parents[2] / "docs" / "integrations.md"
MODULES = {
    "trl_grpo": ("trl", trl_modules),
    "trl_async_grpo": ("trl_async", trl_async_modules),
    "areal_gsm8k": ("areal", areal_modules),
}


@pytest.mark.parametrize("stem", MODULES)
def test_a_script_imports_names_that_exist(monkeypatch, stem):
    name, recorded = MODULES[stem]
    adapter = load_adapter(monkeypatch, name, recorded())
    tree = ast.parse((EXAMPLES / f"{stem}.py").read_text())
    ours = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == f"asympo_megatron.integrations.{name}"
        for alias in node.names
    ]
    assert ours
    assert [one for one in ours if not hasattr(adapter, one)] == []


def overrides(stem):
    return dict(re.findall(r"^ +\+?([\w.]+)=(\S+) \\$", (EXAMPLES / f"{stem}.sh").read_text(), flags=re.MULTILINE))


def test_the_verl_script_selects_a_registered_loss():
    given = overrides("verl")
    actor = "actor_rollout_ref.actor.policy_loss"
    assert given[f"{actor}.loss_mode"] == "asympo"
    assert given[f"{actor}._target_"] == "asympo_megatron.integrations.verl.AsympoPolicyLossConfig"
    build_objective("asympo", nll_floor=float(given[f"{actor}.nll_floor"]))
    assert given["algorithm.rollout_correction.bypass_mode"] == "True"


def test_the_skyrl_script_sets_the_reduction_that_the_adapter_asks_for():
    given = overrides("skyrl")
    assert given["trainer.override_entrypoint"] == "asympo_megatron.integrations.skyrl"
    assert given["trainer.algorithm.loss_reduction"] == "sequence_mean"
    assert given["generator.sampling_params.logprobs"] == "null"


def test_the_openrlhf_script_builds_the_objective_and_centres_groups(monkeypatch):
    adapter = load_adapter(monkeypatch, "openrlhf", openrlhf_modules())
    words = shlex.split((EXAMPLES / "openrlhf.sh").read_text().replace("\\\n", " "), comments=True)
    given = dict(itertools.pairwise(words))
    assert given["-m"] == adapter.__name__
    objective = build_objective(given["--asympo.objective"], **json.loads(given["--asympo.options"]))
    assert objective == build_objective("asympo", nll_floor=1e-3)
    assert given["--algo.advantage.estimator"] in adapter._CENTRED
    assert float(given["--algo.kl.init_coef"]) == 0


def test_the_areal_file_passes_the_adapter_s_checks(monkeypatch):
    adapter = load_adapter(monkeypatch, "areal", areal_modules())
    actor = OmegaConf.load(EXAMPLES / "areal_gsm8k.yaml").actor
    actor.pop("backend")
    adapter.AsympoFSDPPPOActor(adapter.AsympoActorConfig(**actor))


@pytest.mark.parametrize(
    "stem", ["verl.sh", "skyrl.sh", "trl_grpo.py", "trl_async_grpo.py", "areal_gsm8k.yaml", "openrlhf.sh"]
)
def test_the_page_shows_what_the_examples_hold(stem):
    page = DOCS.read_text()
    assert f"../examples/integrations/{stem}" in page
    section = page.split(f"../examples/integrations/{stem}")[1]
    shown = re.search(r"```\w*\n(.*?)```", section, flags=re.DOTALL).group(1)
    held = " ".join((EXAMPLES / stem).read_text().split())
    missing = [line.strip(" \\") for line in shown.splitlines() if line.strip(" \\") not in held]
    assert missing == []
