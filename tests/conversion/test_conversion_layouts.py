"""TP and PP change where weights lie, never which weights leave or arrive."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_programs import PROGRAM, build
from safetensors.torch import load_file

from asympo_megatron.conversion import load_hf
from asympo_megatron.conversion.hf_files import SINGLE
from asympo_megatron.testing.megatron import run_ranks


@pytest.mark.slow
def test_two_ranks_load_and_export_the_same_bits(
    one_rank: None, make_hf: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    cases: dict[str, Any] = {}
    sources = {kind: make_hf(kind)[1] for kind in ("qwen3", "qwen2-untied")}
    checksums = {}
    for kind, source in sources.items():
        hf = json.loads((source / "config.json").read_text())
        _, learner = build(hf)
        load_hf(learner, source)
        checksums[kind] = learner.checksum()
        from asympo_megatron.mcore import shutdown

        shutdown()
        for layout in ({"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}):
            name = f"{kind}-{'-'.join(layout) or 'data'}"
            target = str(tmp_path / f"{name}.safetensors")
            cases[name] = {"hf": hf, "parallel": layout, "source": str(source), "target": target}
    wrong = {**cases["qwen3-tensor"]["hf"], "num_hidden_layers": 4}
    cases["wrong"] = {**cases["qwen3-tensor"], "hf": wrong}
    ranks = run_ranks(f"{PROGRAM}:layouts", 2, {"cases": cases}, timeout_s=240)
    for kind, source in sources.items():
        wanted = load_file(source / SINGLE)
        for name in (name for name in cases if name.startswith(kind)):
            assert [rank[name]["checksum"] for rank in ranks] == [checksums[kind]] * 2, name
            got = load_file(cases[name]["target"])
            assert set(got) == set(wanted)
            assert all(torch.equal(got[key], wanted[key]) for key in wanted), name
            assert ranks[1][name]["shapes"] == {key: list(wanted[key].shape) for key in got}
    assert [("lack" in rank["wrong"]["error"]) for rank in ranks] == [True, True]
