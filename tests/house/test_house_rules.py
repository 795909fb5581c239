"""What the repository promises about itself: sizes, links, names that scripts rely on."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_PACKAGE_LINES = 325
MAX_TEST_LINES = 400
MAX_README_LINES = 150
SELF = Path(__file__).resolve()


def tracked(*patterns):
    """Files of the repository, those not committed yet included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_no_source_file_is_too_long():
    long = {}
    for path in tracked("*.py"):
        lines = len(path.read_text().splitlines())
        name = path.relative_to(ROOT)
        if lines > (MAX_TEST_LINES if name.parts[0] == "tests" else MAX_PACKAGE_LINES):
            long[str(name)] = lines
    assert long == {}


def test_files_of_different_test_folders_do_not_hide_each_other():
    """Test folders share one import path: names are unique, and nothing imports from a conftest."""
    files = [path for path in tracked("tests/*.py") if path.name != "conftest.py"]
    names = [path.name for path in files]
    assert sorted(set(names)) == sorted(names)
    words = re.compile(r"^(from|import) conftest\b", flags=re.MULTILINE)
    assert [str(path) for path in files if words.search(path.read_text())] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < MAX_README_LINES


def test_every_relative_link_leads_somewhere():
    broken = []
    pages = tracked("*.md")
    assert len(pages) > 5
    for page in pages:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
            address, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            goal = (page.parent / address).resolve() if address else page
            if not goal.exists() or (anchor and anchor not in anchors(goal)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_contents_lists_every_page():
    listed = set(re.findall(r"\]\(([a-z_]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_no_path_of_a_machine_and_no_secret_place():
    found = []
    pattern = re.compile(r"/(?:work|root|home/\w+|opt/wheels|opt/pypi)/[\w.]")
    for path in tracked("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.sh", "*.sbatch", "*.cff", "*.txt", "Makefile"):
        if path != SELF and pattern.search(path.read_text()):
            found.append(str(path.relative_to(ROOT)))
    assert found == []


def test_no_test_sleeps():
    """Tests wait for what they need (polling.wait_until for facts of other processes), however busy the machine is.

    Free are a step of the loop (``sleep(0)``) and a virtual clock.
    """
    found, virtual = [], []
    for path in tracked("tests/*.py"):
        text = path.read_text()
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and is_sleep(node)]
        if calls and "run_virtual" in text:
            virtual.append(path.name)
            calls = [node for node in calls if ast.unparse(node.func) != "asyncio.sleep"]
        found += [f"{path.relative_to(ROOT)}:{node.lineno}" for node in calls]
    assert virtual, "the search finds nothing at all"
    assert found == []


def is_sleep(call):
    return ast.unparse(call.func).split(".")[-1] == "sleep" and ast.unparse(call.args[0]) != "0"


def test_the_configuration_page_is_current():
    program = [sys.executable, str(ROOT / "tools" / "config_reference.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_make_target_that_scripts_rely_on_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    promised = {"setup", "quickstart", "test", "check", "lattice", "test-sglang", "test-slow", "gpu-smoke", "docs"}
    assert promised <= targets


def test_make_targets_run_in_a_fresh_clone():
    """Each one that needs the environment depends on the stamp that builds it."""
    text = (ROOT / "Makefile").read_text()
    for target in ("test", "check", "lattice", "test-sglang", "test-slow", "gpu-smoke", "docs"):
        assert re.search(rf"^{target}: setup\b", text, flags=re.MULTILINE), target
    assert re.search(r"^quickstart: \$\(RUN_STAMP\)", text, flags=re.MULTILINE)


def test_torch_is_never_a_build_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not any("torch" in requirement for requirement in project["build-system"]["requires"])
    assert {"cpu", "tasks", "te", "bridge", "wandb", "tensorboard", "dev"} <= project["project"][
        "optional-dependencies"
    ].keys()


PINNED_NAMES = (
    "train/J",
    "train/loss",
    "train/grad_norm",
    "train/nll_pos",
    "train/nll_neg",
    "train/entropy",
    "train/tokens_per_s",
    "train/weights_checksum",
    "reward/mean",
    "eval/accuracy",
    "lag/mean",
    "lag/max",
    "rollout/in_flight",
    "rollout/tokens_per_s",
    "sync/seconds",
    "sync/version",
    "time/step_s",
    "time/wait_s",
)


def test_every_pinned_metric_is_written_by_somebody():
    """Scripts rely on these names in metrics.jsonl."""
    source = "\n".join(p.read_text() for p in (ROOT / "asympo_megatron").rglob("*.py") if "metrics" not in p.parts)
    missing = [name for name in PINNED_NAMES if not written(name, source)]
    assert missing == []


def written(name, source):
    """Learner figures get their prefix `train/` where the row is made; the rest is written in full."""
    return (
        f'"{name}"' in source
        or (name.startswith("train/") and f'"{name.removeprefix("train/")}"' in source)
        or (name in ("train/nll_pos", "train/nll_neg") and 'f"nll_{sign}"' in source)
    )
