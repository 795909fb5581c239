"""The model directory: given, made, shared by processes that come at once, refused when it does not fit."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.tasks import prepare_model_dir


def test_config_json_has_the_given_fields_and_the_vocabulary(spell_dir):
    fields = json.loads((spell_dir / "config.json").read_text())
    assert fields["hidden_size"] == 64
    assert fields["architectures"] == ["Qwen3ForCausalLM"]
    assert (fields["vocab_size"], fields["pad_token_id"], fields["eos_token_id"]) == (66, 0, 1)


def test_transformers_reads_what_was_written(spell_dir):
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(spell_dir).rope_parameters["rope_theta"] == 10_000.0
    tokenizer = AutoTokenizer.from_pretrained(spell_dir)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "this sun"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<user>this sun<eos><assistant>"


def test_many_callers_at_once_make_one_directory(tmp_path):
    config = load_config("quickstart")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare_model_dir(config, tmp_path / "run"), range(4)))
    assert set(made) == {tmp_path / "run" / "model"}
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["model"]
    before = (made[0] / "tokenizer.json").stat().st_mtime_ns
    assert prepare_model_dir(config, tmp_path / "run") == made[0]
    assert (made[0] / "tokenizer.json").stat().st_mtime_ns == before


def test_seed_size_and_reward_do_not_change_the_vocabulary(spell_dir):
    config = load_config("quickstart", ["task.seed=5", "task.size=77", "task.reward=exact", "run.seed=9"])
    assert prepare_model_dir(config, spell_dir.parent) == spell_dir


@pytest.mark.parametrize("override", ["model.hf.hidden_size=32", "task.name=gcd", "task.system_prompt=Hi"])
def test_a_directory_of_another_configuration_is_refused(spell_dir, override):
    config = load_config("quickstart", [override])
    with pytest.raises(ConfigError, match=r"was made from another model.hf or task .*Choose another run.name"):
        prepare_model_dir(config, spell_dir.parent)


def test_given_directory(spell_dir, tmp_path):
    config = load_config("quickstart", [f"model.path={spell_dir}"])
    assert prepare_model_dir(config, tmp_path) == spell_dir
    assert not list(tmp_path.iterdir())
    config.model.path = str(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no config.json; give a Hugging Face model directory"):
        prepare_model_dir(config, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds no tokenizer .*copy the files"):
        prepare_model_dir(config, tmp_path)


def test_misspelt_fields_are_named(tmp_path):
    config = load_config("quickstart", ["model.hf.hiden_size=64"])
    with pytest.raises(
        UnknownNameError, match=r"field of a qwen3 config.json .*'hiden_size': did you mean 'hidden_size'"
    ):
        prepare_model_dir(config, tmp_path)
    config = load_config("quickstart", ["model.hf.model_type=qwen33"])
    with pytest.raises(UnknownNameError, match=r"model_type .*'qwen33': did you mean 'qwen3'"):
        prepare_model_dir(config, tmp_path)
    assert not list(tmp_path.iterdir())
