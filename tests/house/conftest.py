"""A place to run the scripts of examples/slurm and examples/bare, with stand-ins for Slurm and for the roles."""

import os
import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RECORD = '#!/usr/bin/env bash\nprintf "%q " "$(basename "$0")" "$@" >>"$RECORDED"\necho >>"$RECORDED"\n'

STAND_INS = {
    # Runs the script at once, once for each task of an array, and prints a job id. A job that depends on another waits.
    "sbatch": """#!/usr/bin/env bash
set -e
tasks=0
for argument in "$@"; do
  case $argument in --array=0-*) tasks=${argument#--array=0-} ;; esac
done
script=${*: -1}
if [[ $script == *"${REFUSED:-none}"* ]]; then
  echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2
  exit 1
fi
if [[ $* == *--dependency=* ]]; then
  printf '%s\\n' "$@" >"$RECORDED.waiting"
  exit
fi
export SLURM_CPUS_PER_TASK=32 SLURM_JOB_NODELIST='n[1-2]' SLURM_NNODES=2
for ((i = 0; i <= tasks; i++)); do
  code=0
  SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=$((70042 + i)) bash "$script" >&2 || code=$?
  echo "$code" >"$RECORDED.exit"
done
echo "${script##*/}-id"
""",
    # Lists the nodes, and requeues a job that runs.
    "scontrol": """#!/usr/bin/env bash
if [[ $1 == show ]]; then
  printf 'n1\\nn2\\n'
elif [[ ${STATE:-RUNNING} != RUNNING ]]; then
  exit 1
else
  echo "scontrol $*" >>"$RECORDED"
  echo COMPLETING >"$RECORDED.state"
fi
""",
    # The highest exit code of the tasks, as the real one.
    "srun": """#!/usr/bin/env bash
code=0
[[ $1 == --cpus-per-task=32 ]] || exit 3 # each task would have one core
for node in 0 1; do SLURM_NODEID=$node "${@:2}" || code=$?; done
exit "$code"
""",
    "hostname": "#!/usr/bin/env bash\necho host7\n",
    # The state of the job that asks, or the jobs of $QUEUE; without it, Slurm does not answer.
    "squeue": """#!/usr/bin/env bash
if [[ $* == *--jobs=* ]]; then
  cat "$RECORDED.state" 2>/dev/null || echo "${STATE:-RUNNING}"
elif [[ -n ${QUEUE+set} ]]; then
  printf '%s\\n' $QUEUE
else
  exit 1
fi
""",
    "scancel": RECORD,
    "asympo": RECORD,
    "trainer_python": RECORD + 'exit "${TRAINER_EXIT:-0}"\n',
    "sglang_python": RECORD,
}


@pytest.fixture
def world(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ASYMPO", "CUDA"))}
    return tmp_path, {
        **kept,
        "PATH": f"{programs}:{kept['PATH']}",
        "ASYMPO": str(programs / "asympo"),
        "PYTHON": str(programs / "trainer_python"),
        "JOURNAL_ROOT": str(tmp_path / "local"),
        "SGLANG_PYTHON": str(programs / "sglang_python"),
        "RECORDED": str(tmp_path / "recorded"),
    }
