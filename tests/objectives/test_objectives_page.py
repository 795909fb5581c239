"""docs/objectives.md: every block runs, and its plain PyTorch loss is the package's ASymPO."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives import OBJECTIVES, ASymPO, penalize_kl
from asympo_megatron.parallel import token_nll

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_block_of_the_page_runs_in_order():
    namespace = {}
    for number, block in enumerate(blocks()):
        exec(compile(block, f"{PAGE.name} block {number}", "exec"), namespace)
    assert "Tempered" in namespace


def test_plain_pytorch_loss_is_the_packages():
    lines = [line for line in blocks()[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    namespace = {}
    exec(blocks()[0], namespace)
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(5, 7, 11, generator=generator)).requires_grad_()
    tokens = torch.randint(0, 11, (5, 7), generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    mask[2] = False
    advantage = torch.randn(5, generator=generator)
    plain = namespace["asympo_loss"](logits, tokens, mask, advantage)
    (want,) = torch.autograd.grad(plain, logits)
    # The package sees packed hidden states; with the identity as output layer they are the logits.
    nll_T = token_nll(logits.flatten(0, 1), torch.eye(11), tokens.flatten())
    ids = torch.where(mask, torch.arange(5)[:, None], -1).flatten()
    out = ASymPO()(nll_T, ResponseBatch(ids, advantage, mask.sum(1)))
    torch.testing.assert_close(out.loss_sum / out.normalizer_count, plain, rtol=1e-6, atol=1e-7)
    (got,) = torch.autograd.grad(out.loss_sum / out.normalizer_count, logits)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_the_page_names_every_objective_and_metric():
    text = PAGE.read_text()
    for name in OBJECTIVES:
        assert f"`{name}`" in text
    logprob_T = torch.tensor([-1.0])
    batch = ResponseBatch(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1]), logprob_T, logprob_T, logprob_T)
    for kind in OBJECTIVES.values():
        objective = penalize_kl(kind(), 0.1)
        scored = replace(batch, statistics=objective.statistics([batch]))
        for metric in objective(torch.ones(1), scored).metrics:
            stem = re.sub(r"_(pos|neg)$", "", metric)
            assert metric in text or f"{stem}_{{pos,neg}}" in text, metric
