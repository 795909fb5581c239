"""The one path between text and token ids: chat template in, special tokens out, every id checked."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asympo_megatron.config import Config
from asympo_megatron.errors import TaskError
from asympo_megatron.tasks.items import Item, Messages

_TURN = "[[turn]]"
"""Stands for what the model said where a chat template is asked what it puts behind that."""


@dataclass(frozen=True)
class Codec:
    """Turns questions into prompt ids, reference answers into label ids and response ids into text.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; every id is below it.
        eos_id: end token of a response.
        stop_token_ids: ids that end a response: the tokenizer's and the generation config's end tokens and those of
            rollout.sampling.stop_token_ids.
        template: chat | plain.
        system_prompt: system message of the chat template; a first paragraph with template plain.
        reply_role: role of an environment's replies in the chat template.
    """

    tokenizer: Any
    vocab_size: int
    eos_id: int
    stop_token_ids: tuple[int, ...]
    template: str = "chat"
    system_prompt: str | None = None
    reply_role: str = "user"

    @classmethod
    def load(cls, config: Config, model_dir: Path) -> "Codec":
        """Read the tokenizer and the special tokens of a model directory."""
        from transformers import AutoTokenizer  # imports torch: only processes that handle text pay for it

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
        except Exception as error:  # missing files, broken JSON, classes that need remote code: each raises its own
            raise TaskError(f"no usable tokenizer in {model_dir}: {str(error).strip().splitlines()[0]}") from error
        fields = _read_json(model_dir / "config.json")
        vocab_size = fields.get("vocab_size") or fields.get("text_config", {}).get("vocab_size")
        if not isinstance(vocab_size, int):
            raise TaskError(f"{model_dir / 'config.json'} has no vocab_size; add the rows of the embedding.")
        if tokenizer.eos_token_id is None:
            raise TaskError(f"the tokenizer in {model_dir} has no eos_token; set it in tokenizer_config.json.")
        if config.task.template == "chat" and not tokenizer.chat_template:
            raise TaskError(f"the tokenizer in {model_dir} has no chat template. Set task.template=plain, or add one.")
        stops = {tokenizer.eos_token_id, *config.rollout.sampling.stop_token_ids, *_end_tokens(model_dir)}
        codec = cls(
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            eos_id=tokenizer.eos_token_id,
            stop_token_ids=tuple(sorted(stops)),
            template=config.task.template,
            system_prompt=config.task.system_prompt,
            reply_role=config.task.reply_role,
        )
        codec.check_ids(codec.stop_token_ids, "stop tokens (tokenizer and rollout.sampling.stop_token_ids)")
        return codec

    def encode_prompt(self, item: Item) -> list[int]:
        """Ids of the whole prompt, up to where the response starts."""
        messages = self._messages(item)
        if self.template == "chat":
            ids = self.tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        else:
            ids = self.tokenizer.encode("\n\n".join(message["content"] for message in messages))
        self.check_ids(ids, "a prompt")
        return list(ids)

    def encode_label(self, text: str) -> list[int]:
        """Ids of a reference answer as the model should produce it, with the end token."""
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.eos_id]
        self.check_ids(ids, "a reference answer")
        return ids

    def render_reply(self, text: str) -> str:
        """An environment's reply as it follows a turn of the model: with template chat, from the end-of-turn token of
        that turn to where the next one starts; with template plain, the text itself.

        Raises:
            TaskError: the chat template refuses such a conversation.
        """
        if self.template == "plain":
            return text
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _TURN},
            {"role": self.reply_role, "content": text},
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise TaskError(
                f"the chat template takes no message of role {self.reply_role!r} after one of the assistant ({error}). "
                "Set task.reply_role to a role it knows, or task.template=plain."
            ) from error
        _, found, rest = rendered.partition(_TURN)
        if not found:
            raise TaskError("the chat template drops what the assistant said. Set task.template=plain.")
        return rest

    def encode_reply(self, turn: Sequence[int], text: str) -> list[int]:
        """Ids that follow the ids of a turn, up to where the model's next turn starts.

        The template's end-of-turn token is among them only where the model did not sample it itself (it stopped at
        another token): it was not the model's choice, so it belongs to the untrained tokens.

        Raises:
            TaskError: no token, an id outside the vocabulary, or characters that the tokenizer cannot express.
        """
        try:
            ids = self.tokenizer.encode(self.render_reply(text), add_special_tokens=False)
        except (TypeError, UnicodeError) as error:  # half of a surrogate pair, as in badly decoded output of a tool
            raise TaskError(
                f"a reply that is no text: {text[:200]!r} ({error}). Decode it with errors='replace'."
            ) from error
        if self.template == "chat":
            end = next((place for place, token in enumerate(ids) if token in self.stop_token_ids), None)
            if end is not None and turn[-1] == ids[end]:
                ids = ids[end + 1 :]
        self.check_ids(ids, "a reply")
        if not ids or self.has_unknown(ids):
            what = "characters outside the vocabulary" if ids else "no token"
            raise TaskError(f"a reply with {what}: {text[:200]!r}. Let the environment say something else.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response without special tokens."""
        self.check_ids(ids, "a response")
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def has_unknown(self, ids: Iterable[int]) -> bool:
        """Whether the text held characters that the tokenizer cannot express."""
        unknown = self.tokenizer.unk_token_id
        return unknown is not None and unknown != self.eos_id and unknown in ids

    def check_ids(self, ids: Iterable[int], what: str) -> None:
        """Refuse ids that the embedding has no row for: they would kill an engine.

        Raises:
            TaskError: the message names the id and the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise TaskError(
                    f"{what}: token id {token} is outside the vocabulary of {self.vocab_size}. "
                    "Tokenizer and model do not belong together; check model.path."
                )

    def _messages(self, item: Item) -> Messages:
        question = item.question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages


def _end_tokens(model_dir: Path) -> list[int]:
    """End tokens that the model's own files name; chat models list several in generation_config.json."""
    ends: list[int] = []
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        value = _read_json(path).get("eos_token_id") if path.is_file() else None
        ends.extend(value if isinstance(value, list) else [] if value is None else [value])
    return ends


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
