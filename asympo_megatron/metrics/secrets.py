"""Configuration as it may be shown to others."""

from dataclasses import replace

from asympo_megatron.config import Config


def without_secrets(config: Config) -> Config:
    """A copy whose token and key are hidden: for reports and trackers."""
    rollout = config.rollout
    shown = replace(
        rollout, controller_token=_hide(rollout.controller_token), engine_api_key=_hide(rollout.engine_api_key)
    )
    return replace(config, rollout=shown)


def _hide(secret: str | None) -> str | None:
    return None if secret is None else "(hidden)"
