"""The directory of a run: where everything lies."""

import os
from dataclasses import dataclass
from pathlib import Path

from asympo_megatron.config.load import save_config
from asympo_megatron.config.schema import Config
from asympo_megatron.errors import ConfigError


@dataclass(frozen=True)
class RunDir:
    """Paths of a run."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> "RunDir":
        return cls(Path(config.run.root) / config.run.name)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies once it is complete."""
        return self.checkpoints / f"step_{step:06d}"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def warmup(self) -> Path:
        return self.path / "warmup"

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def configs(self) -> Path:
        return self.path / "configs"

    def make(self) -> None:
        """Make the directory, and see that files can be made in it.

        Raises:
            ConfigError: the operating system refuses.
        """
        probe = self.path / f".probe.{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the run directory {self.path} cannot be written ({error.strerror}). Set run.root to a directory that "
                "you may write to."
            ) from error

    def create(self, config: Config) -> None:
        """Make the directory and save the resolved config in it.

        Raises:
            ConfigError: the operating system refuses.
        """
        self.make()
        temporary = self.path / f".config.{os.getpid()}.yaml"
        save_config(config, temporary)
        temporary.replace(self.config)

    def keep_config(self, step: int) -> None:
        """Keep config.yaml as the configuration in force from ``step`` on."""
        self.configs.mkdir(exist_ok=True)
        temporary = self.configs / f".{os.getpid()}.yaml"
        temporary.touch(mode=self.config.stat().st_mode & 0o777)
        temporary.write_bytes(self.config.read_bytes())
        temporary.replace(self.configs / f"step_{step:06d}.yaml")
