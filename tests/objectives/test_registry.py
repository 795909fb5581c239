"""Names, options, entry points, import paths and the public surface."""

import subprocess
import sys
import types
import warnings
from dataclasses import FrozenInstanceError, dataclass
from importlib.metadata import EntryPoint

import pytest

import asympo_megatron
from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.objectives import GRPO, OBJECTIVES, SPO, ASymPO, Reinforce, build_objective, registry


@dataclass(frozen=True)
class Halved(Reinforce):
    factor: float = 0.5


def test_names_and_options():
    assert build_objective("asympo", nll_floor=0.05) == ASymPO(nll_floor=0.05)
    assert build_objective("asympo_spo", negative_scale=0.1) == build_objective("spo", negative_scale=0.1)
    assert isinstance(build_objective("spo"), SPO)
    assert build_objective("sft").normalizer == "tokens"
    assert build_objective("reinforce").normalizer == "responses"
    assert build_objective("grpo").needs == {"behavior_logprob_T"}
    assert build_objective("asympo").needs == frozenset()


def test_needs_say_who_pays_for_a_scoring_pass():
    engine, recomputed = frozenset({"behavior_logprob_T"}), frozenset({"proximal_logprob_T"})
    for name in ("asympo", "spo", "reinforce", "asymre", "opmd", "sft"):
        assert build_objective(name).needs == frozenset()
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "vespo", "topr"):
        assert build_objective(name).needs == engine
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"):
        assert build_objective(name, old_logprobs="recompute").needs == recomputed
    for name in ("decoupled_ppo", "tis", "icepop", "mis", "m2po"):
        assert build_objective(name).needs == engine | recomputed


def test_documented_defaults():
    assert build_objective("asympo") == ASymPO(nll_floor=1e-3)
    assert build_objective("spo") == SPO(negative_scale=0.3)
    assert build_objective("grpo") == GRPO(clip_low=0.2, clip_high=0.2, normalizer="responses", constant_tokens=None)
    assert GRPO(clip_low=1.0).clip_low == 1.0  # no lower clip at all
    assert GRPO(clip_low=0, clip_high=0).clip_high == 0  # every move away from the behavior policy is clipped


@pytest.mark.parametrize("kind", sorted(set(OBJECTIVES.values()), key=lambda kind: kind.name))
def test_objectives_are_frozen(kind):
    with pytest.raises(FrozenInstanceError):
        kind().anything = 1


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("asymp", {}, UnknownNameError, r"unknown objective .*'asymp': did you mean 'asympo'\?"),
        ("asympo", {"nll_flor": 1}, UnknownNameError, r"option of objective 'asympo' 'nll_flor': did you mean 'nll_fl"),
        ("sft", {"scale": 1}, ConfigError, r"objective 'sft' takes no options; got 'scale'"),
        (
            "asympo",
            {"nll_floor": 0},
            ConfigError,
            r"'asympo': nll_floor is 0; it must be a finite number greater than 0",
        ),
        ("asympo", {"nll_floor": "1e-3"}, ConfigError, r"nll_floor is '1e-3'; it must be a finite number"),
        ("asympo", {"nll_floor": float("nan")}, ConfigError, r"nll_floor is nan"),
        ("spo", {"negative_scale": -0.1}, ConfigError, r"negative_scale is -0.1; .* at least 0"),
        ("spo", {"negative_scale": True}, ConfigError, r"negative_scale is True"),
        ("grpo", {"clip_low": 1.5}, ConfigError, r"clip_low is 1.5; a ratio is never below 0"),
        ("grpo", {"normalizer": "token"}, UnknownNameError, r"'token': did you mean 'tokens'"),
        ("grpo", {"normalizer": "constant"}, ConfigError, r"normalizer='constant' needs constant_tokens"),
        ("grpo", {"constant_tokens": 5}, ConfigError, r"the others refuse it"),
        ("grpo", {"normalizer": "constant", "constant_tokens": 0}, ConfigError, r"constant_tokens is 0; .* at least 1"),
        ("dapo", {"clip_low": 1.5}, ConfigError, r"'dapo': clip_low is 1.5"),
        ("grpo", {"old_logprobs": "recomputed"}, UnknownNameError, r"old_logprobs .*'grpo'.* did you mean 'recompute'"),
        ("cispo", {"ratio_min": 3, "ratio_max": 2}, ConfigError, r"ratio_min is 3, above ratio_max=2"),
        ("icepop", {"weight_min": 3, "weight_max": 2}, ConfigError, r"weight_min is 3, above weight_max=2"),
        ("tis", {"weight_max": 0}, ConfigError, r"'tis': weight_max is 0; .* greater than 0"),
        ("mis", {"weight_max": -1}, ConfigError, r"'mis': weight_max is -1"),
        ("sapo", {"tau_neg": 0}, ConfigError, r"'sapo': tau_neg is 0; .* greater than 0"),
        ("vespo", {"k_pos": -1}, ConfigError, r"'vespo': k_pos is -1; .* at least 0"),
        ("m2po", {"second_moment": float("inf")}, ConfigError, r"'m2po': second_moment is inf"),
        ("opmd", {"tau": -1}, ConfigError, r"'opmd': tau is -1"),
        ("asymre", {"delta": "low"}, ConfigError, r"'asymre': delta is 'low'; it must be a finite number"),
        ("no_such_module_x:Thing", {}, ConfigError, r"cannot import no_such_module_x:Thing"),
        ("asympo_megatron.errors:Nothing", {}, ConfigError, r"cannot import asympo_megatron.errors:Nothing"),
        ("asympo_megatron.errors:ConfigError", {}, ConfigError, r"is no subclass of .*Objective"),
        ("asympo_megatron.errors:ENTRY", {}, ConfigError, r"cannot import"),
    ],
)
def test_refusals_name_the_remedy(name, options, error, message):
    with pytest.raises(error, match=message):
        build_objective(name, **options)


def test_import_path(monkeypatch):
    module = types.ModuleType("somebodys_objectives")
    module.Halved = Halved
    module.not_a_class = 3
    monkeypatch.setitem(sys.modules, "somebodys_objectives", module)
    assert build_objective("somebodys_objectives:Halved", factor=0.25) == Halved(factor=0.25)
    with pytest.raises(ConfigError, match="is no subclass"):
        build_objective("somebodys_objectives:not_a_class")


def test_entry_point(monkeypatch):
    module = types.ModuleType("somebodys_plugin")
    module.Halved = Halved
    monkeypatch.setitem(sys.modules, "somebodys_plugin", module)
    installed = [EntryPoint("halved", "somebodys_plugin:Halved", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(
        registry, "entry_points", lambda group: installed if group == registry.ENTRY_POINT_GROUP else []
    )
    assert build_objective("halved") == Halved()
    with pytest.raises(UnknownNameError, match="did you mean 'halved'"):
        build_objective("halve")


def test_token_mean_warns_once_at_build():
    with pytest.warns(UserWarning, match="weights every response by its length") as caught:
        build_objective("grpo", normalizer="tokens")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPO()
        build_objective("dapo")  # its own name says it


def test_public_surface_is_lazy_and_works_without_megatron_and_sglang():
    program = """
import sys
for blocked in ("megatron", "sglang", "transformers"):
    sys.modules[blocked] = None
import asympo_megatron
assert "torch" not in sys.modules
from asympo_megatron import (
    build_objective, fused_objective_loss, OBJECTIVES, ASymPO, SPO, ResponseBatch, ObjectiveOutput, ParallelGroups,
    token_nll)
assert isinstance(build_objective("asympo"), ASymPO) and OBJECTIVES["spo"] is SPO
assert callable(token_nll) and callable(fused_objective_loss) and ParallelGroups.single().context_size == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert set(asympo_megatron.__all__) <= set(dir(asympo_megatron))
    assert asympo_megatron.SPO is SPO
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = asympo_megatron.nothing
