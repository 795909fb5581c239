"""A converted checkpoint loads in every layout, and what any layout saves converts back: every family, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_programs import PROGRAM
from safetensors.torch import load_file

from asympo_megatron.config import Config, override_config
from asympo_megatron.conversion import hf_to_megatron, megatron_to_hf
from asympo_megatron.conversion.hf_files import SINGLE
from asympo_megatron.mcore.marker import MARKER
from asympo_megatron.testing.megatron import run_ranks

pytestmark = pytest.mark.usefixtures("one_rank")

MakeHF = Callable[..., tuple[Any, Path]]
KINDS = ("qwen3", "qwen3-untied", "qwen2", "qwen2-untied", "llama", "llama3-rope", "mistral", "qwen3_moe")
# The models have two key and value heads: four tensor-parallel ranks share them.
LAYOUTS: dict[int, tuple[dict[str, Any], ...]] = {
    2: ({"tensor": 2}, {"pipeline": 2}),
    4: ({"tensor": 2, "pipeline": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2, "context": 2}, {"tensor": 4}),
}
MOE_LAYOUTS: dict[int, tuple[dict[str, Any], ...]] = {
    2: ({"expert": 2}, {"pipeline": 2}),
    4: ({"expert": 2, "pipeline": 2}, {"expert": 2, "tensor": 2, "sequence": True}),
}

INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
"""For models of four layers."""


def _cases(make_hf: MakeHF, tmp_path: Path, kinds: tuple[str, ...], ranks: int) -> dict[str, Any]:
    cases = {}
    for kind in kinds:
        _, source = make_hf(kind)
        base = Config()
        base.model.path = str(source)
        hf_to_megatron(override_config(base, []), source, tmp_path / f"{kind}-megatron")
        hf = json.loads((source / "config.json").read_text())
        interleaved = [INTERLEAVED] if hf["num_hidden_layers"] == 4 else []
        for layout in [*(MOE_LAYOUTS if "moe" in kind else LAYOUTS)[ranks], *interleaved]:
            name = "-".join([kind, *(f"{key}{value}" for key, value in layout.items())])
            cases[name] = {
                "kind": kind,
                "hf": hf,
                "parallel": layout,
                "source": str(tmp_path / f"{kind}-megatron"),
                "target": str(tmp_path / f"{name}-saved"),
            }
    return cases


def _check(make_hf: MakeHF, tmp_path: Path, kinds: tuple[str, ...], ranks: int) -> None:
    cases = _cases(make_hf, tmp_path, kinds, ranks)
    results = run_ranks(f"{PROGRAM}:reload", ranks, {"cases": cases}, timeout_s=420)
    for name, case in cases.items():
        wanted = json.loads((Path(case["source"]) / MARKER).read_text())["checksum"]
        assert [rank[name] for rank in results] == [wanted] * ranks, name
        megatron_to_hf(case["target"], tmp_path / f"{name}-back", model_files=tmp_path / case["kind"])
        one, other = (load_file(folder / SINGLE) for folder in (tmp_path / case["kind"], tmp_path / f"{name}-back"))
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_two_layouts_of_two_families(make_hf: MakeHF, tmp_path: Path) -> None:
    _check(make_hf, tmp_path, ("qwen2-untied", "qwen3_moe"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_in_every_layout(make_hf: MakeHF, tmp_path: Path, ranks: int) -> None:
    _check(make_hf, tmp_path, KINDS, ranks)
