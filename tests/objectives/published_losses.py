"""The published losses, response by response, differentiable by autograd: slow twins of the objectives.

Everything a paper holds constant is a float or detached here; nothing is imported from the package.
"""

import math

import torch
from torch import Tensor


def published_loss(name, case, theta: Tensor, kl=None, **options) -> Tensor:
    """The loss of the global batch, with ``kl = (coefficient, estimator)`` a penalty.

    Args:
        case: with theta -> NLLs, ids_T, advantage_R, behavior_T, proximal_T, reference_T.
        options: of the objective, ``normalizer`` and ``constant_tokens`` included where it has them.
    """
    nll_T = case.nll(theta)
    normalizer = options.get("normalizer", NORMALIZER.get(name, "responses"))
    kept = kept_tokens(case, **options) if name == "m2po" else None
    total, divisor = nll_T.sum() * 0, 0
    for row, advantage in enumerate(case.advantage_R.tolist()):
        at = (case.ids_T == row).nonzero().squeeze(1)
        divisor += len(at) if normalizer == "tokens" else 1
        if not len(at):
            continue
        length = {"responses": len(at), "tokens": 1, "constant": options.get("constant_tokens")}[normalizer]
        nll, mu, prox, reference = (x[at] for x in (nll_T, case.behavior_T, case.proximal_T, case.reference_T))
        if name in SIMPLE:
            terms = SIMPLE[name](nll, advantage, options)
        elif name in CORRECTIONS:
            weight = CORRECTIONS[name](prox - mu, options)
            terms = weight * ppo((-nll - prox).exp(), advantage, options)
        elif name == "m2po":
            terms = -torch.where(kept[at], (-nll - mu).exp() * advantage, 0.0)
        else:
            old = prox if options.get("old_logprobs") == "recompute" else mu
            terms = RATIO[name](-nll - old, nll, advantage, options)
        total = total + terms.sum() / length
        if kl is not None:
            total = total + penalty(-nll, reference, length, *kl)
    return total / divisor


def ppo(ratio, advantage, options):
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def penalty(logp, reference, length, coefficient, estimator):
    """Of one response. k1 is a reward: minus the coefficient times the response's log-ratio, held constant."""
    gap = reference - logp
    if estimator == "k3":
        return coefficient * (gap.exp() - 1 - gap).sum() / length
    if estimator == "k2":
        return coefficient * (gap * gap).sum() / (2 * length)
    value = -gap.sum() / length
    surrogate = value.detach() * logp.sum()
    return coefficient * (value.detach() + surrogate - surrogate.detach())


def kept_tokens(case, second_moment=0.04, all_tokens=False, **_):
    """M2PO's mask by the paper's loop: sort the candidates, drop from the top until the mean is small enough."""
    log_ratio = case.proximal_T - case.behavior_T
    candidates = []
    for t, row in enumerate(case.ids_T.tolist()):
        if row >= 0 and (all_tokens or float(log_ratio[t]) * float(case.advantage_R[row]) > 0):
            candidates.append((float(log_ratio[t]) ** 2, t))
    candidates.sort()
    while candidates and math.fsum(value for value, _ in candidates) / len(candidates) > second_moment:
        kept_still = candidates.pop()
        log_ratio[kept_still[1]] = math.nan  # a copy: see proximal_T - behavior_T
    return ~log_ratio.isnan()


def sequence(log_ratio):
    return float(log_ratio.detach().sum().exp())


def vespo(log_ratio, nll, advantage, options):
    side = "neg" if advantage < 0 else "pos"
    k, rate = options[f"k_{side}"], options[f"lambda_{side}"]
    weight = sequence(log_ratio)
    return weight**k * math.exp(rate * (1 - weight)) * advantage * nll


def sapo(log_ratio, nll, advantage, options):
    tau = options["tau_pos"] if advantage > 0 else options["tau_neg"]
    return -4 / tau * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantage


def gspo(log_ratio, nll, advantage, options):
    return ppo(log_ratio.mean().exp(), advantage, options) * torch.ones_like(nll)


def cispo(log_ratio, nll, advantage, options):
    return log_ratio.exp().clamp(options["ratio_min"], options["ratio_max"]).detach() * advantage * nll


def topr(log_ratio, nll, advantage, options):
    return (min(sequence(log_ratio), 1.0) if advantage < 0 else 1.0) * advantage * nll


def asympo(nll, advantage, options):
    mean = float(nll.detach().mean())
    return advantage * nll / max(mean, options["nll_floor"])


def mis(log_weight, options):
    weight = math.exp(float(log_weight.mean() if options.get("geometric") else log_weight.sum()))
    return weight if weight <= options["weight_max"] else 0.0


def icepop(log_weight, options):
    weight = log_weight.exp()
    return torch.where((weight >= options["weight_min"]) & (weight <= options["weight_max"]), weight, 0.0)


def sft(nll, advantage, options):
    return nll


def reinforce(nll, advantage, options):
    return advantage * nll


def spo(nll, advantage, options):
    return (options["negative_scale"] if advantage < 0 else 1.0) * advantage * nll


def asymre(nll, advantage, options):
    return (advantage - options["delta"]) * nll


def opmd(nll, advantage, options):
    return advantage * nll / (1 + options["tau"])


def grpo(log_ratio, nll, advantage, options):
    return ppo(log_ratio.exp(), advantage, options)


def decoupled_ppo(log_weight, options):
    return log_weight.exp()


def tis(log_weight, options):
    return log_weight.exp().clamp(max=options["weight_max"])


NORMALIZER = {"sft": "tokens", "dapo": "tokens", "cispo": "tokens", "vespo": "tokens", "m2po": "tokens"}
SIMPLE = {"sft": sft, "reinforce": reinforce, "spo": spo, "asymre": asymre, "opmd": opmd, "asympo": asympo}
RATIO = {"grpo": grpo, "dr_grpo": grpo, "dapo": grpo, "gspo": gspo, "cispo": cispo, "sapo": sapo}
RATIO |= {"vespo": vespo, "topr": topr}
CORRECTIONS = {"decoupled_ppo": decoupled_ppo, "tis": tis, "icepop": icepop, "mis": mis}
