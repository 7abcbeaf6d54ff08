"""Are the one-file GPT and the composed decoder one model, and what does composing cost?

Difference. Both models get the same weights: every matrix N(0, 1 / d_model) (2 to 9 times the spread that training
starts from, so that no part of the model is negligible), norms' gains and biases moved by N(0, 0.2²). Per shape,
kernel and seed, in fp32:

    logits      ‖a - b‖ / ‖b‖ over all logits of a batch (Euclidean norm, b: nano)
    gradients   ‖a - b‖ / ‖b‖ over the gradients of all parameters joined

The rounding of fp32 itself, nano in fp32 against nano in fp64, stands beside it: where the two are alike, the models
differ in the order of sums and in nothing else.

Time. One training step (loss, backward, fused AdamW) of nanoGPT's CPU shape, nano and composed in turn in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

import torch

from sky_core.bench.record import Record, arguments, run_script
from sky_core.components.attention import Naive, Sdpa
from sky_core.components.layers import GELU, LayerNorm
from sky_core.components.model import Decoder
from sky_core.components.position import Learned
from sky_core.model.nano import GPT, Config

SHAPES = [
    Config(vocab_size=11, max_length=8, n_layer=1, n_head=1, d_model=16),
    Config(vocab_size=37, max_length=24, n_layer=3, n_head=4, d_model=32),
    Config(vocab_size=65, max_length=64, n_layer=4, n_head=4, d_model=128, bias=False),  # nanoGPT on a CPU
    Config(vocab_size=257, max_length=96, n_layer=12, n_head=2, d_model=64),
    Config(vocab_size=65, max_length=256, n_layer=6, n_head=6, d_model=384, bias=False),  # nanoGPT on a GPU
]
KERNELS = {"naive": Naive(), "sdpa": Sdpa()}


def nano(config: Config, seed: int) -> GPT:
    """A one-file GPT with large random weights."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=config.d_model**-0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def composed_from(model: GPT, kernel: Naive | Sdpa) -> torch.nn.Module:
    """The composed decoder with the choices and the weights of `model`."""
    c = model.config
    decoder = Decoder(
        n_layer=c.n_layer, n_head=c.n_head, d_model=c.d_model, max_length=c.max_length, bias=c.bias,
        position=(Learned(),), norm=LayerNorm(bias=c.bias), feedforward=(GELU(),), kernel=kernel,
    ).build(c.vocab_size)  # fmt: skip
    decoder.load_state_dict({_name(name): tensor for name, tensor in model.state_dict().items()})
    return decoder


def _name(name: str) -> str:
    return name.replace("embed_positions.", "positions.0.embed_positions.")


def composed_loss(model: torch.nn.Module, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    return model.nll(model.hidden(tokens_BT), targets_BT) / targets_BT.numel()


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """All gradients joined, in the order of the one-file GPT's names."""
    model.zero_grad()
    loss.backward()
    named = sorted((name.replace("positions.0.", ""), p.grad) for name, p in model.named_parameters())
    return torch.cat([grad.flatten() for _, grad in named])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


def difference(config: Config, kernel: str, seed: int) -> dict[str, object]:
    """Composed against nano, and nano's own rounding, for one shape, kernel and seed."""
    one_file = nano(config, seed)
    composed = composed_from(one_file, KERNELS[kernel])
    tokens_BT = torch.randint(config.vocab_size, (2, config.max_length + 1))
    batch = tokens_BT[:, :-1], tokens_BT[:, 1:]
    logits_BTV = one_file(batch[0])
    grad = gradient(one_file, one_file.loss(*batch))
    logits = relative(composed(batch[0]), logits_BTV)
    gradients = relative(gradient(composed, composed_loss(composed, *batch)), grad)
    exact = one_file.double()
    return {
        "layers": config.n_layer, "heads": config.n_head, "width": config.d_model, "length": config.max_length,
        "bias": config.bias, "kernel": kernel, "seed": seed, "logits": logits, "gradients": gradients,
        "fp32_rounding_of_logits": relative(logits_BTV.double(), exact(batch[0])),
        "fp32_rounding_of_gradients": relative(grad.double(), gradient(exact, exact.loss(*batch))),
    }  # fmt: skip


def step_times(config: Config, kernel: str, steps: int, batch: int = 12) -> dict[str, list[float]]:
    """Milliseconds of `steps` training steps of each model, in turn (after 5 of each that are not counted)."""
    one_file = GPT(config)
    composed = composed_from(one_file, KERNELS[kernel])
    contenders: dict[str, tuple[torch.nn.Module, Callable[..., torch.Tensor]]] = {
        "nano": (one_file, one_file.loss),
        "composed": (composed, lambda *batch: composed_loss(composed, *batch)),
    }
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for name, (model, _) in contenders.items()
    }
    tokens_BT = torch.randint(config.vocab_size, (batch, config.max_length + 1))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(steps + 5):
        order = list(contenders)[:: 1 if step % 2 else -1]
        for name in order:
            started = time.perf_counter()
            loss = contenders[name][1](tokens_BT[:, :-1], tokens_BT[:, 1:])
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: values[5:] for name, values in times.items()}


def main() -> None:
    parser = arguments("nano_parity", __doc__)
    parser.add_argument("--seeds", type=int, default=5, help="random weights per shape (default: 5)")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each model (default: 100)")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps = 1, 2
    shapes = SHAPES[:2] if options.smoke else SHAPES
    seeds = list(range(options.seeds))
    record = Record(options, what="nano.py and the composed decoder with the same weights, fp32", seeds=seeds)

    rows = [difference(config, kernel, seed) for config, kernel, seed in product(shapes, KERNELS, seeds)]
    for what in ("logits", "gradients"):
        worst = max(rows, key=lambda row: row[what])
        rounding = max(row[f"fp32_rounding_of_{what}"] for row in rows)
        record.measure(
            f"largest relative difference of {what}", worst[what], "", at_most=1e-6, peer=("fp32 rounding", rounding)
        )
    times = {kernel: step_times(shapes[-1 if options.smoke else 2], kernel, options.steps) for kernel in KERNELS}
    for kernel, by_model in times.items():
        record.measure(f"training step of nano (beside {kernel})", by_model["nano"], "ms")
        record.measure(f"training step of the composed decoder, {kernel}", by_model["composed"], "ms")
        ratios = [ours / theirs for ours, theirs in zip(by_model["composed"], by_model["nano"], strict=True)]
        record.measure(f"time of the composed decoder over nano's, {kernel}", ratios, "times")
    record.save(runs=rows, step_ms=times)


if __name__ == "__main__":
    run_script(main)
