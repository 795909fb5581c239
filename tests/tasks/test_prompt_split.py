"""The held-out split: by question, the same for every seed and size, never overlapping."""

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.errors import ConfigError, TaskError
from asympo_megatron.tasks import load_task
from asympo_megatron.tasks.items import Item, is_held_out
from asympo_megatron.tasks.stream import Order, PromptStream


class ListSource:
    name, own_reward = "list", "exact"

    def __init__(self, questions):
        self.questions = questions

    def __len__(self):
        return len(self.questions)

    def item(self, position):
        return Item(self.questions[position], "a")


def overlap(stream):
    stream.fill_train(len(stream.source) + 1)
    return {item.text for item in stream.train} & {item.text for item in stream.held_out}


def test_every_word_is_on_one_side_and_counts_are_those_of_the_readme(shared_spell_task):
    stream = shared_spell_task.train_stream
    assert overlap(stream) == set()
    assert {item.text.lower() for item in stream.train}.isdisjoint({item.text.lower() for item in stream.held_out})
    assert (shared_spell_task.epoch_size, len(stream.held_out)) == (9680, 499)
    assert stream.exhausted
    assert len({item.text for item in stream.train}) == 9680


def test_the_split_is_the_same_for_every_seed_and_size(shared_spell_task, spell_dir):
    shared_spell_task.train_stream.fill_train(20_000)
    trained = {item.text for item in shared_spell_task.train_stream.train}
    other = load_task(load_config("quickstart", ["task.seed=17", "task.size=2000"]), spell_dir)
    held_out = {prompt.question for prompt in other.eval_prompts(1000)}
    assert len(held_out) > 50
    assert held_out.isdisjoint(trained)


def test_a_split_by_position_leaks_and_is_caught():
    """Mutant: sides drawn per item instead of per question, repeated questions kept."""
    questions = [f"word {n % 37}" for n in range(400)]
    assert overlap(PromptStream(ListSource(questions), lambda text: is_held_out(text, 0.3), lambda _: None)) == set()

    class ByPosition(PromptStream):
        def _advance(self):
            self._seen.clear()
            self._is_held_out = lambda _: self._next % 10 < 3
            super()._advance()

    assert overlap(ByPosition(ListSource(questions), lambda _: False, lambda _: None)) != set()


def test_near_copies_fall_on_one_side():
    for number in range(200):
        text = f"What is {number} plus one?"
        assert is_held_out(text, 0.5) == is_held_out(f"what  is {number} PLUS one? ", 0.5)


def test_the_share_is_kept():
    held = sum(is_held_out(f"question {number}", 0.05) for number in range(20_000))
    assert abs(held - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5


def test_epochs_hold_every_prompt_once_in_ever_new_order():
    stream = PromptStream(ListSource([f"q{n}" for n in range(50)]), lambda text: is_held_out(text, 0.2), lambda _: None)
    order = Order(stream, seed=3, shuffle=True)
    size = order.epoch_size
    epochs = [[order.at(epoch * size + row).text for row in range(size)] for epoch in range(3)]
    assert epochs[0] == [item.text for item in stream.train]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    again = Order(stream, seed=3, shuffle=True)
    assert again.at(2 * size + 7).text == epochs[2][7]
    other_seed = Order(stream, seed=4, shuffle=True)
    assert [other_seed.at(size + row).text for row in range(size)] != epochs[1]


def test_without_shuffle_every_epoch_has_the_order_of_the_data():
    stream = PromptStream(ListSource(list("abcdef")), lambda _: False, lambda _: None)
    order = Order(stream, seed=0, shuffle=False)
    assert [order.at(index).text for index in range(14)] == list("abcdefabcdefab")


def test_negative_index():
    order = Order(PromptStream(ListSource(["a"]), lambda _: False, lambda _: None), seed=0, shuffle=True)
    with pytest.raises(TaskError, match="prompt index -1 is negative"):
        order.at(-1)


def test_the_order_does_not_depend_on_how_it_is_asked_for(spell_config, spell_dir, shared_spell_task):
    forwards, backwards = load_task(spell_config, spell_dir), load_task(spell_config, spell_dir)
    backwards.eval_prompts(64)
    indices = [2_700, 3, 12_345, 0, 9_680, 25_000, 12_345]
    in_order = {index: forwards.train_prompt(index) for index in sorted(indices)}
    assert [backwards.train_prompt(index) for index in indices] == [in_order[index] for index in indices]
    assert [forwards.train_prompt(index).ids for index in range(50)] == [
        shared_spell_task.train_prompt(index).ids for index in range(50)
    ]
    assert backwards.eval_prompts(20) == shared_spell_task.eval_prompts(64)[:20]
    assert [prompt.index for prompt in backwards.eval_prompts(3)] == [0, 1, 2]


def test_nothing_held_out_is_an_error(spell_dir):
    task = load_task(load_config("quickstart", ["task.eval_fraction=0", "task.size=50"]), spell_dir)
    with pytest.raises(TaskError, match=r"no held-out prompt .*Raise task.eval_fraction"):
        task.eval_prompts(8)


@pytest.mark.parametrize(
    ("override", "message"),
    [("task.eval_fraction=1", "0 <= share < 1"), ("task.eval_path=x.jsonl", "works with task.kind=jsonl")],
)
def test_split_settings_that_cannot_work(spell_dir, override, message):
    with pytest.raises(ConfigError, match=message):
        load_task(load_config("quickstart", [override]), spell_dir)


def test_long_prompts_are_dropped_counted_and_an_empty_task_is_refused(spell_dir, caplog):
    options = "task.options={min_word_len: 3, max_word_len: 8}"
    config = load_config("quickstart", [options, "task.size=400", "rollout.sampling.max_prompt_tokens=17"])
    task = load_task(config, spell_dir)
    assert task.epoch_size > 50
    assert max(len(task.train_prompt(index).ids) for index in range(task.epoch_size)) == 17
    dropped = task.train_stream.dropped["with more than 17 prompt tokens"]
    assert dropped + task.epoch_size + len(task.train_stream.held_out) == len(
        {task.source.item(position).text for position in range(400)}
    )
    assert f"dropped: {dropped} with more than 17 prompt tokens" in caplog.text
    config.rollout.sampling.max_prompt_tokens = 5
    with pytest.raises(TaskError, match=r"the task is empty: .*Raise the limits .*max_prompt_tokens=5"):
        load_task(config, spell_dir)
