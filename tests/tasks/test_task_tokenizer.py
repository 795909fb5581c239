"""The tokenizer made for a task, and the one path from text to ids and back."""

import dataclasses

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.errors import TaskError
from asympo_megatron.tasks import load_task
from asympo_megatron.tasks.codec import Codec
from asympo_megatron.tasks.items import Item
from asympo_megatron.tasks.tokenizer import alphabet, template_words


def test_quickstart_sizes(shared_spell_task):
    codec = shared_spell_task.codec
    prompt = shared_spell_task.train_prompt(0)
    pieces = codec.tokenizer.convert_ids_to_tokens(prompt.ids)
    template = ["Spell ", "this ", "word ", "backward ", "(example: ", "sun ", "-> ", "nus): "]
    assert pieces == ["<user>", *template, *prompt.answer[::-1], "<eos>", "<assistant>"]
    assert codec.vocab_size == 66 == len(codec.tokenizer)
    assert len(prompt.ids) == 16
    assert len(codec.encode_label(prompt.answer)) == 6
    assert codec.stop_token_ids == (codec.eos_id,)


def test_every_word_survives_the_round_trip(shared_spell_task):
    codec = shared_spell_task.codec
    words = shared_spell_task.source.dataset.words
    assert len(words) == 10_180
    for word in words:
        ids = codec.encode_label(word)
        assert len(ids) == 6
        assert ids[-1] == codec.eos_id
        assert not codec.has_unknown(ids)
        assert codec.decode(ids) == word


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "basic_arithmetic", "letter_counting", "word_sorting"])
def test_questions_of_other_data_sets_survive_the_round_trip(gym, name):
    _, task = gym(name)
    assert task.epoch_size > 200
    assert sum(task.train_stream.dropped.values()) <= 1  # one word with an accent that the sample lacks
    assert task.codec.vocab_size < 250
    for index in range(0, task.epoch_size, 5):
        prompt = task.train_prompt(index)
        assert task.codec.decode(prompt.ids) == prompt.question
        assert task.codec.decode(task.codec.encode_label(prompt.answer)) == prompt.answer


def test_template_words_are_whole_words_of_nearly_every_question():
    questions = [f"Say the word w{n}\nAnswer:" for n in range(100)] + ["Speak"]
    assert template_words(questions) == ["Answer:", "Say ", "the ", "word "]
    assert template_words(["2 + 2 is 4"] * 10) == ["is "]
    assert template_words(["one"] * 3, fixed="Be brief.") == ["Be ", "brief.", "one"]


def test_one_character_brings_its_class():
    assert "".join(alphabet(["a"])).lower() == "abcdefghijklmnopqrstuvwxyz" * 2
    assert "".join(alphabet(["7é"])) == "0123456789é"
    assert len(alphabet(["+"])) == 32


def test_template_words_inside_longer_words_stay_characters(shared_spell_task):
    codec = shared_spell_task.codec
    assert codec.tokenizer.tokenize("xthis ") != ["x", "this "]
    assert codec.tokenizer.tokenize("this") == list("this")


def test_system_prompt_and_plain_template(spell_dir, shared_spell_task):
    codec = shared_spell_task.codec
    item = shared_spell_task.source.item(0)
    with_system = dataclasses.replace(codec, system_prompt="nus").encode_prompt(item)
    tokens = codec.tokenizer.convert_ids_to_tokens(with_system)
    assert tokens[:5] == ["<system>", "n", "u", "s", "<eos>"]
    assert with_system[5:] == codec.encode_prompt(item)
    plain = dataclasses.replace(codec, template="plain").encode_prompt(item)
    assert plain == codec.encode_prompt(item)[1:-2]
    own_system = Item([{"role": "system", "content": "sun"}, {"role": "user", "content": "this"}], "siht")
    assert "n" not in codec.tokenizer.convert_ids_to_tokens(
        dataclasses.replace(codec, system_prompt="n").encode_prompt(own_system)[:2]
    )


def test_ids_outside_the_vocabulary_are_refused(shared_spell_task):
    codec = shared_spell_task.codec
    with pytest.raises(TaskError, match="a response: token id 66 is outside the vocabulary of 66"):
        codec.decode([10, 66])
    with pytest.raises(TaskError, match="token id -1 is outside"):
        codec.decode([-1])
    small = dataclasses.replace(codec, vocab_size=12)
    with pytest.raises(TaskError, match=r"a prompt: token id \d+ is outside the vocabulary of 12.*check model.path"):
        small.encode_prompt(shared_spell_task.source.item(0))


def test_prompts_with_characters_outside_the_vocabulary_are_dropped(jsonl, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "What is \\u00bd + 1?", "answer": "1"}\n{"prompt": "What is 7 + 0?", "answer": "7"}\n')
    rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(250)]
    _, task = jsonl(rows, f"task.eval_path={held}")
    assert task.epoch_size == 250
    assert [prompt.question for prompt in task.eval_prompts(10)] == ["What is 7 + 0?"]
    assert task.eval_stream.dropped == {"with characters outside the vocabulary": 1}


def test_stop_tokens_of_model_files_and_configuration(spell_dir, tmp_path):
    import shutil

    folder = shutil.copytree(spell_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    codec = Codec.load(load_config("quickstart", ["rollout.sampling.stop_token_ids=[5]"]), folder)
    assert codec.stop_token_ids == (1, 5, 9)
    with pytest.raises(TaskError, match=r"stop tokens .*token id 99 is outside"):
        Codec.load(load_config("quickstart", ["rollout.sampling.stop_token_ids=[99]"]), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TaskError, match=r"no chat template. Set task.template=plain"):
        Codec.load(load_config("quickstart"), folder)
    assert Codec.load(load_config("quickstart", ["task.template=plain"]), folder).eos_id == 1
    (folder / "config.json").write_text("{}")
    with pytest.raises(TaskError, match="has no vocab_size"):
        Codec.load(load_config("quickstart", ["task.template=plain"]), folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TaskError, match="no usable tokenizer"):
        load_task(load_config("quickstart"), folder)
