"""A small tokenizer made for one task: words of its question template are tokens, everything else is characters.

Tokens are literal pieces of text (a template word carries the white space after it), so decoding is concatenation and
gives back exactly what was encoded.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from asympo_megatron.errors import TaskError

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")
PAD, EOS, UNK = SPECIAL_TOKENS[:3]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

TEMPLATE_SHARE = 0.95
"""A word is part of the template when at least this share of the questions holds it."""

_CLASSES = (string.ascii_lowercase + string.ascii_uppercase, string.digits, string.punctuation, " \n")
_PIECE = re.compile(r"\S+\s*")


def template_words(questions: Sequence[str], fixed: str = "") -> list[str]:
    """Words of two characters or more, with the white space after them, that (nearly) every question holds.

    Args:
        questions: a sample.
        fixed: text that every prompt holds anyway (the system prompt).
    """
    counts: Counter[str] = Counter()
    for question in questions:
        counts.update(set(_PIECE.findall(question)))
    common = [piece for piece, count in counts.items() if count >= TEMPLATE_SHARE * len(questions)]
    pieces = {*common, *_PIECE.findall(fixed)}
    return sorted(piece for piece in pieces if len(piece.strip()) > 1 and not piece.strip().isdigit())


def alphabet(texts: Iterable[str]) -> list[str]:
    """Characters of the texts; one letter, digit or punctuation mark brings its whole ASCII class along."""
    seen = set().union(*texts)
    for members in _CLASSES:
        if seen & set(members):
            seen |= set(members)
    return sorted(seen)


def save_tokenizer(folder: Path, questions: Sequence[str], answers: Sequence[str], fixed: str = "") -> dict[str, int]:
    """Build the tokenizer of a sample of questions and answers and save it as a transformers tokenizer.

    Returns:
        vocab_size, eos_token_id and pad_token_id, as fields of a config.json.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not questions:
        raise TaskError("a tokenizer cannot be made from an empty task; set model.path to a directory that holds one.")
    words = template_words(questions, fixed)
    pattern = _split_pattern(words)
    rest = [pattern.sub("", text) for text in (*questions, fixed)]
    vocab: dict[str, int] = {}
    for piece in (*SPECIAL_TOKENS, *words, *alphabet([*rest, *answers])):
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern.pattern}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return {"vocab_size": len(vocab), "eos_token_id": vocab[EOS], "pad_token_id": vocab[PAD]}


def _split_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Template words as whole words: none inside a longer word, and one without trailing space only at an end."""
    pieces = []
    for word in sorted(words, key=len, reverse=True):
        end = "" if word[-1].isspace() else r"(?!\S)"
        pieces.append(re.escape(word) + end)
    return re.compile(rf"(?<!\S)(?:{'|'.join(pieces)})") if pieces else re.compile(r"(?!)")
