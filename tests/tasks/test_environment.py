"""Environments: what a user's function is told, what becomes of its reply, and the tokens around it."""

import asyncio
from dataclasses import replace

import pytest
import tenacity

from asympo_megatron.config import load_config
from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import ConfigError, EpisodeError, TaskError, UnknownNameError
from asympo_megatron.tasks import Codec, Environment, Prompt, build_environment, build_scorer
from asympo_megatron.tasks.functions import open_function
from asympo_megatron.testing.tiny_model import BOS_ID, EOS_ID, VOCAB_SIZE, byte_tokenizer

PROMPT = Prompt(index=4, ids=[1], question="word", answer="drow", meta={"bonus": 1, "episode": "a field of the row"})
STOP = 10
"""A further stop token: a byte of the tiny tokenizer."""


@pytest.fixture
def codec():
    """Bytes with <bos> and <eos>: any text, and chat templates with end-of-turn tokens."""
    return Codec(byte_tokenizer(), VOCAB_SIZE, EOS_ID, (EOS_ID, STOP))


def ask(codec, function, turn="ab", history=(), **changes):
    """One reply of ``reward_functions:function``."""
    settings = TaskConfig(**{"reward_workers": 1, "reward_timeout_s": 60.0, "reward_retries": 0, **changes})
    target = f"reward_functions:{function}"
    user = open_function("task.environment", "environment", target, settings, EpisodeError)
    user.wait = tenacity.wait_none()

    async def reply():
        environment = Environment(codec, user)
        try:
            return await environment.reply(PROMPT, codec.encode_label(turn), history)
        finally:
            await environment.close()

    return asyncio.run(reply())


def test_a_function_is_told_the_turns_so_far_and_ends_the_episode(codec):
    codec = replace(codec, template="plain")
    first = ask(codec, "replies", "x")
    assert (first.turn, first.text) == ("x", "word/x/drow/1/[]")
    assert codec.decode(first.ids) == first.text
    assert ask(codec, "replies", "y", [("x", "r")]).text == "word/y/drow/1/[['x', 'r']]"
    assert ask(codec, "replies", "z", [("x", "r"), ("y", "s")]) is None


def test_an_async_function_stays_in_the_process(shared_spell_task):
    codec = shared_spell_task.codec
    reply = ask(codec, "replies_async")
    assert (reply.turn, reply.text) == ("ab", "ba")
    assert codec.tokenizer.convert_ids_to_tokens(reply.ids) == ["<user>", "b", "a", "<eos>", "<assistant>"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"environment reward_functions:raises failed on prompt 4 in 1 tries .*KeyError: 'judge model is"),
        ("dies", r"failed on prompt 4 in 1 tries .*WorkerLostError: the worker died"),
        ("replies_number", r"environment to prompt 4: expected a text or None, got int"),
        ("replies_bytes", r"prompt 4: a reply that is no text: '.udcff' .*errors='replace'"),
        ("replies_foreign", r"prompt 4: a reply with characters outside the vocabulary: '½'"),
    ],
)
def test_a_failed_reply_is_an_error_and_never_guessed(shared_spell_task, function, message):
    with pytest.raises(EpisodeError, match=message):
        ask(shared_spell_task.codec, function)


@pytest.mark.parametrize("function", ["hangs", "hangs_async"])
def test_time_out(shared_spell_task, function):
    with pytest.raises(EpisodeError, match=rf"{function} failed on prompt 4 in 2 tries .*within .*0.5 s"):
        ask(shared_spell_task.codec, function, reward_timeout_s=0.5, reward_retries=1)


def test_a_plain_reply_has_a_token(codec):
    with pytest.raises(EpisodeError, match="a reply with no token: ''"):
        ask(replace(codec, template="plain"), "replies_nothing")
    assert ask(codec, "replies_nothing").ids, "the chat template's frame alone"


TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
    ),
    "trims, default system prompt": (
        "<bos>system: be brief<eos>{% for m in messages %}<bos>{{ m.role }}: {{ m.content | trim }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    ),
    "space before the end, no generation prompt": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }} <eos>{% else %}"
        "<bos>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "no end of turn": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_turn_and_reply_are_the_conversation_that_the_template_renders(codec, name):
    """What the model sees before its second turn is the template's own rendering, token for token."""
    codec.tokenizer.chat_template = TEMPLATES[name]
    talk = [{"role": "user", "content": "2*3+1?"}, {"role": "assistant", "content": "2*3"}]

    def rendered(messages):
        return codec.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    prompt, whole = rendered(talk[:1]), rendered([*talk, {"role": "user", "content": "6"}])
    said = codec.tokenizer.encode("2*3", add_special_tokens=False)
    ends = {"space before the end, no generation prompt": [*codec.tokenizer.encode(" "), EOS_ID], "no end of turn": []}
    turn = [*said, *ends.get(name, [EOS_ID])]
    assert [*prompt, *turn, *codec.encode_reply(turn, "6")] == whole
    stopped = [*said, STOP]  # at another token: the end of the turn is the template's, among the untrained tokens
    reply = codec.encode_reply(stopped, "6")
    assert [*prompt, *said, *reply] == whole
    if name == "chatml":
        assert reply[:3] == [EOS_ID, codec.tokenizer.encode("\n")[0], BOS_ID]


def test_a_reply_has_the_role_that_the_configuration_names(codec):
    text = replace(codec, reply_role="tool").render_reply("6")
    assert text == "<eos><bos>tool: 6<eos><bos>assistant: "


def test_templates_without_a_place_for_replies_are_refused(codec):
    codec.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('only two roles') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(TaskError, match=r"no message of role 'tool' .*only two roles.*Set task.reply_role"):
        replace(codec, reply_role="tool").render_reply("6")
    codec.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(TaskError, match=r"drops what the assistant said. Set task.template=plain"):
        codec.render_reply("6")


def test_the_configuration_names_the_environment(shared_spell_task):
    def build(name):
        return build_environment(load_config("quickstart", [f"task.environment={name}"]), shared_spell_task)

    assert build("null") is None
    assert isinstance(build("reward_functions:replies"), Environment)
    with pytest.raises(UnknownNameError, match=r"reward_functions \(task.environment\) 'repliez': did you mean 'repli"):
        build("reward_functions:repliez")
    with pytest.raises(ConfigError, match=r"task.environment is 'replies'; a function is named pkg.mod:fn"):
        build("replies")


def test_scorers_judge_the_last_turn_and_functions_are_told_the_others(shared_spell_task):
    codec = shared_spell_task.codec
    prompt = shared_spell_task.train_prompt(0)
    turns = [codec.encode_label(text) for text in (prompt.answer, "no")]
    histories = [[("a", "b"), ("c", "d")], []]

    def scored(reward):
        scorer = build_scorer(load_config("quickstart", [f"task.reward={reward}"]), shared_spell_task)

        async def score():
            try:
                return await scorer.score(prompt, turns, histories)
            finally:
                await scorer.close()

        return asyncio.run(score())

    assert scored("exact") == [1.0, 0.0]
    assert scored("reward_functions:episodes") == [2 + len(prompt.answer) / 10, 0.2]
