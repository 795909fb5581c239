"""`asympo mirror`: the published weights of a run, whole, on an engine's host."""

import logging
import signal
import threading

from asympo_megatron.config import Config, RunDir
from asympo_megatron.errors import ConfigError, PublishError
from asympo_megatron.sync.mirror import Mirror
from asympo_megatron.sync.own_folder import OwnFolder, run_label

log = logging.getLogger(__name__)


def serve_mirror(config: Config) -> None:
    """Run the mirror of a run on this host until SIGTERM or SIGINT.

    Raises:
        ConfigError: nothing is published as changes, or the port is in use.
        PublishError: no directory for the copies.
    """
    sync, run_dir = config.sync, RunDir.of(config)
    if not sync.deltas:
        raise ConfigError("sync.deltas is 0: every version is published whole, and engines load it without a mirror.")
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    folder = OwnFolder(sync.spool_dir, f"asympo-mirror-{run_label(run_dir.path)}")
    token = config.rollout.controller_token
    try:
        mirror = Mirror(run_dir.weights, folder, sync.mirror_host, sync.mirror_port, token, sync.timeout_s)
    except OSError as error:
        folder.close()
        if isinstance(error, PublishError):
            raise
        raise ConfigError(
            f"the mirror cannot listen on {sync.mirror_host}:{sync.mirror_port} ({error.strerror}). Set "
            "sync.mirror_port to a free port."
        ) from error
    log.info("mirror of %s at %s:%d, copies in %s", run_dir.weights, sync.mirror_host, mirror.port, folder.path)
    stopped.wait()
    mirror.close()
