"""A real, unmodified SGLang on a machine without a GPU, in an environment of its own.

    python tools/sglang_cpu_env build                 makes .venv-sglang (again: nothing to do)
    python tools/sglang_cpu_env serve MODEL_DIR       starts one server in the foreground
    python tools/sglang_cpu_env serve MODEL_DIR --port 30000 -- --max-running-requests 8

SGLang pins other versions of transformers and tokenizers than the trainer uses, here as on a GPU cluster: the two never
share an environment, they talk HTTP. Everything is pinned: requirements.txt, requirements-nodeps.txt (sglang itself
and what its text path needs, without the GPU packages they ask for) and constraints-cpu.txt (the CPU build of torch).
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEFAULT = ROOT / ".venv-sglang"
PINS = (ROOT / "constraints-cpu.txt", HERE / "requirements.txt", HERE / "requirements-nodeps.txt")
SHIM = HERE / "shim" / "asympo_sglang_shim.py"
STAMP = ".built-from"
IMPORTS = "import sglang, sglang.launch_server, sglang.srt.managers.scheduler, sglang.srt.models.qwen3"
PYTHONS = ((3, 11), (3, 12), (3, 13))


class BuildError(RuntimeError):
    """The environment could not be built; the message says what to do."""


def build(target: Path, pip_args: list[str]) -> Path:
    """Make the environment unless it is there already, from these very pins; returns its Python."""
    python = target / "bin" / "python"
    stamp = target / STAMP
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        install_shim(python)
        print(f"{target} is complete.")
        return python
    if sys.version_info[:2] not in PYTHONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise BuildError(
            f"this is Python {sys.version.split()[0]}; sglang 0.5.23 is pinned for {known}. Use one of these."
        )
    if target.exists() and not (target / "pyvenv.cfg").is_file():
        raise BuildError(f"{target} is there and is no virtual environment. Name another directory: build --path DIR.")
    print(f"building {target}; about 1 GB, some minutes ...", flush=True)
    stamp.unlink(missing_ok=True)
    venv.create(target, with_pip=True, clear=target.exists())
    pip = [str(python), "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check", *pip_args]
    step("installing torch and the libraries", [*pip, "-c", str(PINS[0]), "torch", "-r", str(PINS[1])])
    step("installing sglang", [*pip, "--no-deps", "-r", str(PINS[2])])
    install_shim(python)
    # Without its compiled bytecode every process of every server would compile sglang anew: a minute each.
    step("importing sglang", [str(python), "-W", "ignore", "-c", IMPORTS])
    stamp.write_text(wanted)
    print(f"{target} is complete: rollout.engine=sglang finds it there.")
    return python


def fingerprint() -> str:
    """What the environment is made from; another one is built anew."""
    digest = hashlib.sha256()
    for path in PINS:
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} python {sys.version_info[0]}.{sys.version_info[1]}\n"


def install_shim(python: Path) -> None:
    """The import finder, loaded by every process of the environment, spawned ones included."""
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    shutil.copyfile(SHIM, site / SHIM.name)
    (site / "asympo_sglang_shim.pth").write_text(f"import {SHIM.stem}\n")


def step(what: str, command: list[str]) -> None:
    """One command of the build; its output is shown when it fails."""
    print(f"  {what} ...", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    if done.returncode:
        raise BuildError(
            f"{what} failed:\n{done.stdout[-3000:]}\nThe same command starts over. Further arguments of pip, such as "
            "an index of CPU builds of torch, go after --pip-args."
        )


def serve(target: Path, model: Path, host: str, port: int, arguments: list[str]) -> None:
    """Become an SGLang server."""
    from asympo_megatron.launch.sglang import ServerOptions, cpu_arguments, server_command

    options = ServerOptions(model, host, port, context_length=1024, dtype="float32", load_format="auto")
    python = build(target, [])
    command = server_command(python, options, [*cpu_arguments(1024), *arguments])
    os.execve(command[0], command, {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def main() -> int:
    parser = argparse.ArgumentParser(prog="sglang_cpu_env", description="A real SGLang without a GPU.")
    parser.add_argument("--path", type=Path, default=DEFAULT, help="the environment (default: .venv-sglang)")
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="make the environment, once")
    building.add_argument("--pip-args", default="", help="further arguments of pip, as one string")
    serving = commands.add_parser("serve", help="start one server in the foreground")
    serving.add_argument("model", type=Path, help="Hugging Face directory")
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=30000)
    serving.add_argument("arguments", nargs="*", help="further arguments of sglang.launch_server, after --")
    given = parser.parse_args()
    try:
        if given.command == "build":
            build(given.path.resolve(), given.pip_args.split())
        else:
            serve(given.path.resolve(), given.model, given.host, given.port, given.arguments)
    except BuildError as error:
        print(f"sglang_cpu_env: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
