"""NeMo-RL: ``setup = with_loss(setup, ASymPOLoss())`` in a short driver around its ``examples/run_grpo.py``.

Checked against NeMo-RL 7ea279a of 2026-08-22, behind v0.7.0 (``nemo_rl/algorithms/{grpo.py,loss/}``,
``models/megatron/train.py``).

``setup`` builds a ``ClippedPGLossFn`` and has no option for another loss; everything behind it takes the loss as an
argument. The loss gets ``next_token_logprobs`` [B, S - 1] (one sequence a call with packing), gathered over context
parallelism, and returns a sum divided by ``global_valid_seqs``: all workers undo Megatron's and FSDP's averaging. N is
therefore NeMo-RL's count of samples whose ``sample_mask`` is 1; overlong filtering takes a response out of N.

What it saves: with ``loss_fn.force_on_policy_ratio=true`` and no ``grpo.seq_logprob_error_threshold`` the pass for
``prev_logprobs`` is not run (it wants one optimizer step a batch); ``grpo.skip_reference_policy_logprobs_calculation``
saves the reference model's. Asynchronous training insists on ``loss_fn.use_importance_sampling_correction=true``, which
this loss never reads, and on vLLM, Megatron, TensorRT-LLM or Dynamo as engine.
"""

from collections.abc import Callable
from typing import Any

from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
from torch import Tensor

from asympo_megatron.errors import ConfigError, IntegrationError
from asympo_megatron.integrations.broadcast import gather_responses, padded_ids
from asympo_megatron.objectives import build_objective

try:
    from nemo_rl.algorithms.loss.interfaces import MetricNormalizer
except ImportError:  # v0.7.0, whose trainers scale no figures
    MetricNormalizer = None

_SOURCES = {
    "behavior_logprob_T": "generation_logprobs",
    "proximal_logprob_T": "prev_logprobs",
    "reference_logprob_T": "reference_policy_logprobs",
}

_IGNORED = ("reference_policy_kl_penalty", "positive_example_nll_weight")
"""Terms of ``ClippedPGLossFn`` that vanish at 0 and that the objective does not have."""


class ASymPOLoss:
    """NeMo-RL's ``LossFunction`` for one objective; picklable, as Ray demands.

    Args:
        objective: a name, an entry point, or ``package.module:Class``. options: its fields.
    """

    input_type = LossInputType.LOGPROB
    use_fused_linear_logprobs = False

    def __init__(self, objective: str = "asympo", **options: Any) -> None:
        self.objective = build_objective(objective, **options)
        by_tokens = self.objective.normalizer == "tokens"
        self.loss_type = LossType.TOKEN_LEVEL if by_tokens else LossType.SEQUENCE_LEVEL
        # The single-controller trainer passes counts of 1 and divides figures afterwards: like the gradient, but for
        # those that are said to be plain counts.
        self.metric_normalizations = {"num_valid_samples": MetricNormalizer.NONE} if MetricNormalizer else {}

    def __call__(
        self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, next_token_logprobs: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Sum over the responses of the micro-batch divided by the global count.

        Args:
            data: ``token_mask`` and ``advantages`` [B, S], ``sample_mask`` [B]; column t belongs to token t.
            next_token_logprobs: [B, S - 1]; column t scores token t + 1.

        Raises:
            BatchError: advantages differ inside a response.
        """
        mask_RL = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        ids_T = padded_ids(mask_RL)
        needed = {name: data[_SOURCES[name]][:, 1:].flatten().float() for name in self.objective.needs}
        batch = gather_responses(data["advantages"][:, 1:].flatten().float(), ids_T, mask_RL.shape[0], **needed)
        out = self.objective(-next_token_logprobs.flatten(), batch)
        total = global_valid_toks if self.loss_type is LossType.TOKEN_LEVEL else global_valid_seqs
        loss = out.loss_sum / total
        # The trainer adds figures up over micro-batches and ranks, and its synchronous loop reads the last key: a
        # comparison with the behavior policy, which this loss does not make.
        figures = {
            "loss": loss.item(),
            "num_valid_samples": int(data["sample_mask"].sum()),
            "token_mult_prob_error": 0.0,
        }
        if "J" in out.metrics:
            figures["J"] = (out.metrics["J"].values_K[0] / total).item()
        return loss, figures


def with_loss(setup: Callable[..., tuple[Any, ...]], loss: ASymPOLoss) -> Callable[..., tuple[Any, ...]]:
    """``nemo_rl.algorithms.grpo.setup`` with the loss function it returns exchanged.

    Raises (when called):
        ConfigError: an option of ``loss_fn`` that has no meaning here.
        IntegrationError: a ``setup`` that returns no policy loss.
    """

    def setup_with_loss(master_config: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        for name in _IGNORED:
            if getattr(master_config.loss_fn, name, 0):
                raise ConfigError(
                    f"loss_fn.{name} is {getattr(master_config.loss_fn, name)}; objective {loss.objective.name!r} has "
                    f"no such term. Set loss_fn.{name}=0."
                )
        parts = setup(master_config, *args, **kwargs)
        if sum(isinstance(part, ClippedPGLossFn) for part in parts) != 1:
            raise IntegrationError("setup returned no ClippedPGLossFn, or several. Check with tools/check_integration.")
        (built,) = (part for part in parts if isinstance(part, ClippedPGLossFn))
        loss.use_fused_linear_logprobs = getattr(built, "use_fused_linear_logprobs", False)
        return tuple(loss if part is built else part for part in parts)

    return setup_with_loss
