"""Megatron-Core: layout, model, packed forward pass, optimizer step and checkpoints of one policy."""

from asympo_megatron.mcore.layout import Layout, initialize, shutdown  # isort: skip  (installs the CPU backend lazily)
from asympo_megatron.mcore.checkpoints import Checkpoints
from asympo_megatron.mcore.collate import Row
from asympo_megatron.mcore.learner import Learner

__all__ = ["Checkpoints", "Layout", "Learner", "Row", "initialize", "shutdown"]
