"""Buckets of named tensors: nothing is lost, nothing is misaligned, a large tensor travels alone."""

import pytest
import torch

from asympo_megatron.config import load_config
from asympo_megatron.errors import ConfigError, PublishError
from asympo_megatron.sync.bucket import Bucket, fill_buckets, split_bucket


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


def test_buckets_hold_every_tensor_bit_for_bit() -> None:
    given = tensors()
    buckets = list(fill_buckets(given.items(), 200))
    got = {name: part for bucket in buckets for name, part in split_bucket(bucket.info, bucket.data).items()}
    assert list(got) == list(given)
    for name, tensor in given.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def test_a_bucket_has_one_dtype_and_keeps_its_size() -> None:
    """SGLang refuses a tensor that begins at no multiple of its item size; one dtype a bucket cannot make one."""
    buckets = list(fill_buckets(tensors().items(), 200))
    assert all(len(set(bucket.info.dtypes)) == 1 for bucket in buckets)
    over = [bucket for bucket in buckets if bucket.data.nbytes > 200]
    assert [bucket.info.names for bucket in over] == [["large"]]
    assert [bucket.info.names for bucket in fill_buckets(tensors().items(), 1 << 20)] == [
        ["a", "scalar"], ["half"], ["slice", "large", "empty"], ["z"],
    ]  # fmt: skip


def test_one_bucket_is_in_hand_at_a_time() -> None:
    """The next tensor is gathered only when the bucket before it has been handed over."""
    asked: list[int] = []

    def gather():  # type: ignore[no-untyped-def]
        for number in range(4):
            asked.append(number)
            yield f"t{number}", torch.zeros(10)

    first: Bucket = next(fill_buckets(gather(), 80))
    assert first.info.names == ["t0", "t1"]
    assert asked == [0, 1, 2]


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(PublishError, match="tensor a was given twice"):
        list(fill_buckets([("a", torch.zeros(1)), ("a", torch.ones(1))], 100))
    with pytest.raises(PublishError, match="no tensor was given"):
        list(fill_buckets([], 100))


def test_a_sender_on_the_network_needs_a_token() -> None:
    open_to_all = ["sync.transport=collective", "sync.host=10.0.0.7"]
    with pytest.raises(ConfigError, match=r"sync\.host=10\.0\.0\.7 opens .* Set rollout\.controller_token"):
        load_config("quickstart", open_to_all)
    assert load_config("quickstart", [*open_to_all, "rollout.controller_token=s"]).sync.host == "10.0.0.7"
