"""Reference answers with label noise: rate, end token, determinism."""

from random import Random

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.errors import TaskError
from asympo_megatron.records import check_group
from asympo_megatron.tasks import load_task, supervised_groups
from asympo_megatron.tasks.supervised import with_noise

SUPERVISED = ["objective.name=sft", "advantage.estimator=none", "rollout.source=supervised"]
SMALL = ["batch.groups_per_step=64", "batch.group_size=1", "task.size=3000"]


@pytest.fixture(scope="module")
def noisy(spell_dir):
    config = load_config("quickstart", [*SUPERVISED, *SMALL, "rollout.label_noise=0.22"])
    return config, load_task(config, spell_dir)


def labels(groups):
    return [group.responses[0].ids for group in groups]


def check_noise(pairs, noise, alphabet):
    """Whether labels differ from references as often as they should, and never in the end token."""
    letters = [(a, b) for label, reference in pairs for a, b in zip(label[:-1], reference[:-1], strict=True)]
    rate = noise * (1 - 1 / len(alphabet))  # a drawn letter may be the right one
    changed = sum(a != b for a, b in letters)
    bound = 4 * (len(letters) * rate * (1 - rate)) ** 0.5
    return abs(changed - len(letters) * rate) < bound and all(label[-1] == reference[-1] for label, reference in pairs)


def test_groups_are_the_reference_answers(spell_dir):
    config = load_config("quickstart", [*SUPERVISED, *SMALL])
    task = load_task(config, spell_dir)
    groups = supervised_groups(config, task, step=3)
    assert [group.prompt_index for group in groups] == list(range(192, 256))
    for group in groups:
        check_group(group)
        (response,) = group.responses
        prompt = task.train_prompt(group.prompt_index)
        assert group.prompt_ids == prompt.ids
        assert response.ids == task.codec.encode_label(prompt.answer)
        assert response.ids[-1] == task.codec.eos_id
        assert response.mask == [1] * len(response.ids)


def test_noise_has_its_rate_and_spares_the_end_token(noisy):
    config, task = noisy
    alphabet = task.answer_alphabet
    assert 26 <= len(alphabet) <= 52
    pairs = []
    replaced = set()
    for step in range(40):
        for group in supervised_groups(config, task, step):
            reference = task.codec.encode_label(task.train_prompt(group.prompt_index).answer)
            pairs.append((group.responses[0].ids, reference))
            replaced |= {a for a, b in zip(*pairs[-1], strict=True) if a != b}
    assert replaced <= set(alphabet)
    assert len(replaced) > 0.9 * len(alphabet)
    assert check_noise(pairs, 0.22, alphabet)
    assert not check_noise(pairs, 0.26, alphabet), "the bound must tell 0.22 from 0.26"


def test_mutants_of_the_noise_are_caught():
    rng, alphabet = Random(0), list(range(30))
    references = [[*(rng.choice(alphabet) for _ in range(5)), 99] for _ in range(2560)]
    good = [[*with_noise(row[:-1], 0.22, alphabet, rng), row[-1]] for row in references]
    assert check_noise(list(zip(good, references, strict=True)), 0.22, alphabet)
    on_end_token = [with_noise(row, 0.22, alphabet, rng) for row in references]
    assert not check_noise(list(zip(on_end_token, references, strict=True)), 0.22, alphabet)
    whole_labels = [row if rng.random() > 0.05 else [*rng.choices(alphabet, k=5), 99] for row in references]
    assert not check_noise(list(zip(whole_labels, references, strict=True)), 0.22, alphabet)


def test_a_resumed_run_sees_the_same_labels(noisy, spell_dir):
    config, task = noisy
    fresh = load_task(config, spell_dir)
    assert labels(supervised_groups(config, fresh, 17)) == labels(supervised_groups(config, task, 17))
    assert labels(supervised_groups(config, task, 17)) != labels(supervised_groups(config, task, 18))
    config.run.seed = 1
    other = labels(supervised_groups(config, task, 17))
    config.run.seed = 0
    assert other != labels(supervised_groups(config, task, 17))


def test_noise_changes_neither_prompts_nor_their_order(noisy, spell_dir):
    config, task = noisy
    clean = load_config("quickstart", [*SUPERVISED, *SMALL])
    groups = supervised_groups(clean, load_task(clean, spell_dir), 5)
    assert [group.prompt_ids for group in groups] == [group.prompt_ids for group in supervised_groups(config, task, 5)]


def test_answers_that_cannot_be_labels_are_dropped_or_refused(gym, spell_dir):
    config = load_config("quickstart", [*SUPERVISED, *SMALL, "rollout.sampling.max_new_tokens=5"])
    with pytest.raises(TaskError, match=r"the task is empty.*with more than 5 answer tokens"):
        load_task(config, spell_dir)
    config, task = gym("graph_color")
    with pytest.raises(TaskError, match="has no reference answers"):
        supervised_groups(config, task, 0)
    with pytest.raises(TaskError, match="needs reference answers to draw letters from"):
        with_noise([1], 0.5, [], Random(0))


def test_worked_solutions_are_the_labels(jsonl):
    rows = [{"question": f"{n} and {n}?", "answer": f"Add {n} and {n}. #### {2 * n}"} for n in range(10, 20)]
    sizes = ["batch.groups_per_step=2", "batch.group_size=1", "rollout.sampling.max_new_tokens=64"]
    config, task = jsonl(rows, "task.shuffle=false", *SUPERVISED, *sizes)
    group = supervised_groups(config, task, 0)[1]
    assert task.codec.decode(group.responses[0].ids) == "Add 11 and 11. #### 22"
    assert task.train_prompt(1).answer == "22"
