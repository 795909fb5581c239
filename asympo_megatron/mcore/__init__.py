"""Megatron-Core: layout, model, packed forward pass, optimizer step and checkpoints of one policy."""

from asympo_megatron.mcore import cpu

cpu.import_megatron()  # before any module below does

from asympo_megatron.mcore.checkpoints import Checkpoints  # noqa: E402
from asympo_megatron.mcore.collate import Row  # noqa: E402
from asympo_megatron.mcore.layout import Layout, initialize, shutdown  # noqa: E402
from asympo_megatron.mcore.learner import Learner  # noqa: E402

__all__ = ["Checkpoints", "Layout", "Learner", "Row", "initialize", "shutdown"]
