"""Changes between two files: bit for bit, whatever the bits; small where little changed, never much larger than all."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from asympo_megatron.sync import delta_file, shard_file
from asympo_megatron.sync.delta_file import apply_changes, write_changes

DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def entries(file: Path) -> dict[str, np.ndarray]:
    with safe_open(file, "numpy") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118


def chain(folder: Path, versions: list[dict[str, Tensor]]) -> list[Path]:
    """Files of the versions, and of the changes from each to the next; returns the changes."""
    files = [folder / f"v{number}.safetensors" for number in range(len(versions))]
    for file, tensors in zip(files, versions, strict=True):
        save_file(tensors, file)
    changes = []
    for old, new in pairwise(files):
        changes.append(new.with_suffix(".delta"))
        assert write_changes(old, new, changes[-1])
    return changes


edits = st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), rounds=st.lists(edits, min_size=1, max_size=4), gap=st.sampled_from([1, 7, 65535])
)
def test_a_chain_of_any_edits_gives_the_bytes_of_the_last_version(folder, dtype, rounds, gap) -> None:
    """Edits of raw bytes: every pattern of every dtype occurs, NaNs with payloads among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_file, "_WIDEST_GAP", gap)
        patch.setattr(delta_file, "_CHUNK", 50)
        versions = [{"x": torch.zeros(600, dtype=torch.uint8), "y": torch.arange(600, dtype=torch.uint8)}]
        for changes in rounds:
            tensors = {name: tensor.clone() for name, tensor in versions[-1].items()}
            for position, value in changes:
                tensors["xy"[value % 2]][position] = value % 2 if dtype == torch.bool else value
            versions.append(tensors)
        if dtype == torch.bool:
            versions = [{"x": version["x"], "y": version["y"] % 2} for version in versions]
        typed = [{name: tensor.view(dtype) for name, tensor in version.items()} for version in versions]
        files = chain(folder, typed)
        made = folder / "made.safetensors"
        digest = apply_changes(folder / "v0.safetensors", files, made)
    wanted = (folder / f"v{len(rounds)}.safetensors").read_bytes()
    assert made.read_bytes() == wanted
    assert digest == hashlib.sha256(wanted).hexdigest()


def test_single_elements_are_found_at_both_ends_and_beyond_the_widest_gap(tmp_path: Path) -> None:
    old = torch.zeros(200_000, dtype=torch.bfloat16)
    new = old.clone()
    new[0], new[131_072], new[-1] = -0.0, float("nan"), 1.0
    (changes,) = chain(tmp_path, [{"x": old}, {"x": new}])
    held = entries(changes)
    positions = [0, 2, 65_537, 131_072, 134_464, 199_999]
    assert np.cumsum(held["gaps/x"].view(np.uint16), dtype=np.int64).tolist() == positions
    assert held["values/x"].tolist() == new.view(torch.int16)[positions].tolist()
    assert changes.stat().st_size < 300
    apply_changes(tmp_path / "v0.safetensors", [changes], tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == (tmp_path / "v1.safetensors").read_bytes()


def test_what_has_the_same_bits_is_left_out_and_only_that(tmp_path: Path) -> None:
    """A comparison by value would send the NaN, which equals nothing, and keep 0.0 for -0.0, which equals it."""
    old = {"nan": torch.full((9,), float("nan")), "zero": torch.zeros(9), "same": torch.ones(9), "none": torch.empty(0)}
    zero = torch.zeros(9)
    zero[4] = -0.0
    (changes,) = chain(tmp_path, [old, old | {"zero": zero}])
    assert set(entries(changes)) == {"gaps/zero", "values/zero"}


def test_a_tensor_that_changed_wholly_is_stored_whole(tmp_path: Path) -> None:
    """bf16: an entry takes 4 bytes, an element 2; so up to half of the elements pay."""
    old = {"x": torch.zeros(1000, dtype=torch.bfloat16), "y": torch.zeros(1000, dtype=torch.bfloat16)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["x"][: 2 * 500 : 2], new["y"][:501] = 1.0, 1.0
    changes = chain(tmp_path, [old, new, old])
    assert {name: data.nbytes for name, data in entries(changes[0]).items()} == {
        "gaps/x": 1000,
        "values/x": 1000,
        "whole/y": 2000,
    }
    apply_changes(tmp_path / "v0.safetensors", changes[:1], tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == (tmp_path / "v1.safetensors").read_bytes()
    apply_changes(tmp_path / "v0.safetensors", changes, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "v0.safetensors").read_bytes()


def test_an_element_changed_after_its_tensor_came_whole(tmp_path: Path) -> None:
    first = torch.zeros(1000)
    second = torch.ones(1000)
    third = second.clone()
    third[17] = 5.0
    changes = chain(tmp_path, [{"x": first}, {"x": second}, {"x": third}])
    apply_changes(tmp_path / "v0.safetensors", changes, tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == (tmp_path / "v2.safetensors").read_bytes()


@pytest.mark.parametrize(
    "other", [{"x": torch.zeros(3, 2)}, {"y": torch.zeros(6)}, {"x": torch.zeros(6), "y": torch.zeros(1)}]
)
def test_files_of_other_tensors_are_not_compared(tmp_path: Path, other: dict[str, Tensor]) -> None:
    save_file({"x": torch.zeros(6)}, tmp_path / "old")
    save_file(other, tmp_path / "new")
    assert not write_changes(tmp_path / "old", tmp_path / "new", tmp_path / "changes")
    assert not (tmp_path / "changes").exists()


def test_mutant_that_compares_values_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain test would be worth nothing if it passed with floats compared."""
    monkeypatch.setattr(delta_file, "_INTEGERS", {4: np.float32})
    old, new = torch.zeros(9), torch.zeros(9)
    new[4] = -0.0
    (changes,) = chain(tmp_path, [{"x": old}, {"x": new}])
    apply_changes(tmp_path / "v0.safetensors", [changes], tmp_path / "made")
    assert (tmp_path / "made").read_bytes() != (tmp_path / "v1.safetensors").read_bytes()


def test_the_names_of_two_entries_a_tensor_find_room_before_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file too large to be held back leaves room for its header first; short names grow most."""
    monkeypatch.setattr(shard_file, "HELD_BYTES", 0)
    old = {f"{number:x}": torch.zeros(1000 + number) for number in range(1500)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for tensor in new.values():
        tensor[::3] = 1.0
    (changes,) = chain(tmp_path, [old, new])
    assert len(entries(changes)) == 3000
    apply_changes(tmp_path / "v0.safetensors", [changes], tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == (tmp_path / "v1.safetensors").read_bytes()
