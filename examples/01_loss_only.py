"""ASymPO in a plain PyTorch loop: two responses to one prompt, the first one right. Log-probs of no other policy."""

import torch

from asympo_megatron import ResponseBatch, build_objective, token_nll

hidden = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))  # positions that predict a response token
head = torch.nn.Parameter(torch.zeros(32, 16))
batch = ResponseBatch(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0.5, -0.5]), torch.tensor([4, 2]))
objective, optimizer = build_objective("asympo", nll_floor=1e-3), torch.optim.SGD([head], lr=0.1)
for _ in range(10):
    nll = token_nll(hidden, head, torch.tensor([3, 1, 4, 1, 5, 9]))
    print(f"right {nll[:4].mean().item():.3f}, wrong {nll[4:].mean().item():.3f} nats a token")
    out = objective(nll, batch)
    optimizer.zero_grad()
    (out.loss_sum / out.normalizer_count).backward()
    optimizer.step()
