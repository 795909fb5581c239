"""Versions in a spool: nothing is lost, nothing is misaligned, a large tensor travels alone, nothing stays behind."""

import mmap
import os
import weakref
from pathlib import Path

import pytest
import torch

from asympo_megatron.config import load_config
from asympo_megatron.errors import ConfigError, PublishError
from asympo_megatron.sync.bucket import split_bucket
from asympo_megatron.sync.spool import Spool, spool_version


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "slice": torch.randn(8, 6, generator=generator)[::2, 1:4],
        "large": torch.randn(40, 10, generator=generator),
        "empty": torch.empty(0, 4),
        "z": torch.arange(6).view(2, 3),
    }


def contents(spool: Spool) -> dict[str, torch.Tensor]:
    parts = [split_bucket(info, spool.bucket(number)) for number, info in enumerate(spool.buckets)]
    return {name: tensor for part in parts for name, tensor in part.items()}


def test_buckets_hold_every_tensor_bit_for_bit(tmp_path: Path) -> None:
    given = tensors()
    for largest in (1, 200, 1 << 20):
        got = contents(spool_version(given.items(), largest, tmp_path))
        assert list(got) == list(given)
        for name, tensor in given.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor), name


def test_buckets_larger_than_a_page_do_not_overlap() -> None:
    given = {f"t{number}": torch.full((mmap.PAGESIZE + number,), number, dtype=torch.uint8) for number in range(5)}
    got = contents(spool_version(given.items(), 2 * mmap.PAGESIZE))
    assert all(torch.equal(got[name], tensor) for name, tensor in given.items())


def test_a_bucket_has_one_dtype_and_keeps_its_size(tmp_path: Path) -> None:
    """SGLang refuses a tensor that begins at no multiple of its item size; one dtype a bucket cannot make one."""
    small = spool_version(tensors().items(), 200, tmp_path)
    assert all(len(set(info.dtypes)) == 1 for info in small.buckets)
    over = [info.names for number, info in enumerate(small.buckets) if small.bucket(number).nbytes > 200]
    assert over == [["large"]]
    assert [info.names for info in spool_version(tensors().items(), 1 << 20, tmp_path).buckets] == [
        ["a", "scalar"], ["half"], ["slice", "large", "empty"], ["z"],
    ]  # fmt: skip


def test_one_tensor_is_in_hand_at_a_time() -> None:
    """A tensor is written, and given up, before the next is gathered."""
    gathered: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def gather():  # type: ignore[no-untyped-def]
        for number in range(4):
            held.append(sum(tensor() is not None for tensor in gathered))
            tensor = torch.zeros(10)
            gathered.append(weakref.ref(tensor))
            yield f"t{number}", tensor
            del tensor

    assert len(spool_version(gather(), 80).buckets) == 2
    assert held == [0, 0, 0, 0]


def held(folder: Path) -> tuple[int, bool]:
    """Open files below a folder, and whether one is mapped."""
    links = [os.readlink(f"/proc/self/fd/{entry}") for entry in os.listdir("/proc/self/fd") if _open(entry)]
    return sum(link.startswith(str(folder)) for link in links), str(folder) in Path("/proc/self/maps").read_text()


def _open(entry: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{entry}")  # that of the listing itself is closed by now


def test_a_spool_ends_with_its_last_reference_and_leaves_no_file(tmp_path: Path) -> None:
    spool = spool_version(tensors().items(), 200, tmp_path)
    assert held(tmp_path) == (1, False)
    assert list(tmp_path.iterdir()) == [], "even after SIGKILL"
    sent = spool.bucket(0)
    del spool
    assert held(tmp_path)[1]
    assert torch.equal(sent[:60].view(torch.float32), tensors()["a"].view(-1)), "a bucket that is being sent stays"
    del sent
    assert held(tmp_path) == (0, False)


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="tensor a was given twice"):
        spool_version([("a", torch.zeros(1)), ("a", torch.ones(1))], 100, tmp_path)
    with pytest.raises(PublishError, match="no tensor was given"):
        spool_version([], 100, tmp_path)
    with pytest.raises(PublishError, match=r"could not be written to .*gone before it is sent.* Set sync\.spool_dir"):
        spool_version(tensors().items(), 100, tmp_path / "gone")
    with open("/dev/full", "wb") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", lambda **_: full)
        with pytest.raises(PublishError, match=r"No space left on device.* Set sync\.spool_dir"):
            spool_version(tensors().items(), 100, tmp_path)
        assert full.closed
    assert held(tmp_path) == (0, False)


def test_a_sender_on_the_network_needs_a_token() -> None:
    open_to_all = ["sync.transport=collective", "sync.host=10.0.0.7"]
    with pytest.raises(ConfigError, match=r"sync\.host=10\.0\.0\.7 opens .* Set rollout\.controller_token"):
        load_config("quickstart", open_to_all)
    assert load_config("quickstart", [*open_to_all, "rollout.controller_token=s"]).sync.host == "10.0.0.7"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.engine_urls=[http://127.0.0.1:1,http://10.0.0.7:30000]", r"engine_urls has http://10\.0\.0\.7:30000"),
        ("rollout.engine_host=0.0.0.0", r"rollout\.engine_host is 0\.0\.0\.0"),
    ],
)
def test_memory_is_shared_with_engines_of_this_machine_only(override: str, words: str) -> None:
    colocated = "sync.transport=colocated"
    with pytest.raises(ConfigError, match=rf"{words}\. Set sync\.transport to disk or collective"):
        load_config("quickstart", [colocated, override])
    load_config("quickstart", ["sync.transport=disk", override])
    load_config("quickstart", [colocated, "rollout.engine_urls=[http://localhost:1,http://127.0.0.1:2]"])
