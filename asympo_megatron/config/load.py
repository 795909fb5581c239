"""YAML + dot-list overrides -> a checked :class:`Config`."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asympo_megatron.config.schema import Config
from asympo_megatron.config.validate import validate
from asympo_megatron.errors import ConfigError, UnknownNameError

_NOT_DATA = ("reward_timeout_s", "reward_retries", "reward_workers")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a shipped preset, apply ``a.b=c`` overrides, check the result.

    Args:
        source: path of a YAML file, or the name of a preset such as ``quickstart``.
        overrides: dot-list, applied left to right.

    Raises:
        ConfigError: no such file, malformed YAML or override, wrong type, or values that contradict each other.
        UnknownNameError: a key that does not exist; the message names the nearest one.
    """
    schema = OmegaConf.structured(Config)
    file_layer, override_layer = _read(source), _parse_overrides(overrides)
    _check_keys(schema, file_layer, ())
    _check_keys(schema, override_layer, ())
    try:
        layer = OmegaConf.merge(file_layer, override_layer)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from error
    return _finish(schema, layer, str(source))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with ``a.b=c`` overrides, checked.

    Raises:
        ConfigError, UnknownNameError: see :func:`load_config`.
    """
    base, layer = _typed(config), _parse_overrides(overrides)
    _check_keys(base, layer, ())
    return _finish(base, layer, "overrides")


def warm_start_config(config: Config) -> Config | None:
    """The run that comes first: this config with ``run.warm_start`` applied, in RUN_DIR/warmup; None without one."""
    if not config.run.warm_start:
        return None
    base = _typed(config)
    layer = _parse_overrides(config.run.warm_start)
    _check_keys(base, layer, ())
    if OmegaConf.select(layer, "objective.name") is not None:
        base.objective.options = {}  # they belong to the objective that is replaced
    base.run.root = _literal(str(Path(config.run.root) / config.run.name))
    base.run.name = "warmup"
    base.run.warm_start = []
    if config.rollout.journal_dir:
        base.rollout.journal_dir = _literal(str(Path(config.rollout.journal_dir) / "warmup"))
    return _finish(base, layer, "run.warm_start")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML; only its owner may read it where it holds a token or key."""
    secret = config.rollout.controller_token or config.rollout.engine_api_key
    path = Path(path)
    path.touch(mode=0o600 if secret else 0o644)
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: Config) -> str:
    """The resolved configuration as YAML that loads as the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(dataclasses.asdict(config))))


def data_hash(config: Config) -> str:
    """Hash of everything that decides which groups a run sees; a journal belongs to exactly one such hash.

    Time-outs, retries and processes of rewards are not part of it: one raises them when the scorer says so and resumes.
    """
    rollout, model = config.rollout, config.model
    task = {name: value for name, value in vars(config.task).items() if name not in _NOT_DATA}
    parts = (
        config.run.seed,
        (config.batch.groups_per_step, config.batch.group_size),
        config.advantage,
        task,
        (model.path, model.hf),  # tokenizer and vocabulary
        (rollout.source, rollout.replay, rollout.sampling),
    )
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]


def preset_names() -> list[str]:
    """Names of the presets shipped with the package."""
    folder = resources.files("asympo_megatron.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _typed(config: Config) -> Any:
    return OmegaConf.merge(OmegaConf.structured(Config), _literal(dataclasses.asdict(config)))


def _literal(value: Any) -> Any:
    """Values for OmegaConf that it gives back as they are: a resolved ``${x}`` is text, no interpolation."""
    if isinstance(value, dict):
        return {key: _literal(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_literal(entry) for entry in value]
    if isinstance(value, str):  # backslashes mean themselves, but before an interpolation
        return re.sub(r"(\\*)\$\{", r"\1\1\${", value)
    return value


def _finish(base: Any, layer: Any, source: str) -> Config:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(base, layer))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from error
    assert isinstance(config, Config)
    validate(config)
    return config


def _read(source: str | Path) -> DictConfig:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if str(source) not in preset_names():
            raise UnknownNameError("preset (a file name ends in .yaml)", str(source), preset_names())
        text = (resources.files("asympo_megatron.config") / "presets" / f"{source}.yaml").read_text()
    elif path.is_file():
        text = read_config_text(path)
    else:
        raise ConfigError(f"config file {path} does not exist; give a YAML file or a preset: {preset_names()}.")
    try:
        layer = OmegaConf.create(text)
    except Exception as error:  # yaml and omegaconf each raise their own kinds
        raise ConfigError(f"{source}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{source}: expected a mapping of sections at the top level.")
    return layer


def read_config_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        ConfigError: it may not be read, or is no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}). A config.yaml with a token or key is for its owner alone."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r} is not of the form a.b=c.")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise ConfigError(f"overrides {list(overrides)}: {_first_line(error)}") from error


def _check_keys(schema: Any, layer: Any, path: tuple[str, ...]) -> None:
    """Refuse unknown keys by full name. Free-form mappings (``*.megatron``, ``*.options``) have no struct flag."""
    if not isinstance(layer, DictConfig) or not OmegaConf.is_config(schema):
        return
    if OmegaConf.get_type(schema) is dict:
        return
    known = list(schema.keys())
    for key in layer:
        if key not in known:
            raise UnknownNameError(f"config key {'.'.join((*path, str(key)))!r}: key", str(key), known)
        if not OmegaConf.is_missing(layer, key):
            _check_keys(schema._get_node(key), layer._get_node(key), (*path, str(key)))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2])
