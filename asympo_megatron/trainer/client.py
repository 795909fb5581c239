"""The trainer's side of the controller protocol: one blocking call at a time, from one rank."""

import http.client
import logging
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
from tenacity import Retrying, before_sleep_log, retry_if_exception_type, stop_after_delay, wait_exponential

from asympo_megatron import errors, protocol
from asympo_megatron.errors import AsympoError, ControllerError

log = logging.getLogger(__name__)
Reply = TypeVar("Reply")
_UNREACHABLE = (ConnectionError, http.client.HTTPException, TimeoutError, OSError)
_POLL_S = 10.0


class ControllerClient:
    """Blocking calls to the controller. Every call is idempotent there, so a lost connection is simply retried.

    Args:
        url: e.g. ``http://10.0.0.7:8400``.
        token: bearer token, or None.
        patience_s: how long an unreachable controller is tried again before the call fails; it covers a restart.
    """

    def __init__(self, url: str, token: str | None = None, patience_s: float = 120.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise errors.ConfigError(f"rollout.controller_url is {url!r}; expected http://HOST:PORT.")
        self.url = url
        self._host, self._port = parts.hostname, parts.port
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._patience_s = patience_s
        self._connection: http.client.HTTPConnection | None = None

    def attach(self, request: protocol.AttachRequest) -> protocol.AttachReply:
        return self._call("/attach", request, protocol.AttachReply)

    def lease(self, incarnation: int, step: int) -> protocol.LeaseReply:
        """The manifest of ``step``, or after some seconds word that the batch is not complete: then ask again."""
        return self._call("/lease", protocol.LeaseRequest(incarnation, step, _POLL_S), protocol.LeaseReply)

    def payload(self, request: protocol.PayloadRequest) -> list[protocol.Sample]:
        return self._call("/payload", request, protocol.PayloadReply).samples

    def version(self, request: protocol.VersionRequest) -> protocol.VersionReply:
        return self._call("/version", request, protocol.VersionReply)

    def publish(self, request: protocol.PublishRequest) -> protocol.PublishReply:
        return self._call("/publish", request, protocol.PublishReply)

    def commit(self, request: protocol.CommitRequest) -> None:
        self._call("/commit", request, dict)

    def finish(self, incarnation: int, step: int) -> protocol.FinishReply:
        """Say that training is over; ask again until the last evaluations are done."""
        return self._call("/finish", protocol.FinishRequest(incarnation, step, _POLL_S), protocol.FinishReply)

    def _call(self, path: str, request: object, kind: type[Reply]) -> Reply:
        retrying = Retrying(
            retry=retry_if_exception_type(_UNREACHABLE),
            stop=stop_after_delay(self._patience_s),
            wait=wait_exponential(multiplier=0.1, max=2.0),
            before_sleep=before_sleep_log(log, logging.DEBUG),
            reraise=True,
        )
        body = msgspec.msgpack.encode(request)
        try:
            status, answer = retrying(self._post, path, body)
        except AsympoError:
            raise
        except _UNREACHABLE as error:
            raise ControllerError(
                f"controller at {self.url} did not answer {path} for {self._patience_s:.0f} s ({error}). "
                "Check that `asympo control` runs and that rollout.controller_url names it."
            ) from error
        if status != 200:
            raise _refusal(status, path, answer)
        return msgspec.msgpack.decode(answer, type=kind)

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=6 * _POLL_S)
        try:
            headers = {**self._headers, "Content-Type": "application/msgpack"}
            self._connection.request("POST", path, body, headers)
            response = self._connection.getresponse()
            return response.status, response.read()
        except BaseException:
            self._connection.close()
            self._connection = None
            raise


def _refusal(status: int, path: str, answer: bytes) -> AsympoError:
    try:
        reply = msgspec.msgpack.decode(answer, type=protocol.ErrorReply)
    except msgspec.DecodeError:
        return ControllerError(f"controller answered {path} with HTTP {status}: {answer[:200]!r}.")
    return errors.revive(reply.kind, reply.message)
