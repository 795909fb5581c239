"""Token NLL without [T, V] logits: peak memory, time and gradient against log-softmax and gather in the same run.

    python benchmarks/token_nll.py [--quick] [--save]
    python benchmarks/token_nll.py --device cuda

On CPU: one thread, float32, V 151,936, T 4,096, H 512. Every run at full size is a process of its own, so that its peak
is its own; "extra" is what it takes beyond inputs and the gradient of the weight. Ratios of time are of CPU time.
"single_pass" is fused_objective_loss on responses that fit into a chunk, "single_pass_scratch" on longer ones.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import harness
import token_nll_forms as forms
import torch

VOCAB, TOKENS, HIDDEN = 151_936, 4_096, 512
MEMORY_GOAL, TIME_GOAL, PARITY_GOAL = 1 / 30, 1.0, 1e-6
CHUNK, RESPONSE = 256, 1024
"""Of the single passes: tokens of one chunk of logits, and of a response that does not fit into it; shorter ones fill
a chunk each."""

CHILDREN: dict[str, forms.Form] = {
    "naive": forms.naive,
    "tiled": forms.tiled,
    "tiled_with_entropy": forms.tiled_with_entropy,
    "single_pass": partial(forms.single_pass, response=CHUNK, chunk=CHUNK),
    "single_pass_scratch": partial(forms.single_pass, response=RESPONSE, chunk=CHUNK),
}


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        from token_nll_cuda import run

        return run(arguments.quick, arguments.save)
    torch.set_num_threads(1)
    report = harness.Report("token_nll_quick" if arguments.quick else "token_nll", save=arguments.save)
    vocab, tokens, rounds, pair_tokens = (32_768, 1_024, 1, 512) if arguments.quick else (VOCAB, TOKENS, 3, 256)
    parity(report, vocab)
    whole_runs(report, vocab, tokens, rounds)
    pairs(report, vocab, pair_tokens)
    return report.finish()


def parity(report: harness.Report, vocab: int, tokens: int = 256) -> None:
    """Relative L2 error of both gradients against the naive form in float64."""
    values = forms.inputs(tokens, vocab, HIDDEN)
    exact = forms.naive(*(value.double() if value.is_floating_point() else value for value in values))
    for name in ("naive", "tiled"):
        for which, got, want in zip(("hidden", "weight"), CHILDREN[name](*values), exact, strict=True):
            error = float((got.double() - want).norm() / want.norm())
            facts = {"tokens": tokens, "vocab": vocab}
            if name == "tiled":
                report.at_most(f"token_nll/grad_error_{which}", error, "relative", PARITY_GOAL, **facts)
            else:
                report.show(f"token_nll/naive_grad_error_{which}", error, "relative", **facts)


def whole_runs(report: harness.Report, vocab: int, tokens: int, rounds: int) -> None:
    """Each form in a fresh process, in turn; those that are not judged once."""
    runs = {name: [] for name in CHILDREN}
    for number in range(rounds):
        for name in CHILDREN if number == 0 else ("naive", "tiled"):
            runs[name].append(harness.measure_in_child(prepare, name, vocab, tokens))
    gradient_bytes = 4 * vocab * HIDDEN
    extra = {name: statistics.median(r.extra_peak_bytes - gradient_bytes for r in done) for name, done in runs.items()}
    for name, done in runs.items():
        facts = {"tokens": tokens, "vocab": vocab, "runs": len(done)}
        report.show(f"token_nll/{name}_extra", extra[name] / 2**20, "MiB", **facts)
        report.show(f"token_nll/{name}_cpu", statistics.median(run.cpu_s for run in done), "s", **facts)
    for name in runs:
        if name == "naive":
            continue
        facts = {"tokens": tokens, "vocab": vocab, "runs": len(runs[name])}
        memory = extra[name] / extra["naive"]
        time = statistics.median(a.cpu_s / b.cpu_s for a, b in zip(runs[name], runs["naive"], strict=False))
        judged = report.at_most if name == "tiled" else lambda *words, **more: report.show(*words[:3], **more)
        if tokens == TOKENS:
            judged(f"token_nll/{name}_memory_ratio", memory, "of naive", MEMORY_GOAL, **facts)
        else:  # one tile is a large part of logits this small
            report.show(f"token_nll/{name}_memory_ratio", memory, "of naive", **facts)
        judged(f"token_nll/{name}_time_ratio", time, "of naive", TIME_GOAL, **facts)


def pairs(report: harness.Report, vocab: int, tokens: int) -> None:
    """Ratios of time from many pairs in this process, with fewer tokens.

    Enough of them that naive's [T, V] are above 32 MiB: as at full size, malloc then returns them to the system, and
    fresh pages are part of the cost.
    """
    values = forms.inputs(tokens, vocab, HIDDEN)
    call: Callable[[str], Callable[[], object]] = lambda name: lambda: CHILDREN[name](*values)  # noqa: E731
    against_naive = harness.measure_pairs(call("tiled"), call("naive"))
    floor = harness.measure_pairs(lambda: forms.four_products(values[0], values[1]), call("naive"))
    single = harness.measure_pairs(call("single_pass"), call("tiled"))
    facts = {"tokens": tokens, "vocab": vocab, "pairs": harness.MIN_PAIRS}
    report.at_most("token_nll/tiled_time_ratio", against_naive.ratio, "of naive", TIME_GOAL, **facts)
    report.show("token_nll/four_products_time_ratio", floor.ratio, "of naive", **facts)
    report.show("token_nll/single_pass_time_ratio", single.ratio, "of tiled", **facts)


def prepare(name: str, vocab: int, tokens: int) -> Callable[[], float]:
    """The call to measure in a child process."""
    torch.set_num_threads(1)
    values = forms.inputs(tokens, vocab, HIDDEN)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # loads the library of products before memory is counted

    def call() -> float:
        grad_hidden, grad_weight = CHILDREN[name](*values)
        return float(grad_hidden.sum() + grad_weight.sum())

    return call


if __name__ == "__main__":
    sys.exit(main())
