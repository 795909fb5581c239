"""Asynchronous RL post-training on Megatron-Core without behavior-policy information."""
