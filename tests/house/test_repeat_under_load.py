"""tools/repeat_under_load.py, which `make test-async` uses: it counts failures and leaves nothing running."""

import subprocess
import sys
from pathlib import Path

import psutil

PROGRAM = Path(__file__).parents[2] / "tools" / "repeat_under_load.py"
CHILDREN = """
import os, psutil
mates = [child for child in psutil.Process(os.getppid()).children() if child.pid != os.getpid()]
print(*(mate.pid for mate in mates))
raise SystemExit(len(mates) != 2)
"""
FAILS_ONCE = """
import pathlib, sys
mark = pathlib.Path(sys.argv[1])
if mark.exists():
    print("all is well")
else:
    mark.touch()
    sys.exit("the first time it fails")
"""


def repeated(*options, command):
    words = [sys.executable, str(PROGRAM), *options, "--", sys.executable, "-c", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_a_pass_that_fails_is_shown_and_counted(tmp_path):
    done = repeated("--times", "3", "--loops", "1", command=[FAILS_ONCE, str(tmp_path / "mark")])
    assert done.returncode == 1
    assert done.stdout.count("the first time it fails") == 2, "the output, and its last line"
    assert done.stdout.count("all is well") == 2
    assert "2 of 3 passes without a failure" in done.stdout


def test_the_busy_loops_are_there_and_end():
    done = repeated("--times", "1", "--loops", "2", command=[CHILDREN])
    assert done.returncode == 0, done.stdout
    loops = [int(word) for word in done.stdout.splitlines()[0].split(":")[-1].split()]
    assert len(loops) == 2
    assert not any(psutil.pid_exists(pid) for pid in loops)
