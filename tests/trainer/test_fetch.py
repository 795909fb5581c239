"""The batch of one DP rank: planned on every rank alike, fetched by nobody twice, masked responses for free."""

from types import SimpleNamespace

from asympo_megatron import protocol
from asympo_megatron.config import load_config
from asympo_megatron.trainer.loop import TrainingLoop

DP = 3


class Samples:
    """A source that hands out the group and row as the response's tokens."""

    def samples(self, step, rows):
        return [protocol.Sample([step + 1], [group, row], [1, 1]) for group, row in rows]


def fetch(responses, dp_rank):
    config = load_config("quickstart", ["batch.max_tokens_per_microbatch=64"])
    layout = SimpleNamespace(dp_rank=dp_rank, dp_size=DP, pad_multiple=1, pack_multiple=1)
    learner = SimpleNamespace(plan=SimpleNamespace(facts=SimpleNamespace(hidden_size=64)))
    loop = TrainingLoop(config, learner, layout, Samples(), None, None, None, None)
    return loop._fetch(protocol.LeaseReply(True, 4, responses))


def leased(number, tokens, trained):
    return protocol.LeasedResponse(number, 1, 10, tokens, trained, advantage=number / 8, reward=1.0, lag=0)


def test_every_response_goes_to_one_rank_with_its_own_tokens_and_advantage():
    responses = [leased(k, 5 + 7 * k % 40, 1) for k in range(20)]
    per_rank = [fetch(responses, rank) for rank in range(DP)]
    assert len({len(batches) for batches in per_rank}) == 1  # equal counts, or pipelines would wait for each other
    rows = [row for batches in per_rank for batch in batches for row in batch]
    assert sorted(row.ids[0] for row in rows) == list(range(20))
    assert all((row.prompt_ids, row.ids[1], row.advantage) == ([5], 1, row.ids[0] / 8) for row in rows)


def test_masked_responses_take_no_room():
    trained = [leased(k, 40, 40) for k in range(DP)]  # one fills a micro-batch of each rank
    masked = [leased(DP + k, 50, 0) for k in range(30)]
    per_rank = [fetch(trained + masked, rank) for rank in range(DP)]
    assert [len(batches) for batches in per_rank] == [1] * DP
    assert sum(len(batch) for batches in per_rank for batch in batches) == DP + 30
