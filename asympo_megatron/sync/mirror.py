"""A host's own copy of the published weights, whole: deltas come over the shared file system, engines load from here.

    controller (HTTP)   /bring a version ─► path of a whole, checked copy ─► engine loads it ─► /release
    mirror              newest whole version known, here or published, + the deltas after it ─► a new directory

A copy is never changed in place: an engine may be reading it. It goes when a newer one is there and nobody loads it.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from asympo_megatron import protocol
from asympo_megatron.errors import PublishError
from asympo_megatron.sync.commands import CommandServer
from asympo_megatron.sync.delta import rebuild
from asympo_megatron.sync.manifest import Manifest, list_versions, read_manifest, verify_version, version_path
from asympo_megatron.sync.own_folder import OwnFolder

log = logging.getLogger(__name__)
Known = TypeVar("Known")
_ATTEMPTS = 4
"""A network file system may show a renamed directory late."""


class Mirror:
    """Brings versions of one run to this host and answers the controller until it is closed.

    Args:
        root: directory of the published versions.
        folder: where copies lie.
        host, port: where to listen; port 0 takes any.
        token: bearer token that the controller must show; None: everybody may call.
        lease_s: a copy that was asked for stays this long when it is not released.
        backoff_s: pause after published files were not found as they should be; doubles.
    """

    def __init__(
        self,
        root: Path,
        folder: OwnFolder,
        host: str,
        port: int,
        token: str | None,
        lease_s: float,
        backoff_s: float = 0.5,
    ) -> None:
        self._root, self._folder, self._lease_s, self._backoff_s = root, folder, lease_s, backoff_s
        self._leases: dict[str, tuple[int, float]] = {}
        self._building, self._leasing = threading.Lock(), threading.Lock()
        self._server = CommandServer(
            host,
            token,
            {
                "/bring": (protocol.BringVersionRequest, self.bring),
                "/release": (protocol.LeaveGroupRequest, self.release),
            },
            port,
        )

    @property
    def port(self) -> int:
        return self._server.port

    def close(self) -> None:
        """Stop answering; every copy goes."""
        self._server.close()
        self._folder.close()

    def bring(self, request: protocol.BringVersionRequest) -> protocol.BringVersionReply:
        """Have a whole copy of a version, made now unless it is there.

        Raises:
            PublishError: it is not published, or damaged.
        """
        copy = version_path(self._folder.path, request.version)
        with self._building:
            published = self._patiently(lambda: read_manifest(version_path(self._root, request.version)))
            if not self._holds(published):
                shutil.rmtree(copy, ignore_errors=True)
                self._build(copy, request.version)
            with self._leasing:
                self._leases[request.transfer] = (request.version, time.monotonic() + self._lease_s)
            self._remove_others(request.version)
        return protocol.BringVersionReply(str(copy.resolve()))

    def release(self, request: protocol.LeaveGroupRequest) -> None:
        """The engine has loaded, or failed; an unknown transfer is no error."""
        with self._leasing:
            self._leases.pop(request.group, None)

    def _build(self, copy: Path, version: int) -> None:
        started_s = time.monotonic()
        start, deltas = self._patiently(lambda: self._chain(version))
        try:
            rebuild(copy, start, deltas)
        except PublishError as error:
            if start.parent == self._root or not _is_damaged(start):
                raise
            log.warning("made again from the published whole version, for %s", error)
            shutil.rmtree(start, ignore_errors=True)
            start, deltas = self._chain(version)
            rebuild(copy, start, deltas)
        spent_s = time.monotonic() - started_s
        log.info("version %d made from %s and %d deltas in %.1f s", version, start, len(deltas), spent_s)

    def _chain(self, version: int) -> tuple[Path, list[Path]]:
        """A whole version to start from, here if possible, and the deltas after it, which are checked."""
        deltas: list[Path] = []
        while True:
            path = version_path(self._root, version)
            manifest = read_manifest(path)
            if self._holds(manifest):
                return version_path(self._folder.path, version), deltas
            if manifest.base is None:
                return path, deltas
            if not manifest.base < version:
                raise PublishError(f"{path} says that it builds on version {manifest.base}. Publish it again.")
            verify_version(path)
            deltas.insert(0, path)
            version = manifest.base

    def _holds(self, published: Manifest) -> bool:
        """Whether there is a copy of this very version, not of one of the same number of an earlier run."""
        if published.version not in list_versions(self._folder.path):
            return False
        return read_manifest(version_path(self._folder.path, published.version)).files == published.whole

    def _remove_others(self, newest: int) -> None:
        now_s = time.monotonic()
        with self._leasing:
            self._leases = {name: lease for name, lease in self._leases.items() if lease[1] > now_s}
            kept = {newest, *(version for version, _ in self._leases.values())}
        for version in list_versions(self._folder.path):
            if version not in kept:
                shutil.rmtree(version_path(self._folder.path, version), ignore_errors=True)

    def _patiently(self, work: Callable[[], Known]) -> Known:
        retrying = Retrying(
            retry=retry_if_exception_type(PublishError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(multiplier=self._backoff_s, max=4.0),
            reraise=True,
        )
        return retrying(work)


def _is_damaged(copy: Path) -> bool:
    try:
        verify_version(copy)
    except PublishError:
        return True
    return False
