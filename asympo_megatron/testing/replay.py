"""Random groups for replay: awkward lengths, masks and rewards, a function of the seed alone."""

import random

from asympo_megatron.records import Group, Response, VersionSpan


def random_groups(
    count: int, *, group_size: int = 4, vocab_size: int = 300, max_tokens: int = 24, seed: int = 0
) -> list[Group]:
    """Groups that a parity test should not find easy.

    Among them: one-token responses, a fully masked response, masks with holes (tool tokens), zero-variance groups,
    prompts longer than their responses.
    """
    rng = random.Random(seed)
    return [_group(rng, index, group_size, vocab_size, max_tokens) for index in range(count)]


def _group(rng: random.Random, index: int, group_size: int, vocab_size: int, max_tokens: int) -> Group:
    prompt = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, max_tokens))]
    responses = []
    for row in range(group_size):
        size = 1 if row == 0 else rng.randint(1, max_tokens)
        mask = [int(rng.random() < 0.85) for _ in range(size)]
        if index % 3 == 0 and row == 1:
            mask = [0] * size
        reward = 1.0 if index % 4 == 0 else float(rng.random() < 0.5)
        ids = [rng.randrange(3, vocab_size) for _ in range(size)]
        logprobs = [-rng.random() * 4 for _ in range(size)]
        responses.append(Response(ids, mask, reward, [VersionSpan(0, 0, size)], logprobs))
    return Group(prompt, responses, group_id=index, prompt_index=index)
