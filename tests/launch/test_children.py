"""Children: last words, process groups, and nothing left behind however the parent ends."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from asympo_megatron.config import RunDir, load_config
from asympo_megatron.errors import ConfigError
from asympo_megatron.launch.children import ChildDiedError, Children, death_notice
from asympo_megatron.launch.lock import RunLock
from asympo_megatron.launch.ports import check_port, free_port
from asympo_megatron.testing.polling import wait_until

SLEEP = "import time; time.sleep(600)"
TIMEOUT_S = 120.0


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def children(tmp_path):
    children = Children(tmp_path / "logs", grace_s=0.5)
    yield children
    children.stop()


def test_a_dead_child_is_reported_with_its_last_words(children):
    child = children.start("engine0", [sys.executable, "-c", "print('out of sand'); raise SystemExit(3)"])
    child.process.wait()
    with pytest.raises(ChildDiedError, match=r"engine0 exited with code 3(.|\n)*out of sand"):
        children.check()


def test_the_reason_a_role_gave_is_shown_without_what_its_launcher_wrote_below(children):
    words = "\\n".join(["step 1", "asympo: ConfigError: lr is 0.", *["launcher noise"] * 30])
    child = children.start("trainer", [sys.executable, "-c", f"print('{words}'); raise SystemExit(1)"])
    child.process.wait()
    with pytest.raises(ChildDiedError) as caught:
        children.check()
    assert str(caught.value).splitlines()[1:] == ["    asympo: ConfigError: lr is 0."]


def test_the_reason_that_an_earlier_run_gave_is_not_repeated(tmp_path):
    log = tmp_path / "trainer.log"
    log.write_text("asympo: ConfigError: of an earlier run\n")
    children = Children(tmp_path)
    for words in ("'out of sand'", "''"):
        child = children.start("trainer", [sys.executable, "-c", f"print({words})"])
        child.process.wait()
        notice = death_notice(child, 1)
        assert "earlier run" not in notice
    assert "(empty)" in notice
    assert "out of sand" in log.read_text()
    children.stop()


def test_only_the_end_of_a_large_log_is_read(children):
    code = "print('asympo: EngineError: long ago', *['x' * 2000] * 50, 'out of sand', sep='\\n')"
    child = children.start("engine0", [sys.executable, "-c", code])
    child.process.wait()
    notice = death_notice(child, 1)
    assert notice.endswith("\n    out of sand")
    assert "long ago" not in notice


def test_a_killed_child_is_named_by_its_signal(children):
    child = children.start("trainer", [sys.executable, "-c", SLEEP])
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    with pytest.raises(ChildDiedError, match="trainer was killed by SIGKILL"):
        children.check()


def test_a_log_is_for_its_owner_alone(children):
    child = children.start("engine0", [sys.executable, "-c", "print('api_key=sesame')"])
    assert child.log.stat().st_mode & 0o077 == 0


def test_stop_takes_grandchildren_and_the_deaf(children):
    deaf = textwrap.dedent(
        f"""
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grandchild = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
        print(grandchild.pid, flush=True)
        signal.pause()
        """
    )
    child = children.start("controller", [sys.executable, "-c", deaf])
    wait_until(lambda: child.log.read_text().strip().isdigit(), "the grandchild's id", TIMEOUT_S)
    grandchild = int(child.log.read_text())
    children.stop()
    assert child.process.returncode == -signal.SIGKILL
    wait_until(lambda: gone(grandchild), "the grandchild's end", TIMEOUT_S)


def test_children_die_with_a_killed_parent(tmp_path):
    parent_code = textwrap.dedent(
        f"""
        import signal, sys
        from pathlib import Path
        from asympo_megatron.launch.children import Children
        child = Children(Path({str(tmp_path)!r})).start("engine0", [sys.executable, "-c", {SLEEP!r}])
        print(child.process.pid, flush=True)
        signal.pause()
        """
    )
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid), "the end of the child", TIMEOUT_S)


def test_a_run_directory_has_one_owner(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    first = RunLock(run_dir)
    with pytest.raises(ConfigError, match=r"in use.*run\.name"):
        RunLock(run_dir)
    first.release()
    RunLock(run_dir).release()


def test_a_taken_port_names_the_key_to_change():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"rollout\.controller_port"):
            check_port("127.0.0.1", taken.getsockname()[1], "rollout.controller_port")
    check_port("127.0.0.1", free_port(), "rollout.controller_port")


def test_run_dir_keeps_the_resolved_config(tmp_path):
    config = load_config("quickstart", [f"run.root={tmp_path}", "run.seed=4"])
    run_dir = RunDir.of(config)
    run_dir.create(config)
    assert load_config(run_dir.config) == config
    assert sorted(p.name for p in run_dir.path.iterdir()) == ["config.yaml"]
