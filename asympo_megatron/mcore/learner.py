"""The learner: one policy in Megatron-Core, its optimizer and its step counter."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import tee
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from asympo_megatron.config import Config
from asympo_megatron.errors import AsympoError, BatchError, ConfigError, NonFiniteLossError, UnknownNameError
from asympo_megatron.mcore import checkpoint, checkpoint_save, cpu
from asympo_megatron.mcore.checksum import weights_checksum
from asympo_megatron.mcore.collate import LOGPROBS, MicroBatch, Row, check_rows, collate
from asympo_megatron.mcore.layout import Layout
from asympo_megatron.mcore.loss import LOSS_SUM, RESPONSES, ForwardStep
from asympo_megatron.mcore.model import build_chunks
from asympo_megatron.mcore.model_config import plan_model
from asympo_megatron.mcore.moe import ExpertBalance
from asympo_megatron.mcore.optimizer import Schedule, build_optimizer, wrap_ddp
from asympo_megatron.mcore.reference import ReferenceWeights, restored
from asympo_megatron.mcore.scoring import PASSES, score_rows, with_statistics
from asympo_megatron.mcore.shards import Shard, draw_initial_weights, shards
from asympo_megatron.parallel import merge_stats, reduce_stats


class Learner:
    """Builds the model chunks of this rank and trains them. Every rank calls every method (all are collective).

    Args:
        config: of the run.
        hf_config: fields of a Hugging Face config.json.
        objective: ``objective(token_nll_T, batch, groups=...)``.
        layout: what ``initialize`` returned.

    Raises:
        ConfigError, UnknownNameError: a model or layout that cannot work; the message names the value to change.
    """

    def __init__(
        self, config: Config, hf_config: Mapping[str, Any], objective: Callable[..., Any], layout: Layout
    ) -> None:
        cpu.install()
        self.config, self.hf_config, self.layout = config, dict(hf_config), layout
        self.plan = plan_model(config, hf_config)
        chunks = build_chunks(self.plan, config.rollout.sampling.temperature, layout.groups)
        self._initialize(chunks)
        self.chunks = wrap_ddp(config, self.plan.transformer, chunks)
        self.optimizer = build_optimizer(config, self.chunks)
        self.step_count = 0
        self._schedule = Schedule(config, self.optimizer)
        self._forward_step = ForwardStep(objective, layout.groups)
        self._objective = objective
        self._needed = [field for field, tensor in LOGPROBS.items() if tensor in getattr(objective, "needs", ())]
        self._reference: ReferenceWeights | None = None
        self._balance: ExpertBalance | None = None
        if self.plan.facts.moe is not None:
            self._balance = ExpertBalance(self.chunks, self.plan.transformer, objective, layout.groups)
        self._connect_schedule()

    def step(self, microbatches: Sequence[Sequence[Row]], num_responses: int) -> dict[str, float]:
        """One optimizer step on the global batch.

        Args:
            microbatches: the rows of this DP rank, the same on every rank of its replica; possibly none.
            num_responses: N of the global batch over all DP ranks.

        Returns:
            Flat figures (loss, grad_norm, entropy, tokens, lr and what the objective reports), equal on every rank.

        Raises:
            BatchError: rows that cannot be trained on, or that do not add up to ``num_responses``; on every rank.
            NonFiniteLossError: loss or gradient norm is NaN or infinite, on every rank; weights, optimizer state and
                step counter are as before.
        """
        self._agree(self._problem(microbatches, self._needed))
        batches = [collate(rows, self.layout) for rows in self._full_waves(microbatches)]
        batches = with_statistics(self._objective, batches, self.layout.groups)
        if self._balance is not None:
            self._balance.begin(batches)
        figures = self._forward_backward(batches)
        seen = int(figures.pop(RESPONSES))
        if seen != num_responses:
            raise BatchError(
                f"the micro-batches of all ranks hold {seen} responses, but num_responses={num_responses}."
            )
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        self._refuse_non_finite(figures.pop(LOSS_SUM), grad_norm)
        self._schedule.set(self.step_count)
        self.optimizer.step()
        self.step_count += 1
        routing = {} if self._balance is None else self._balance.figures()
        return {**figures, **routing, "grad_norm": grad_norm, "lr": self.optimizer.param_groups[0]["lr"]}

    @property
    def passes(self) -> tuple[str, ...]:
        """The scoring passes that the objective needs before each step: none for asympo, spo, reinforce."""
        return tuple(which for which in ("proximal", "reference") if PASSES[which] in self._needed)

    def score(self, microbatches: Sequence[Sequence[Row]], which: str) -> list[list[Row]]:
        """The same rows with log-probs of their tokens, from a forward pass in any layout; nothing is trained.

        Args:
            microbatches: as for :meth:`step`; possibly none.
            which: ``proximal`` or, the same, ``old``: the current weights, into ``Row.proximal_logprobs`` |
                ``reference``: those of :meth:`hold_reference`, into ``Row.reference_logprobs``.

        Raises:
            BatchError: rows that cannot be scored; on every rank.
            ConfigError: no reference policy is held.
        """
        if which not in PASSES:
            raise UnknownNameError("scoring pass", which, PASSES)
        self._agree(self._problem(microbatches, ()))
        waves = self._full_waves(microbatches)
        with self._weights_of(which):
            length = self.config.batch.max_tokens_per_microbatch
            scored = score_rows(self.chunks, waves, PASSES[which], self.layout, length)
        return scored[: len(microbatches)]

    def hold_reference(self, load: Callable[[], None] | None = None) -> None:
        """Keep a copy of the weights as the reference policy; before the first step.

        Args:
            load: puts the reference weights into the parameters, which get their own back afterwards; None: the
                weights that they hold now.
        """
        if self.step_count:
            raise ConfigError(f"the reference policy is taken before the first step; this is step {self.step_count}.")
        params = [shard.param for shard in self.shards()]
        if load is None:
            self._reference = ReferenceWeights(params)
            return
        with restored(params):
            load()
            self._reference = ReferenceWeights(params)
        self.weights_changed()

    def shards(self) -> Iterator[Shard]:
        """Every local parameter with its place in the global model; weights are current when this returns."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)  # the gather is otherwise deferred to the next forward
        return shards(self.chunks, self.plan.facts.vocab_size)

    def checksum(self) -> str:
        """Checksum of all weights, the same in every layout that holds the same weights."""
        return weights_checksum(self.shards())

    def weights_changed(self) -> None:
        """Call after writing into the parameters: the optimizer's float32 masters are copied from them again."""
        self.optimizer.reload_model_params()

    def save(self, directory: str | Path) -> None:
        """Write a complete checkpoint to ``directory``, which must not exist yet.

        Raises:
            CheckpointError: it could not be written completely; nothing half-written is left under that name.
        """
        checkpoint_save.save(self, Path(directory))

    def load(self, directory: str | Path, weights_only: bool = False) -> None:
        """Continue from a checkpoint, or (``weights_only``) start anew from its weights. Any layout may load it.

        Raises:
            CheckpointError: missing, incomplete, or of another model.
        """
        checkpoint.load(self, Path(directory), weights_only=weights_only)

    def _initialize(self, chunks: Sequence[Any]) -> None:
        """Random weights, or (model.init names other ones, which the caller loads) NaN: forgotten, they never train."""
        if self.config.model.init != "random":
            for chunk in chunks:
                for param in chunk.parameters():
                    param.data.fill_(math.nan)
            return
        facts = self.plan.facts
        seed, std = self.config.run.seed, self.config.model.init_std
        draw_initial_weights(chunks, facts.vocab_size, seed=seed, std=std, num_layers=facts.num_layers)

    def _connect_schedule(self) -> None:
        """Give Megatron's schedules the callbacks that they look up in the TransformerConfig."""
        transformer, chunks = self.plan.transformer, self.chunks
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = self.optimizer.scale_loss
        if chunks[0].ddp_config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in chunks]
            transformer.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]

    def _full_waves(self, microbatches: Sequence[Sequence[Row]]) -> Sequence[Sequence[Row]]:
        """At least one micro-batch; with interleaved stages a multiple of the stages, as their schedule demands."""
        parallel = self.config.parallel
        wave = parallel.pipeline if parallel.virtual_pipeline else 1
        # Ranks that share experts are data-parallel ranks, and every micro-batch of one is a collective of all.
        most = self._largest(len(microbatches)) if parallel.expert > 1 else len(microbatches)
        return [*microbatches, *([()] * (-(-max(most, 1) // wave) * wave - len(microbatches)))]

    @contextmanager
    def _weights_of(self, which: str) -> Iterator[None]:
        params = [shard.param for shard in self.shards()]  # also gathers what the optimizer has not sent yet
        if which != "reference":
            yield
            return
        if self._reference is None:
            raise ConfigError("no reference policy is held. Call Learner.hold_reference() before training.")
        with self._reference.in_place_of(params):
            yield

    def _problem(self, microbatches: Sequence[Sequence[Row]], needed: Sequence[str]) -> AsympoError | None:
        try:
            for rows in microbatches:
                check_rows(rows, self.plan.facts.vocab_size, self.config.batch.max_tokens_per_microbatch)
                for field in needed:
                    _check_logprobs(rows, field)
        except BatchError as error:
            return error
        return None

    def _agree(self, problem: AsympoError | None) -> None:
        """Raise on every rank if any rank has a problem: a rank alone in a collective would wait for ever."""
        worst = self._largest(-1 if problem is None else self.layout.rank)
        if problem is not None:
            raise problem
        if worst >= 0:
            raise BatchError(f"rank {worst} refused its rows; its log has the reason.")

    def _largest(self, value: int) -> int:
        """The largest value of all ranks."""
        if self.layout.world_size == 1:
            return value
        box = torch.tensor([value], device=self.layout.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box.item())

    def _forward_backward(self, batches: list[MicroBatch]) -> dict[str, float]:
        """Gradients of the global batch into the buffers; the reduced statistics, equal on every rank."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        iterators = list(tee(iter(batches), len(self.chunks)))
        single = len(self.chunks) == 1
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,
            num_microbatches=len(batches),
            seq_length=self.config.batch.max_tokens_per_microbatch,
            micro_batch_size=1,
            forward_only=False,
        )
        if not results:  # only the last pipeline stage has seen a loss
            return self._share({})
        return self._share(reduce_stats(merge_stats(results), self.layout.groups.data_context))

    def _share(self, figures: dict[str, float]) -> dict[str, float]:
        """Statistics live on the last pipeline stage: bring them to the others."""
        pipeline = self.layout.groups.pipeline
        if pipeline is None:
            return figures
        box = [figures]
        last = dist.get_process_group_ranks(pipeline)[-1]
        dist.broadcast_object_list(box, src=last, group=pipeline, device=self.layout.device)
        return box[0]

    def _refuse_non_finite(self, loss_sum: float, grad_norm: float) -> None:
        if self._largest(int(not (math.isfinite(loss_sum) and math.isfinite(grad_norm)))):
            raise NonFiniteLossError(
                f"step {self.step_count}: loss sum {loss_sum}, gradient norm {grad_norm}. The step was refused and the "
                "weights kept. Lower optimizer.lr or optimizer.clip_grad, or raise the objective's nll_floor."
            )


def _check_logprobs(rows: Sequence[Row], field: str) -> None:
    """Found here, and not by the objective: that would raise inside the forward pass of one rank, the others waiting.

    Raises:
        BatchError: a response with trained tokens and without one log-probability a token.
    """
    remedy = "Record them" if field == "behavior_logprobs" else f"Call Learner.score() for {field}"
    for number, row in enumerate(rows):
        values = getattr(row, field)
        got = None if values is None else len(values)
        if any(row.mask) and got != len(row.ids):
            raise BatchError(
                f"response {number} has {'no' if got is None else got} {field} for {len(row.ids)} tokens, and the "
                f"objective needs one each. {remedy}, or use an objective that reads the current policy only: asympo, "
                "spo, reinforce."
            )
