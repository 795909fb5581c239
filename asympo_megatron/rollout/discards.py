"""Groups that were sampled, scored and dropped: figures beside those of the trained ones show the bias of it."""

from collections.abc import Sequence

from asympo_megatron.rollout.rows import ResponseSummary


class Discards:
    """Counts from batch to batch."""

    def __init__(self) -> None:
        self._groups = 0
        self._responses: list[tuple[float, int]] = []

    def add(self, responses: Sequence[ResponseSummary]) -> None:
        """A scored group that will never be trained."""
        self._groups += 1
        self._responses += [(response.reward, response.response_tokens) for response in responses]

    def take(self) -> dict[str, float]:
        """Figures since the last call; means only where there was something to average."""
        groups, responses = self._groups, self._responses
        self._groups, self._responses = 0, []
        figures: dict[str, float] = {"rollout/discarded_groups": groups}
        if responses:
            rewards, tokens = zip(*responses, strict=True)
            figures["rollout/discarded_reward_mean"] = sum(rewards) / len(rewards)
            figures["rollout/discarded_response_tokens_mean"] = sum(tokens) / len(tokens)
        return figures
