"""The controller process: prompts, requests, rewards, the lag rule, the journal, the fleet of engines."""

from asympo_megatron.rollout.build import build_controller, serve_controller
from asympo_megatron.rollout.controller import Controller
from asympo_megatron.rollout.describe import describe_journal

__all__ = ["Controller", "build_controller", "describe_journal", "serve_controller"]
