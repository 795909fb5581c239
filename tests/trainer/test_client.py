"""Controller client: long polls, refusals by class, lost connections, an absent controller."""

import http.server
import socket
import threading

import msgspec
import pytest

from asympo_megatron import protocol
from asympo_megatron.config import load_config
from asympo_megatron.errors import ConfigError, ControllerError, JournalError, StaleIncarnationError
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.exchange import Exchange
from asympo_megatron.trainer.preemption import Preemption, StopSignals
from asympo_megatron.trainer.sources import ControllerSource


class Script(http.server.ThreadingHTTPServer):
    """A controller that answers each call with the next scripted (status, message), or drops the connection."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list = []
        self.calls: list = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, msgspec.msgpack.decode(body), self.headers.get("Authorization")))
        answer = self.server.answers.pop(0)
        if answer == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, message = answer
        data = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def script():
    with Script() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def evaluation(step):
    return protocol.Evaluation(step, step + 1, 0.5, 8, 3.0, 0.1)


def source_of(client):
    exchange = Exchange(0, 1, 0)
    source = ControllerSource(load_config("quickstart"), client, exchange, Preemption(StopSignals(), exchange))
    source.incarnation = 7
    return source


def test_lease_polls_until_ready_and_keeps_every_evaluation(script):
    script.answers = [
        (200, protocol.LeaseReply(False, 3, evaluations=[evaluation(1)])),
        (200, protocol.LeaseReply(True, 3, metrics={"reward/mean": 0.25}, evaluations=[evaluation(2)])),
    ]
    reply = source_of(ControllerClient(script.url, token="secret")).lease(3)
    assert [e.step for e in reply.evaluations] == [1, 2]
    assert reply.metrics == {"reward/mean": 0.25}
    assert [(path, body["incarnation"], body["step"], auth) for path, body, auth in script.calls] == [
        ("/lease", 7, 3, "Bearer secret")
    ] * 2


def test_finish_polls_until_the_last_evaluation(script):
    script.answers = [
        (200, protocol.FinishReply(False, [evaluation(4)])),
        (200, protocol.FinishReply(True, [evaluation(5)])),
    ]
    assert [e.step for e in source_of(ControllerClient(script.url)).finish(5)] == [4, 5]


def test_the_fence_refuses_a_replaced_trainer(script):
    script.answers = [
        (200, protocol.AttachReply(3)),
        (200, {}),
        (409, protocol.ErrorReply("StaleIncarnationError", "incarnation 4 has attached")),
    ]
    source = source_of(ControllerClient(script.url))
    source.attach(6)
    source.fence()
    with pytest.raises(StaleIncarnationError, match="incarnation 4"):
        source.fence()
    assert script.calls[1][1] == {"incarnation": 3, "step": 6, "oldest_step": 0}  # commits nothing that attach did not


def test_a_dropped_connection_is_tried_again(script):
    script.answers = ["drop", "drop", (200, protocol.AttachReply(5))]
    reply = ControllerClient(script.url).attach(protocol.AttachRequest("run", "hash", 0))
    assert reply.incarnation == 5
    assert len(script.calls) == 3


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("StaleIncarnationError", StaleIncarnationError),
        ("JournalError", JournalError),
        ("NoSuchError", ControllerError),
        ("UnknownNameError", ControllerError),
        ("revive", ControllerError),
    ],
)
def test_refusals_come_back_as_their_class_and_are_not_retried(script, kind, error):
    script.answers = [(409, protocol.ErrorReply(kind, "a newer trainer has attached"))]
    with pytest.raises(error, match="a newer trainer"):
        ControllerClient(script.url).commit(protocol.CommitRequest(1, 2, 0))
    assert len(script.calls) == 1


def test_garbage_is_quoted(script):
    script.answers = [(502, b"<html>proxy</html>")]
    with pytest.raises(ControllerError, match=r"HTTP 502.*proxy"):
        ControllerClient(script.url).commit(protocol.CommitRequest(1, 2, 0))


def test_an_absent_controller_is_named_with_the_remedy():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ControllerError, match=r"rollout\.controller_url") as caught:
        ControllerClient(url, patience_s=0.2).commit(protocol.CommitRequest(1, 2, 0))
    assert url in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:80", "https://h:1", "http://host"])
def test_malformed_urls_are_refused(url):
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        ControllerClient(url)
