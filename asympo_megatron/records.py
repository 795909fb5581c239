"""Durable records: prompts, responses, groups, and the replay file that holds them.

A replay file is JSON lines, one group a line:
``{"prompt_ids": [...], "responses": [{"ids": [...], "mask": [...], "reward": 1.0,
"versions": [[version, start, end], ...], "behavior_logprobs": [...] | null}]}``
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from asympo_megatron.errors import RecordError


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a response were sampled by weight version ``version``."""

    version: int
    start: int
    end: int


class Response(msgspec.Struct, frozen=True):
    """One sampled response, with exactly the token ids that the engine returned."""

    ids: list[int]
    mask: list[int]
    """1 where the token is trained, 0 for tool and environment tokens (and everywhere for a masked response)."""
    reward: float
    versions: list[VersionSpan] = []
    """Of the tokens that a model sampled: those of an environment's replies belong to none."""
    behavior_logprobs: list[float] | None = None
    finish_reason: str = "stop"
    """stop | length (truncated) | turns (task.max_turns) | abort."""
    turns: int = 1
    """Of the model: more than one where an environment replied."""

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(self.mask)


class Group(msgspec.Struct, frozen=True):
    """All responses of one prompt: what a group-relative advantage is computed on."""

    prompt_ids: list[int]
    responses: list[Response]
    group_id: int = -1
    """Position in the order of admission; -1 in files that carry none."""
    prompt_index: int = -1


def read_groups(
    path: str | Path, *, min_responses: int = 1, max_tokens: int | None = None, behavior_logprobs: bool = False
) -> Iterator[Group]:
    """Yield the groups of a replay file in order, numbered from 0.

    Args:
        path: JSON lines, one group a line.
        min_responses: of every group; a group-relative advantage needs 2.
        max_tokens: of prompt and response together; None: any number.
        behavior_logprobs: whether every response must carry them.

    Raises:
        RecordError: the file is missing, or a line is malformed (the message names the line and the field).
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"replay file {path} does not exist. Set rollout.replay to a JSONL file of groups.")
    decoder = msgspec.json.Decoder(Group)
    with path.open("rb") as lines:
        for number, line in enumerate(filter(bytes.strip, lines)):
            try:
                group = decoder.decode(line)
                check_group(group)
                _check_use(group, min_responses, max_tokens, behavior_logprobs)
            except (msgspec.DecodeError, RecordError) as error:
                raise RecordError(f"{path}, group {number}: {error}") from error
            yield msgspec.structs.replace(group, group_id=number)


def write_groups(path: str | Path, groups: Iterator[Group] | list[Group]) -> None:
    """Write groups as a replay file, the inverse of :func:`read_groups`."""
    encoder = msgspec.json.Encoder()
    with Path(path).open("wb") as out:
        for group in groups:
            out.write(encoder.encode(group) + b"\n")


def _check_use(group: Group, min_responses: int, max_tokens: int | None, behavior_logprobs: bool) -> None:
    """What this run needs of a group that is well-formed in itself."""
    if len(group.responses) < min_responses:
        raise RecordError(
            f"{len(group.responses)} response(s), but advantage.estimator compares at least {min_responses}. "
            "Remove the group, or set advantage.estimator=none."
        )
    for row, response in enumerate(group.responses):
        size = len(group.prompt_ids) + len(response.ids)
        if max_tokens is not None and size > max_tokens:
            raise RecordError(
                f"response {row} has {size} tokens with its prompt; batch.max_tokens_per_microbatch is {max_tokens}. "
                "Raise it, or remove the response."
            )
        if behavior_logprobs and response.behavior_logprobs is None:
            raise RecordError(
                f"response {row} has no behavior_logprobs, which the objective needs. Record them, or use an objective "
                "that reads the current policy only: asympo, spo, reinforce."
            )


def check_group(group: Group) -> None:
    """Refuse a group that cannot be trained on.

    Raises:
        RecordError: no prompt, no response, or per-token lists of different lengths.
    """
    if not group.prompt_ids:
        raise RecordError("prompt_ids is empty; the first response token needs a position that predicts it.")
    if not group.responses:
        raise RecordError("responses is empty; a group has at least one response.")
    for row, response in enumerate(group.responses):
        size = len(response.ids)
        if size == 0:
            raise RecordError(f"response {row} has no token; an empty response cannot be scored.")
        if len(response.mask) != size:
            raise RecordError(f"response {row}: mask has {len(response.mask)} entries for {size} ids.")
        if any(bit not in (0, 1) for bit in response.mask):
            raise RecordError(f"response {row}: mask holds values other than 0 and 1.")
        if response.behavior_logprobs is not None and len(response.behavior_logprobs) != size:
            raise RecordError(
                f"response {row}: behavior_logprobs has {len(response.behavior_logprobs)} entries for {size} ids."
            )
        if any(not 0 <= span.start <= span.end <= size for span in response.versions):
            raise RecordError(f"response {row}: a version span lies outside its {size} tokens.")
