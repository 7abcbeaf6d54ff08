# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Closer to modern LLMs, one change at a time
#
# Notebook 1 ended with GPT-2's decoder of 2019. This one walks from there to the decoder of Llama, Qwen3 and
# DeepSeek-V3. Every section takes **one** change, writes it out in a few lines of PyTorch, asserts that this is what
# the laboratory's part computes (and prints the file to open), then trains with it and measures what it brought:
# loss, speed, bytes of cache, parameters.
#
# | section | the change | what is shown |
# |---|---|---|
# | 0 | none: where notebook 1 ended | the yardstick, and how far two seeds lie apart |
# | 1 | RMSNorm | LayerNorm without its mean |
# | 2 | RoPE | scores know distances; what happens past the context of training |
# | 3 | SwiGLU | a gate for as many parameters |
# | 4 | grouped queries | the cache shrinks |
# | 5 | QK-norm and caps | how large a score can get |
# | 6 | Muon, and WSD | a step with all singular values one |
# | 7 | a longer context | who gains from it |
# | 8 | mixture of experts | more parameters, equally many used; who does the work |
# | 9 | value embeddings, residual scalars, multi-token prediction | three that must earn their place |
# | 10 | muP | the best learning rate over the width |
# | 11 | the whole recipe | nanoGPT's budget again |
# | 12 | drafting | the same text in fewer passes |
# | 13 | a Hugging Face checkpoint | written, opened by hand, loaded, taken apart |
# | 14 | what was learned | every claim with its number |
#
# **How to read the names.** A suffix tells a tensor's shape: `x_BTD` has the axes
# B batch, T time (characters), D width of the model; and S keys, H heads, G key/value heads, E width of a head,
# F = E/2 planes, V vocabulary, L layers, X experts, K chosen ones, N characters or windows of a text.
#
# **How to run it.** `python tools/notebooks.py run 02` (about a quarter of an hour on two cores). `SKY_DATA` names a
# folder with `tinyshakespeare/input.txt`. `SKY_NOTEBOOK=smoke` shrinks everything to seconds; what only a trained
# model can show is then not asserted, and the output says so.

# %%
import importlib.util
import inspect
import io
import json
import math
import os
import shutil
import statistics
import time
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Image, Markdown, display
from torch import nn

import sky_core
from sky_core.components.model import Decoder
from sky_core.components.optimization import WSD, AdamW, Cosine, Muon
from sky_core.data.dataset import Batch
from sky_core.model.context import Context
from sky_core.training.objective import MultiToken, NextToken

SEED = 1234
FULL = os.environ.get("SKY_NOTEBOOK", "full") == "full"
L, H, D = (4, 4, 128) if FULL else (2, 4, 32)  # nanoGPT's size for the CPU
T = 64 if FULL else 16  # the context
STEPS, CHARS = (300, 1024) if FULL else (4, 128)  # the budget of every entry: steps, characters a step

plt.rcParams |= {"figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams["figure.constrained_layout.use"] = True


def show(figure):
    """Put a figure into the page, whatever matplotlib's backend is."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    display(Image(buffer.getvalue(), format="png"))


def trained(claim):
    """Whether `claim`, which holds for trained models only, is asserted in this mode; says so where it is not."""
    if not FULL:
        print(f"smoke mode, not asserted: {claim}")
    return FULL


def where(*things):
    """The file and line of the laboratory's form of an idea."""
    root = Path(sky_core.__file__).parents[1]
    for thing in things:
        file, line = Path(inspect.getsourcefile(thing)).relative_to(root), inspect.getsourcelines(thing)[1]
        print(f"open {file}:{max(line, 1)}  {thing.__qualname__}")


# %% [markdown]
# ## 0. Where notebook 1 ended
#
# The same text, the same alphabet, the same split. A model is now described as a run file describes it, by a table of
# parts, and a change is one key of that table. This is GPT-2:

# %%
SHAKESPEARE = "SKY_DATA" in os.environ
if SHAKESPEARE:
    text = (Path(os.environ["SKY_DATA"]) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    print("text: tinyshakespeare")
else:
    from pydoc_data.topics import topics  # the language reference that every Python carries

    text = "\n".join(topics[name] for name in sorted(topics))
    print("text: Python's own documentation. SKY_DATA is not set, so nothing here compares with nanoGPT's number.")
if not (FULL and SHAKESPEARE):  # a smaller alphabet and, in smoke mode, a shorter text
    text = text if FULL else text[:20_000]
    rare = {character for character in set(text) if text.count(character) < 20}
    text = "".join(character for character in text if character not in rare)

from sky_core.tokenizer.char import CharTokenizer

tokenizer = CharTokenizer("".join(sorted(set(text))), byte_fallback=False, end_of_text=False)
V = tokenizer.vocab_size
ids_N = torch.tensor(tokenizer.encode(text))
border = int(0.9 * len(ids_N))  # nanoGPT's split
train_N, validation_N = ids_N[:border], ids_N[border:]

GPT2 = {
    "n_layer": L,
    "n_head": H,
    "d_model": D,
    "max_length": T,
    "norm": {"kind": "layernorm", "bias": False},
    "position": "learned",
    "feedforward": "gelu",
}


def build(table, seed=SEED):
    """The decoder that a table describes, with fresh weights."""
    torch.manual_seed(seed)
    return Decoder.model_validate(table).build(V)


model = build(GPT2)
assert model.n_parameters()["total"] == V * D + T * D + L * 12 * D**2 + (2 * L + 1) * D  # notebook 1's formula
print(f"{len(text):,} characters, {V} different; {model.n_parameters()['total']:,} parameters")
where(Decoder, type(model))

# %% [markdown]
# `train` is the trainer's loop without what surrounds it: windows from random places, the laboratory's optimizer and
# schedule, an objective. Every entry of the ladder gets the same steps, characters, order of data and seed, and the
# same learning rate as long as the optimizer is the same. It is measured on the whole validation split, in windows of
# the context.


# %%
ADAMW = AdamW(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
COSINE = Cosine(warmup=0.1, final=0.1)


def windows(generator, length):
    """CHARS characters from random places: (inputs x_BT, targets y_BT)."""
    start_B1 = torch.randint(len(train_N) - length, (CHARS // length, 1), generator=generator)
    window_BT = train_N[start_B1 + torch.arange(length + 1)]
    return window_BT[:, :-1], window_BT[:, 1:]


def train(model, optimizer=ADAMW, schedule=COSINE, steps=STEPS, length=T, seed=SEED, objective=None):
    """Train in place; (loss of every step in nats per character, characters per second)."""
    objective, generator = objective or NextToken(), torch.Generator().manual_seed(seed)
    optimizers = optimizer.build(list(model.named_parameters()), model.lr_scale())
    groups = [group for one in optimizers for group in one.param_groups]
    peaks, multiplier = [group["lr"] for group in groups], schedule.build(steps)
    balanced = [module for module in model.modules() if hasattr(module, "after_step")]  # mixtures of experts
    curve, seconds = [], []
    model.train()
    for step in range(steps):
        begun = time.perf_counter()
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * multiplier(step)
        x_BT, y_BT = windows(generator, length)
        loss = objective(model, Batch(x_BT, y_BT))
        (loss.total / y_BT.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizers:
            one.step()
            one.zero_grad()
        for module in balanced:
            module.after_step(lambda load_X: load_X)
        curve.append((loss.parts.get("nll", loss.total) / y_BT.numel()).item())
        seconds.append(time.perf_counter() - begun)
    model.eval()
    return curve, CHARS / statistics.median(seconds)


@torch.no_grad()
def nll(model, length=T, part=1):
    """nll_NT in nats, in windows of `length` side by side: the whole validation split, or the first 1/part of it."""
    count = (len(validation_N) - 1) // length // part
    x_NT, y_NT = (z_N[: count * length].view(count, length) for z_N in (validation_N, validation_N[1:]))
    batches = zip(x_NT.split(16384 // length), y_NT.split(16384 // length), strict=True)
    return torch.cat([F.cross_entropy(model(x_BT).mT, y_BT, reduction="none") for x_BT, y_BT in batches])


@torch.no_grad()
def future_matters(model):
    """Whether the logits of the first half change when the second half does."""
    x_1T = validation_N[None, :T].clone()
    before = model(x_1T)[:, : T // 2]
    x_1T[:, T // 2 :] = (x_1T[:, T // 2 :] + 1) % V
    return not torch.allclose(model(x_1T)[:, : T // 2], before, atol=1e-5)


# %% [markdown]
# **How much is a difference worth?** The first entry runs with three seeds. What they lie apart is noise, and a
# single run cannot show a difference of that size. `verdict` says so wherever that is the case, and it is built into
# every line below.

# %%
ladder, models = {}, {}


def measure(name, table, seed=SEED, **options):
    """Build, check, train and measure one model; (its numbers, the model)."""
    model = build(table, seed)
    assert not future_matters(model)
    curve, speed = train(model, seed=seed, **options)
    loss, size = nll(model, options.get("length", T)).mean().item(), model.n_parameters()["total"]
    cache = model.new_cache(1).nbytes() // model.max_length
    print(f"{name}: {loss:.4f} nats, {speed:,.0f} characters/s,", end=" ")
    print(f"{cache:,} bytes of cache per character, {size:,} parameters")
    return {"loss": loss, "speed": speed, "cache": cache, "parameters": size, "curve": curve}, model


def entry(name, table, after=None, **options):
    """One entry of the ladder, and how it stands against the entry `after`."""
    ladder[name], models[name] = measure(name, table, **options)
    if after is not None:
        print(f"    against {after!r}: {verdict(ladder[after]['loss'], ladder[name]['loss'])}")


def verdict(before, now):
    """A difference in words; within the spread of the seeds there is none to speak of."""
    if abs(now - before) < NOISE:
        return f"{now - before:+.4f} nats, which is within the noise"
    return f"{now - before:+.4f} nats, {'a gain' if now < before else 'a loss'}"


entry("0 GPT-2", GPT2)
again = [measure(f"another seed, {seed}", GPT2, seed=seed)[0]["loss"] for seed in ((1, 2) if FULL else (1,))]
of_seeds = [ladder["0 GPT-2"]["loss"], *again]
NOISE = max(0.01, max(of_seeds) - min(of_seeds))  # notebook 1's recipe had 0.012 between three seeds
assert ladder["0 GPT-2"]["cache"] == 2 * L * D * 4  # keys and values, L layers, D numbers of four bytes
print(f"seeds lie {max(of_seeds) - min(of_seeds):.4f} nats apart; below {NOISE:.4f} nothing is claimed")

# %% [markdown]
# ## 1. RMSNorm instead of LayerNorm
#
# LayerNorm takes the mean away and divides by the standard deviation. Zhang & Sennrich
# ([arXiv:1910.07467](https://arxiv.org/abs/1910.07467)) leave the mean where it is and divide by the root of the mean
# square: $y = g\, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$. On vectors whose mean is zero the two are one.


# %%
def rms_norm(x, gain, eps=1e-6):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


from sky_core.model.norm import LayerNorm, RMSNorm

torch.manual_seed(SEED)
x_BTD, gain_D = torch.randn(2, 10, D) + 1, torch.randn(D)
part = RMSNorm(D, eps=1e-6)
part.weight.data = gain_D
assert torch.allclose(part(x_BTD), rms_norm(x_BTD, gain_D), atol=1e-5)
centred_BTD = x_BTD - x_BTD.mean(-1, keepdim=True)
assert torch.allclose(F.layer_norm(x_BTD, (D,)), rms_norm(centred_BTD, 1, 1e-5), atol=1e-5)
assert not torch.allclose(F.layer_norm(x_BTD, (D,)), rms_norm(x_BTD, 1), atol=0.1)
where(RMSNorm)

# %%
RMS = {**GPT2, "norm": "rmsnorm"}
entry("1 RMSNorm", RMS, after="0 GPT-2")


def microseconds(module, x, times=200):
    """Median time of a call."""
    seconds = []
    with torch.no_grad():
        for _ in range(times):
            begun = time.perf_counter()
            module(x)
            seconds.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(seconds)


x_BTD = torch.randn(CHARS // T, T, D)
for norm in (LayerNorm(D, 1e-5, bias=False), RMSNorm(D, 1e-6)):
    print(f"one {type(norm).__name__} of {CHARS} characters: {microseconds(norm, x_BTD):.0f} microseconds")

# %% [markdown]
# RMSNorm is taken for its simplicity: one sum over the features instead of two, one vector instead of two where
# LayerNorm has a bias. Whether that shows in time is a matter of kernels, not of arithmetic; the lines above are what
# this machine says.
#
# ## 2. RoPE instead of a table of positions
#
# A table must learn each position by itself and ends where it ends. Su et al.
# ([arXiv:2104.09864](https://arxiv.org/abs/2104.09864)) add nothing: they **turn** queries and keys. A head of E
# numbers is E/2 planes; at position t plane i is turned by the angle $t f_i$ with $f_i = \theta^{-2i/E}$. Turned by
# $t f$ and $s f$, the inner product of a plane is that of the two vectors turned by $(t - s) f$: scores know
# **distances**, whatever the place.


# %%
def frequencies(width, theta=1e4):
    """Radians per character of each plane, f_F."""
    return theta ** (-torch.arange(0, width, 2) / width)


def turn(x_BHTE, positions_T, f_F=None):
    """RoPE; plane i is the pair (i, i + E/2)."""
    angle_TF = positions_T[:, None] * (frequencies(x_BHTE.shape[-1]) if f_F is None else f_F)
    a_BHTF, b_BHTF = x_BHTE.chunk(2, dim=-1)
    cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    return torch.cat((a_BHTF * cos_TF - b_BHTF * sin_TF, b_BHTF * cos_TF + a_BHTF * sin_TF), dim=-1)


from sky_core.model.rope import RotaryPosition

E = D // H
torch.manual_seed(SEED)
q_BHTE, k_BHTE = torch.randn(2, 2, H, T, E)
time_T = torch.arange(T)
pass_of = Context.begin(torch.zeros(2, T, dtype=torch.long), T)
turned = RotaryPosition(E, 1e4).rotate(q_BHTE, k_BHTE, pass_of)
assert torch.allclose(turned[0], turn(q_BHTE, time_T), atol=1e-5)
assert torch.allclose(turned[1], turn(k_BHTE, time_T), atol=1e-5)
assert torch.allclose(turn(q_BHTE, time_T).norm(dim=-1), q_BHTE.norm(dim=-1), atol=1e-4)  # lengths stay

q_E, k_E = torch.randn(2, E)


def score(t, s):
    """The inner product of one query at t and one key at s."""
    return (turn(q_E.view(1, 1, 1, E), torch.tensor([t])) * turn(k_E.view(1, 1, 1, E), torch.tensor([s]))).sum()


for shift in (1, 7, 1000):
    assert torch.isclose(score(12, 5), score(12 + shift, 5 + shift), atol=1e-3)  # the distance is 7 all the time
assert torch.isclose(score(3, 3), q_E @ k_E, atol=1e-4)  # at distance 0 nothing is turned
where(RotaryPosition)

# %%
f_F = frequencies(E)
lengths_F = 2 * math.pi / f_F
distance_N = torch.arange(4 * T)
alike_N = (distance_N[:, None] * f_F).cos().mean(1)  # the score of two equal vectors, relative to distance 0
figure, both = plt.subplots(1, 2, figsize=(9, 2.9))
both[0].semilogy(lengths_F, "o-", markersize=4)
both[0].axhline(T, color="black", linestyle="--", linewidth=1, label=f"the context, {T}")
both[0].set(xlabel="plane i", ylabel="wavelength (characters)", title="Fast planes see order, slow ones see content")
both[0].legend(frameon=False)
both[1].plot(distance_N, alike_N)
both[1].axvline(T, color="black", linestyle="--", linewidth=1)
both[1].set(xlabel="distance (characters)", ylabel="score, relative", title="Two equal vectors, turned apart")
show(figure)

# %%
ROPE = {**RMS, "position": "rope"}
entry("2 RoPE", ROPE, after="1 RMSNorm")
assert ladder["1 RMSNorm"]["parameters"] - ladder["2 RoPE"]["parameters"] == T * D  # the table is gone
if trained("RoPE gives a loss that a table of positions does not reach in this budget"):
    assert ladder["2 RoPE"]["loss"] < ladder["1 RMSNorm"]["loss"] - NOISE

# %% [markdown]
# ### Beyond the context of training
#
# A table has no row T. RoPE has an angle for every position, but past T the slow planes reach angles that training
# never showed. Three ways to stretch the frequencies by a factor s:
#
# - **linear** ([arXiv:2306.15595](https://arxiv.org/abs/2306.15595)): every $f_i / s$, all positions move into the
#   range of training, and neighbours come closer than they ever were;
# - **YaRN** ([arXiv:2309.00071](https://arxiv.org/abs/2309.00071)): planes that turn often within the context keep
#   $f_i$ (they saw every angle), planes that turn less than once get $f_i / s$, a ramp lies between; cos and sin are
#   multiplied by $0.1 \ln s + 1$;
# - **dynamic NTK** (same paper, section 3.3): a larger base $\theta$, just so large that the slowest plane is
#   interpolated; the fastest stays, and those between go along a little.
#
# And a way that needs no stretching: **ALiBi** ([arXiv:2108.12409](https://arxiv.org/abs/2108.12409)) turns nothing
# and takes $m_h (t - s)$ from each score, with a slope $m_h = 2^{-8h/H}$ of each head.


# %%
def yarn(width, factor, context, fast=32.0, slow=1.0, theta=1e4):
    """f_F of YaRN: `fast` and `slow` are numbers of turns within the context of training."""

    def plane_of(turns):  # context * f_i = 2 pi turns, solved for i
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(plane_of(fast)), 0), min(math.ceil(plane_of(slow)), width - 1)
    stretched_F = ((torch.arange(width // 2) - first) / (last - first)).clamp(0, 1)
    return frequencies(width) * (1 - stretched_F + stretched_F / factor)


from sky_core.model import rope_scaling
from sky_core.model.alibi import AlibiPosition, alibi_slopes

for context in (T, 2048, 4096):
    theirs_F = rope_scaling.yarn_frequencies(64, 1e4, 4.0, context)
    assert torch.allclose(yarn(64, 4.0, context), theirs_F, rtol=1e-5)
    assert theirs_F[-1] == rope_scaling.linear_frequencies(64, 1e4, 4.0)[-1]  # the slowest plane is interpolated
    assert torch.isclose(theirs_F[0], torch.tensor(1.0))  # the fastest stays: inverted, this would be 1/4
grown = 1e4 * 4.0 ** (64 / 62)  # the base of dynamic NTK where a text of T' characters has s T'/T - (s - 1) = 4
theirs_F = rope_scaling.dynamic_frequencies(64, 1e4, 4.0, 100, torch.full((1, 1, 1), 175)).flatten()
assert torch.allclose(frequencies(64, grown), theirs_F, rtol=1e-5)
assert torch.isclose(theirs_F[-1], frequencies(64)[-1] / 4, rtol=1e-5)  # the slowest plane, interpolated
assert alibi_slopes(H) == [2 ** (-8 * h / H) for h in range(1, H + 1)]
where(rope_scaling.yarn_frequencies, rope_scaling.linear_frequencies, AlibiPosition)

# %%
figure, axes = plt.subplots(figsize=(5.6, 2.9))
for context in (T, 2048):
    ratio_F = rope_scaling.yarn_frequencies(64, 1e4, 2.0, context) / frequencies(64)
    axes.plot(ratio_F, "o-", markersize=3, label=f"YaRN, trained on {context}")
axes.plot([0, 31], [0.5, 0.5], "--", label="linear")
axes.plot([0, 31], [1, 1], ":", color="black", label="plain")
axes.set(
    xlabel="plane i (0 turns fastest)", ylabel="frequency, relative", title="What stretching by 2 does to the planes"
)
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

# %% [markdown]
# Now the model of above, as it is, reads windows of twice its context; then once more after a tenth of its training on
# such windows.

# %%
ALIBI = {**RMS, "position": "alibi"}
entry("2 ALiBi", ALIBI, after="2 RoPE")

SCALED = {
    "plain": None,
    "linear": {"kind": "linear", "factor": 2},
    "YaRN": {"kind": "yarn", "factor": 2, "original_length": T},
    "dynamic NTK": {"kind": "dynamic", "factor": 2, "original_length": T},
}
FURTHER = {"optimizer": AdamW(lr=1e-3, betas=(0.9, 0.99)), "steps": max(2, STEPS // 10), "length": 2 * T}


def stretched(name, position):
    """The trained model `name` with a context of 2T and another position encoding."""
    longer = build({**RMS, "position": position, "max_length": 2 * T}).eval()
    longer.load_state_dict(models[name].state_dict())
    return longer


try:
    models["1 RMSNorm"](validation_N[None, : T + 1])
    raise AssertionError("a table has no row for that")
except ValueError as error:
    print("a table of positions:", error)

readers = {name: stretched("2 RoPE", {"kind": "rope", "scaling": scaling}) for name, scaling in SCALED.items()}
readers["ALiBi"] = stretched("2 ALiBi", "alibi")
at_place = {name: nll(reader, 2 * T).mean(0) for name, reader in readers.items()}
inside = {name: place_T[T // 2 : T].mean().item() for name, place_T in at_place.items()}
beyond = {name: place_T[T:].mean().item() for name, place_T in at_place.items()}
further = {}
for name, reader in readers.items():
    train(reader, **FURTHER)
    further[name] = nll(reader, 2 * T).mean(0)[T:].mean().item()
print(f"nats per character at places {T // 2}-{T} and {T}-{2 * T}; the latter again after", end=" ")
print(f"{FURTHER['steps']} steps on windows of {2 * T}")
for name in readers:
    print(f"{name:14} {inside[name]:8.4f} {beyond[name]:8.4f} {further[name]:8.4f}")
if trained("plain RoPE does not extend by itself, ALiBi does; a little training repairs what was stretched"):
    assert beyond["plain"] > inside["plain"] + NOISE
    assert beyond["ALiBi"] - inside["ALiBi"] < beyond["plain"] - inside["plain"]
    assert further["linear"] < beyond["linear"] - NOISE
    assert min(further.values()) < min(beyond[name] for name in SCALED)

# %%
figure, axes = plt.subplots(figsize=(6.6, 3.1))
smooth = max(1, T // 8)
for name, place_T in at_place.items():
    mean_T = place_T.unfold(0, smooth, 1).mean(-1)
    axes.plot(range(smooth, 2 * T + 1), mean_T, label=name)
axes.axvline(T, color="black", linestyle="--", linewidth=1, label="context of training")
axes.set(
    xlabel="place in the window",
    ylabel=f"validation loss, mean of {smooth}\n(nats per character)",
    title="Reading twice as far as trained",
)
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

# %% [markdown]
# The papers' numbers are for models of thousands of tokens. With T = 64 hardly a plane turns often enough for YaRN to
# keep it (the first picture), so what YaRN is made for cannot show here: it is told as it was measured.
#
# **Exercise 1.** Train section 2's RoPE with T = 256 and stretch that. Which of the three gains from it?
#
# ## 3. SwiGLU
#
# The feed-forward part of section 6 in notebook 1 is $W_d\,\mathrm{gelu}(W_u x)$. Shazeer
# ([arXiv:2002.05202](https://arxiv.org/abs/2002.05202)) lets one half of the hidden units **gate** the other:
# $W_d\,(\mathrm{silu}(W_g x) \odot W_u x)$, a product of two functions of x where there was one. Three matrices
# instead of two, so for as many parameters they are 8/3 D wide instead of 4 D.


# %%
def swiglu(x_BTD, gate_proj, up_proj, down_proj):
    gate = x_BTD @ gate_proj.T
    return (gate * gate.sigmoid() * (x_BTD @ up_proj.T)) @ down_proj.T


WIDE = 8 * round(D / 3)  # 8/3 D, to a multiple of 8
SWIGLU = {**ROPE, "feedforward": {"kind": "swiglu", "d_ff": WIDE}}
part = build(SWIGLU).layers[0].mlp
x_BTD = torch.randn(2, 10, D)
by_hand = swiglu(x_BTD, part.gate_proj.weight, part.up_proj.weight, part.down_proj.weight)
assert torch.allclose(part(x_BTD, None), by_hand, atol=1e-6)
parts = {name: build(table).n_parameters()["body"] for name, table in (("gelu", ROPE), ("swiglu", SWIGLU))}
assert abs(parts["swiglu"] / parts["gelu"] - 1) < 0.03  # as many parameters
print("parameters in the body:", parts)
where(type(part))

# %%
entry("3 SwiGLU", SWIGLU, after="2 RoPE")

# %% [markdown]
# ## 4. Grouped queries: a smaller cache
#
# While a text is written, the keys and values of all earlier tokens are kept: the **cache**. At long contexts it, not
# the weights, fills the memory, and reading it takes the time. Ainslie et al.
# ([arXiv:2305.13245](https://arxiv.org/abs/2305.13245)) let groups of query heads share one key/value head: G of them
# instead of H, and the cache is G/H of what it was.


# %%
def grouped_attention(q_BHTE, k_BGSE, v_BGSE):
    """Causal attention in which query head h reads key/value head h // (H / G)."""
    shared = q_BHTE.shape[1] // k_BGSE.shape[1]
    k_BHSE, v_BHSE = (z.repeat_interleave(shared, dim=1) for z in (k_BGSE, v_BGSE))
    return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, is_causal=True)


from sky_core.model import kernels
from sky_core.model.attention import SelfAttention
from sky_core.model.cache import KVCache
from sky_core.model.mask import Mask

torch.manual_seed(SEED)
q_BHTE, k_BGSE, v_BGSE = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
by_hand = grouped_attention(q_BHTE, k_BGSE, v_BGSE)
for kernel in (kernels.naive, kernels.sdpa):
    assert torch.allclose(kernel(q_BHTE, k_BGSE, v_BGSE, Mask(causal=True), scale=8**-0.5), by_hand, atol=1e-5)

per_character = {}
for heads in (4, 2, 1):
    model = build({**SWIGLU, "n_kv_head": heads})
    per_character[heads] = model.new_cache(batch=8).nbytes() / (8 * T)  # what the cache really holds
    assert per_character[heads] == 2 * L * heads * E * 4
    print(
        f"{heads} key/value heads: {per_character[heads]:,.0f} bytes per character,"
        f" {model.n_parameters()['total']:,} parameters"
    )
assert per_character[4] == 4 * per_character[1]
where(SelfAttention, KVCache)

# %% [markdown]
# The cache changes no number: read character by character through it, the model says what it says in one pass over
# the whole text. (Two key/value heads of four from here on. They save parameters too; nothing is given back for that.)

# %%
GROUPED = {**SWIGLU, "n_kv_head": 2}
model, x_1T = build(GROUPED).eval(), validation_N[None, :T]
cache = model.new_cache(batch=1)
with torch.no_grad():
    stepwise_1TV = torch.cat([model(x_1T[:, t : t + 1], cache=cache) for t in range(T)], dim=1)
    difference = (stepwise_1TV - model(x_1T)).abs().max().item()
assert cache.lengths == [T]
assert difference < 1e-5  # fp32 sums in another order
print(f"one by one through the cache, or at once: logits differ by {difference:.0e}")
entry("4 grouped queries", GROUPED, after="3 SwiGLU")
assert ladder["4 grouped queries"]["cache"] == ladder["3 SwiGLU"]["cache"] // 2

# %% [markdown]
# ## 5. QK-norm and caps: how large can a score get?
#
# Nothing bounds $q \cdot k$. When weights grow, scores do, the softmax saturates, and at large learning rates runs
# diverge. Henry et al. ([arXiv:2010.04245](https://arxiv.org/abs/2010.04245)) norm q and k of each head. With RMSNorm
# and a gain of one, $|q| = |k| = \sqrt E$, so by Cauchy and Schwarz a score $q \cdot k / \sqrt E$ is at most
# $\sqrt E$. Gemma 2 ([arXiv:2408.00118](https://arxiv.org/abs/2408.00118)) bends instead: $c \tanh(z / c)$ is z for
# small z and never more than c.

# %%
torch.manual_seed(SEED)
q_BHTE, k_BHTE = 1e3 * torch.randn(2, 2, H, T, E)  # as large as one likes
normed = [rms_norm(z, 1.0) for z in (q_BHTE, k_BHTE)]
scores_BHTS = normed[0] @ normed[1].mT / E**0.5
assert scores_BHTS.abs().max() <= E**0.5 + 1e-4

QK = {**GROUPED, "qk_norm": "head"}
layer = build(QK).layers[0].self_attn
torch.manual_seed(SEED)
for norm in (layer.q_norm, layer.k_norm):
    norm.weight.data = 1 + 0.1 * torch.randn(E)
x_BTD = torch.randn(2, T, D)
q, k, v = (proj(x_BTD).unflatten(-1, (-1, E)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
q, k = turn(rms_norm(q, layer.q_norm.weight), time_T), turn(rms_norm(k, layer.k_norm.weight), time_T)  # norm, then turn
by_hand = layer.o_proj(grouped_attention(q, k, v).transpose(1, 2).flatten(2))
assert torch.allclose(layer(x_BTD, pass_of), by_hand, atol=1e-5)

CAP = 2.0
raw = (q @ k.repeat_interleave(2, dim=1).mT) / E**0.5
hidden_TS = torch.ones(T, T, dtype=torch.bool).triu(1)
by_hand = (CAP * (raw / CAP).tanh()).masked_fill(hidden_TS, -torch.inf).softmax(-1)
capped = kernels.attention_weights(q, k, Mask(causal=True), scale=E**-0.5, softcap=CAP)
assert torch.allclose(capped, by_hand, atol=1e-6)
where(kernels.attention_weights)

# %% [markdown]
# Three learning rates, a third of the steps, with and without the norm. Beside the loss stands the largest score that
# the trained model gives on the validation text.


# %%
@torch.no_grad()
def largest_score(model):
    """The largest |score| of all layers over some windows of the validation split."""
    largest = []

    def watch(q_BHTE, k_BGSE, v_BGSE, mask, **how):
        k_BHSE = k_BGSE.repeat_interleave(q_BHTE.shape[1] // k_BGSE.shape[1], dim=1)
        seen_TS = torch.ones(q_BHTE.shape[2], k_BHSE.shape[2], dtype=torch.bool).tril()
        largest.append(((q_BHTE @ k_BHSE.mT) * how["scale"])[..., seen_TS].abs().max().item())
        return kernels.naive(q_BHTE, k_BGSE, v_BGSE, mask, **how)

    kept = model.layers[0].self_attn.kernel
    for layer in model.layers:
        layer.self_attn.kernel = watch
    model(validation_N[: 16 * T].view(16, T))
    for layer in model.layers:
        layer.self_attn.kernel = kept
    return max(largest)


RATES = (3e-3, 1e-2, 3e-2)
at_rate = {"without": [], "with QK-norm": []}
for rate in RATES:
    for name, table in (("without", GROUPED), ("with QK-norm", QK)):
        model = build(table)
        train(model, optimizer=ADAMW.model_copy(update={"lr": rate}), steps=max(2, STEPS // 3))
        loss, largest = nll(model, part=4).mean().item(), largest_score(model)
        at_rate[name].append((loss, largest))
        print(f"rate {rate:g}, {name:12}: {loss:.4f} nats, largest score {largest:6.1f}")
        if table is QK:  # a gain g multiplies the bound by the largest product of gains
            parts = [layer.self_attn for layer in model.layers]
            gains = [(one.q_norm.weight.abs().max() * one.k_norm.weight.abs().max()).item() for one in parts]
            assert largest <= E**0.5 * max(gains) + 1e-3
best_rate = {name: RATES[min(range(len(RATES)), key=lambda i: runs[i][0])] for name, runs in at_rate.items()}
spread_of_rates = {
    name: max(loss for loss, _ in runs) - min(loss for loss, _ in runs) for name, runs in at_rate.items()
}
for name in at_rate:
    print(
        f"{name}: best at {best_rate[name]:g}; between its best and its worst rate lie {spread_of_rates[name]:.3f} nats"
    )

# %%
figure, both = plt.subplots(1, 2, figsize=(9, 2.9))
for name, style in (("without", "s--"), ("with QK-norm", "o-")):
    both[0].semilogx(RATES, [loss for loss, _ in at_rate[name]], style, label=name)
    both[1].loglog(RATES, [largest for _, largest in at_rate[name]], style, label=name)
both[1].axhline(E**0.5, color="black", linestyle=":", linewidth=1, label=r"$\sqrt{E}$")
both[0].set(xlabel="learning rate", ylabel="validation loss (nats)", title=f"After {max(2, STEPS // 3)} steps")
both[1].set(xlabel="learning rate", ylabel="largest score", title="What the norm bounds")
for axes in both:
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.legend(frameon=False)
show(figure)

# %% [markdown]
# What the norm buys in a model as small as this is not a lower optimum but a wider range of rates: a rate that was
# chosen too large costs less with it than without. That is what one wants of a model whose rate cannot be tried twice.

# %%
entry("5 QK-norm", QK, after="4 grouped queries")
if trained("with the norm a rate that is too large costs less"):
    assert spread_of_rates["with QK-norm"] < spread_of_rates["without"]
assert ladder["5 QK-norm"]["parameters"] - ladder["4 grouped queries"]["parameters"] == 2 * L * E

# %% [markdown]
# ## 6. Muon and WSD instead of AdamW and a cosine
#
# AdamW scales each number of a gradient by itself. A matrix is more than its numbers: it maps directions to
# directions, and its gradient mostly points along a few. Muon
# ([Jordan et al. 2024](https://kellerjordan.github.io/posts/muon/)) takes the momentum $U = P \Sigma Q^\top$ and steps
# along $P Q^\top$: the same directions, **all singular values one**. No decomposition is needed for that. An odd
# polynomial acts on the singular values alone, and $3.4445\,x - 4.7750\,x^3 + 2.0315\,x^5$, five times, moves all of
# them (divided by the norm first) close to one.


# %%
def orthogonalised(u_RC, steps=5):
    """Newton-Schulz with the author's triple."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x_RC = u_RC / u_RC.norm()
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.T
        x_RC = a * x_RC + (b * gram_RR + c * gram_RR @ gram_RR) @ x_RC
    return x_RC


from sky_core.training import muon, schedule

torch.manual_seed(SEED)
u_RC = torch.randn(32, 96)
(theirs,) = muon.orthogonalize([u_RC], muon.coefficients("newton_schulz", 5), torch.float32)
assert torch.allclose(theirs, orthogonalised(u_RC), atol=1e-4)
singular_R = torch.linalg.svdvals(theirs)
assert 0.6 < singular_R.min() < singular_R.max() < 1.3
left, _, right = torch.linalg.svd(u_RC, full_matrices=False)
cosine = F.cosine_similarity(theirs.flatten(), (left @ right).flatten(), dim=0).item()
assert cosine > 0.98  # the direction of the nearest semi-orthogonal matrix

weight, lr, decay, momentum = nn.Parameter(torch.randn(96, 32)), 0.02, 0.1, 0.95
before, weight.grad = weight.detach().clone(), torch.randn(96, 32)
muon.Muon([weight], lr=lr, weight_decay=decay, momentum=momentum).step()
m = (1 - momentum) * weight.grad  # the first step: there is no older momentum
u = (1 - momentum) * weight.grad + momentum * m  # Nesterov
(o,) = muon.orthogonalize([u], muon.coefficients("newton_schulz", 5), muon.iteration_dtype(u.device))
assert torch.allclose(weight, (1 - lr * decay) * before - lr * math.sqrt(max(1, 96 / 32)) * o, atol=1e-4)
random_R = torch.linalg.svdvals(u_RC)
print(f"singular values of a random matrix {random_R.min():.1f} to {random_R.max():.1f},", end=" ")
print(f"afterwards {singular_R.min():.2f} to {singular_R.max():.2f}; cosine to PQᵀ {cosine:.3f}")
where(muon.Muon, muon.orthogonalize)

# %% [markdown]
# The gradient of a real matrix, before and after: the second hidden layer of the model of section 5.

# %%
model = models["5 QK-norm"]
x_BT, y_BT = windows(torch.Generator().manual_seed(SEED), T)
(model.nll(model.hidden(x_BT), y_BT) / y_BT.numel()).backward()
gradient_RC = model.layers[1].mlp.up_proj.weight.grad.clone()
model.zero_grad()
spectra = {
    "gradient": torch.linalg.svdvals(gradient_RC) / torch.linalg.matrix_norm(gradient_RC, 2),
    "orthogonalised": torch.linalg.svdvals(orthogonalised(gradient_RC.T)),
}
share = (spectra["gradient"] < 0.1).float().mean().item()
figure, axes = plt.subplots(figsize=(5.4, 2.8))
for (name, values), style in zip(spectra.items(), ("s--", "o-"), strict=True):
    axes.semilogy(values, style, markersize=3, label=name)
axes.set(
    xlabel="singular value, sorted", ylabel="size (the gradient's largest is 1)", title="What Muon does to a gradient"
)
axes.legend(frameon=False)
show(figure)
print(f"{share:.0%} of the gradient's singular values are below a tenth of its largest,", end=" ")
print(f"{(spectra['orthogonalised'] < 0.1).float().mean():.0%} afterwards")
assert spectra["orthogonalised"].median() > spectra["gradient"].median()

# %% [markdown]
# **WSD** (warm-up, stable, decay; [arXiv:2404.06395](https://arxiv.org/abs/2404.06395)): a cosine must know the end
# of the run from its first step. WSD stays at the peak and falls at the end only, so the same run can be stopped, or
# gone on with, at any length.

# %%
WARMUP, DECAY = 0.1, 0.3
STABLE = WSD(warmup=WARMUP, decay=DECAY)


def wsd(step):
    """Of 100 steps 10 rise, then it is 1, then 1 - sqrt(r) over the last 30."""
    if step < 10:
        return (step + 1) / 11
    return 1.0 if step < 70 else 1 - math.sqrt((step - 70) / 30)


assert all(math.isclose(STABLE.build(100)(step), wsd(step), abs_tol=1e-9) for step in range(100))
figure, axes = plt.subplots(figsize=(5.2, 2.4))
for name, one in (("cosine", COSINE), ("WSD", STABLE)):
    axes.plot([one.build(STEPS)(step) for step in range(STEPS)], label=name)
axes.set(xlabel="step", ylabel="rate, relative to its peak")
axes.legend(frameon=False)
show(figure)
where(schedule.wsd)

# %%
MUON = Muon(lr=0.02, weight_decay=0.1, adamw=ADAMW)  # AdamW keeps embeddings, head and norms
entry("6 Muon", QK, after="5 QK-norm", optimizer=MUON)
entry("6 Muon and WSD", QK, after="6 Muon", optimizer=MUON, schedule=STABLE)
BEST = {"optimizer": MUON, "schedule": STABLE}
slower = ladder["5 QK-norm"]["speed"] / ladder["6 Muon"]["speed"]
print(f"a step of Muon takes {slower:.2f} times that of AdamW, with {CHARS} characters in it")
if trained("Muon goes further in as many steps"):
    assert ladder["6 Muon"]["loss"] < ladder["5 QK-norm"]["loss"] - NOISE

# %% [markdown]
# ## 7. A longer context
#
# Twice the context, the same number of characters a step (half as many windows). The second half of a window now sees
# characters that no model above could see.

# %%
LONG = {**QK, "max_length": 2 * T}
entry("7 twice the context", LONG, after="6 Muon and WSD", length=2 * T, **BEST)
place = {
    name: nll(models[name], length).mean(0) for name, length in (("6 Muon and WSD", T), ("7 twice the context", 2 * T))
}
short_end = place["6 Muon and WSD"][T // 2 :].mean().item()
long_middle, long_end = (place["7 twice the context"][a : a + T // 2].mean().item() for a in (T // 2, 3 * T // 2))
print(f"places {T // 2} to {T}: {short_end:.4f} nats trained on {T}, {long_middle:.4f} trained on {2 * T}")
print(f"places {3 * T // 2} to {2 * T}: {long_end:.4f} nats")
print(f"the places that both models have: {verdict(short_end, long_middle)}")
print(f"the new places against them: {verdict(long_middle, long_end)}")
assert LONG["max_length"] == 2 * QK["max_length"]

# %%
figure, axes = plt.subplots(figsize=(6, 2.9))
for name, values in place.items():
    axes.plot(range(smooth, len(values) + 1), values.unfold(0, smooth, 1).mean(-1), label=name)
axes.set(xlabel="place in the window", ylabel=f"validation loss, mean of {smooth}\n(nats per character)")
axes.legend(frameon=False)
show(figure)

# %% [markdown]
# ## 8. A mixture of experts
#
# Parameters are knowledge, multiplications are time. A mixture of experts
# ([arXiv:1701.06538](https://arxiv.org/abs/1701.06538)) buys the first without the second: X feed-forward parts, of
# which a **router** picks K for each token. By hand, expert by expert, as reference codes have it. The laboratory
# sorts the tokens by expert and makes one grouped product; the numbers are the same.


# %%
def mixture(x_ND, gate_XD, experts, top_k):
    """Mixtral's routing: softmax over experts, the K best, their weights divided by their sum."""
    share_NX = (x_ND @ gate_XD.T).softmax(-1)
    weight_NK, chosen_NK = share_NX.topk(top_k)
    weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
    y_ND = torch.zeros_like(x_ND)
    for x in range(len(gate_XD)):
        token_M, place_M = (chosen_NK == x).nonzero(as_tuple=True)
        matrices = (experts.gate_proj[x], experts.up_proj[x], experts.down_proj[x])
        y_ND[token_M] += weight_NK[token_M, place_M, None] * swiglu(x_ND[token_M], *matrices)
    return y_ND


from sky_core.model.router import loads

X, K = 8, 2
MIXTRAL = {
    "kind": "moe",
    "n_experts": X,
    "top_k": K,
    "d_ff": WIDE // K,
}  # K experts are as wide as the part they replace
part = build({**QK, "feedforward": MIXTRAL}).layers[0].mlp
torch.manual_seed(SEED)
for parameter in part.parameters():
    nn.init.normal_(parameter, std=0.2)
x_BTD = torch.randn(2, 10, D)
by_hand = mixture(x_BTD.flatten(0, 1), part.gate.weight, part.experts, K).view_as(x_BTD)
assert torch.allclose(part(x_BTD, pass_of), by_hand, rtol=1e-3, atol=1e-4)
where(type(part), type(part.gate))

# %% [markdown]
# A router that favours an expert trains it more and favours it more: some end up with all the work. DeepSeek-V3
# ([arXiv:2412.19437](https://arxiv.org/abs/2412.19437), after
# [arXiv:2408.15664](https://arxiv.org/abs/2408.15664)) scores each expert by a sigmoid and adds to the scores, for the
# choice only, a bias $b_e \mathrel{+}= u\,\mathrm{sign}(\overline{load} - load_e)$ after every step. No loss is spent
# on balance. Trained with that bias and without, at equal **active** parameters:

# %%
DEEPSEEK = {**MIXTRAL, "router": "sigmoid", "bias_update": 0.01}
EXPERTS = {
    "with the bias": {**QK, "feedforward": DEEPSEEK},
    "without": {**QK, "feedforward": {**DEEPSEEK, "bias_update": 0.0}},
}

part = build(EXPERTS["with the bias"]).layers[0].mlp
part.train()
part(x_BTD, pass_of)
load_X = part.load.clone()
part.after_step(lambda load: load)
assert load_X.sum() == x_BTD.shape[0] * x_BTD.shape[1] * K  # every token chose K
assert torch.allclose(part.gate.e_score_correction_bias, 0.01 * (load_X.double().mean() - load_X).sign().float())

for name, table in EXPERTS.items():
    entry(f"8 experts {name}", table, after="6 Muon and WSD", **BEST)
    measured = ladder[f"8 experts {name}"]
    idle = sum(layer.mlp.idle_parameters for layer in models[f"8 experts {name}"].layers)
    measured["active"] = measured["parameters"] - idle
    print(f"    {measured['active']:,} of {measured['parameters']:,} parameters work for a character")
routers = L * X * D
assert ladder["8 experts without"]["active"] - ladder["6 Muon and WSD"]["parameters"] == routers  # and nothing else


# %%
@torch.no_grad()
def expert_loads(model):
    """load_LX: how the choices of the validation split spread over the experts of each layer, 1 = an equal share."""
    load_LX = torch.zeros(L, X)

    def count(layer):
        def hook(router, _, logits_NX):
            load_LX[layer] += loads(router.choose(logits_NX).experts_NK, X)

        return hook

    handles = [layer.mlp.gate.register_forward_hook(count(i)) for i, layer in enumerate(model.layers)]
    nll(model, part=4)
    for handle in handles:
        handle.remove()
    return load_LX / load_LX.mean(1, keepdim=True)


load_LX = {name: expert_loads(models[f"8 experts {name}"]) for name in EXPERTS}
busiest = {name: (share_LX.max(1).values - 1).mean().item() for name, share_LX in load_LX.items()}
figure, both = plt.subplots(1, 2, figsize=(9, 2.7), sharey=True)
for axes, (name, share_LX) in zip(both, load_LX.items(), strict=True):
    for layer in range(L):
        axes.plot(
            range(1, X + 1),
            share_LX[layer].sort(descending=True).values,
            "o-",
            markersize=3,
            label=f"layer {layer + 1}",
        )
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="expert, the busiest first", title=name)
both[0].set_ylabel("load, relative to an equal share")
both[1].legend(frameon=False)
show(figure)
for name in EXPERTS:
    print(f"{name}: the busiest expert of a layer has {busiest[name]:+.0%} over an equal share,", end=" ")
    print(f"the idlest of all {load_LX[name].min():.2f} of one")
if trained("the bias balances the experts"):
    assert busiest["with the bias"] < busiest["without"]

# %% [markdown]
# **Exercise 2.** `aux_loss: 0.01` balances by a loss instead. Compare the load and the loss. Then set `top_k: 1` (and
# `norm_topk: false`: why must you?).
#
# ## 9. Three that must earn their place
#
# - **Residual scalars** (modded-nanoGPT): before each block $x \leftarrow r x + s x_0$, two learned numbers a layer,
#   $x_0$ the embedding. At the start $r = 1$ and $s = 0$.
# - **Value embeddings** (modded-nanoGPT; [arXiv:2410.17897](https://arxiv.org/abs/2410.17897)): the values get a vector
#   of the token itself, $v_t + 2\sigma(W_g x_t)\,E[\text{token}_t]$, from a table of the layer.
# - **Multi-token prediction** (DeepSeek-V3): a small module behind the stack joins the state of position t with the
#   embedding of character t + 1 and predicts character t + 2. It is trained along and may be dropped afterwards.

# %%
SCALARS = {**QK, "block": {"kind": "pre", "residual_scalars": True}}
VALUES = {**QK, "attention": {"kind": "full", "value_embedding": True}}
AHEAD = {**QK, "n_mtp": 1}
x_BT = validation_N[: 2 * T].view(2, T)
with torch.no_grad():
    assert torch.equal(build(SCALARS)(x_BT), build(QK)(x_BT))  # at the start nothing changes

    layer, x_BTD = build({**VALUES, "qk_norm": None}).layers[0].self_attn, torch.randn(2, T, D)
    layer.value_gate.weight.normal_(std=0.1)
    pass_of = Context.begin(x_BT, T)
    q, k, v = (
        proj(x_BTD).unflatten(-1, (-1, E)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    gate_BGT1 = 2 * (x_BTD @ layer.value_gate.weight.T).sigmoid().transpose(1, 2)[..., None]
    v = v + gate_BGT1 * layer.value_embed.weight[x_BT].unflatten(-1, (-1, E)).transpose(1, 2)
    by_hand = layer.o_proj(grouped_attention(turn(q, time_T), turn(k, time_T), v).transpose(1, 2).flatten(2))
    assert torch.allclose(layer(x_BTD, pass_of), by_hand, atol=1e-5)

    model = build(AHEAD).eval()
    module, h_BTD, next_BT = model.mtp[0], model.hidden(x_BT), x_BT.roll(-1, 1)
    joined = torch.cat((rms_norm(model.embed_tokens(next_BT), 1.0), rms_norm(h_BTD, 1.0)), dim=-1)
    by_hand = rms_norm(module.layer(joined @ module.eh_proj.weight.T, Context.begin(next_BT, T)), 1.0)
    assert torch.allclose(model.mtp_hidden(0, h_BTD, next_BT), by_hand, atol=1e-4)
where(type(model.layers[0]), SelfAttention, type(module))

# %%
entry("9 residual scalars", SCALARS, after="6 Muon and WSD", **BEST)
entry("9 value embeddings", VALUES, after="6 Muon and WSD", **BEST)
entry("9 multi-token", AHEAD, after="6 Muon and WSD", objective=MultiToken(0.3), **BEST)
scalars_L2 = torch.stack([layer.residual_scalars.detach() for layer in models["9 residual scalars"].layers])
print("learned (r, s) of each layer:", [tuple(round(value, 3) for value in row) for row in scalars_L2.tolist()])
assert ladder["9 residual scalars"]["parameters"] - ladder["6 Muon and WSD"]["parameters"] == 2 * L
assert ladder["9 value embeddings"]["cache"] == ladder["6 Muon and WSD"]["cache"]

# %% [markdown]
# Whatever the verdicts say, they are those of 300 steps at 0.8M parameters and of one seed. The value embeddings' table
# has V rows a layer: with 65 characters it is nearly free, with 50,000 tokens it is most of the model.
# The assertions above hold what is sure: what each costs.
#
# ## 10. muP: one learning rate for every width
#
# In the usual parametrisation the best learning rate falls as the model gets wider, so what was tuned on a small model
# is wrong for the large one. Yang et al. ([arXiv:2203.03466](https://arxiv.org/abs/2203.03466)) ask that every update
# change the hidden states by the same amount at every width. With $m$ = width / base width, that takes a start of
# hidden matrices $\sqrt m$ times smaller, an Adam rate m times smaller for them, and logits divided by m.


# %%
BASE = 32


def of_width(width, mup):
    """A decoder whose heads keep their width of 16."""
    small = {"n_layer": 2, "n_head": width // 16, "d_model": width, "max_length": T, "tie_embeddings": False}
    return build({**small, "mup": {"base_d_model": BASE} if mup else None})


usual, mup = of_width(128, mup=False), of_width(128, mup=True)
m = 128 / BASE
for name in ("q_proj", "k_proj", "v_proj"):
    weights = [getattr(one.layers[0].self_attn, name).weight for one in (usual, mup)]
    assert torch.allclose(weights[1], weights[0] / math.sqrt(m))  # the same draw, a smaller start
assert set(mup.lr_scale().values()) == {1 / m}
assert {name.split(".")[-2] for name in mup.lr_scale()} == {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
}  # fmt: skip
h_BTD = torch.randn(1, 1, 128)
assert torch.allclose(mup.logits(h_BTD), mup.lm_head(h_BTD) / m, atol=1e-5)

from sky_core.model import mup as mup_module

where(mup_module.lr_scale)

# %% [markdown]
# **The coordinate check**: after a few steps at one rate, how much did the logits move? Under muP that does not depend
# on the width. If it does, something is parametrised wrongly. It takes seconds and no trained model.

# %%
CHECK = (32, 64, 128, 256)
moved = {"usual": [], "muP": []}
x_BT, y_BT = windows(torch.Generator().manual_seed(SEED), T)
for width in CHECK:
    for name, values in moved.items():
        model = of_width(width, name == "muP")
        with torch.no_grad():
            start = model(x_BT[:4])
        (optimizer,) = AdamW(lr=0.01, weight_decay=0.0).build(list(model.named_parameters()), model.lr_scale())
        for _ in range(4):
            (model.nll(model.hidden(x_BT[:4]), y_BT[:4]) / y_BT[:4].numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            values.append((model(x_BT[:4]) - start).std().item())
ratios = {name: values[-1] / values[0] for name, values in moved.items()}
print("width                ", *(f"{width:7}" for width in CHECK))
for name, values in moved.items():
    print(
        f"logits moved, {name:7}",
        *(f"{value:7.3f}" for value in values),
        f"  {CHECK[-1]} / {CHECK[0]}: {ratios[name]:.2f}",
    )
assert abs(math.log(ratios["muP"])) < abs(math.log(ratios["usual"]))
assert 0.5 < ratios["muP"] < 2

# %% [markdown]
# **And what it is for**: a sweep of learning rates at three widths.

# %%
WIDTHS, OCTAVES, SHORT = ((32, 64, 128), range(-9, -3), 120) if FULL else ((32, 64), range(-8, -5), 2)
LINEAR = Cosine(warmup=0.1, final=0.0)
swept = {}
for width in WIDTHS:
    for name in ("usual", "muP"):
        if width == BASE and name == "muP":
            swept[width, name] = swept[width, "usual"]  # at the base width the two are one
            continue
        swept[width, name] = []
        for octave in OCTAVES:
            model = of_width(width, name == "muP")
            train(model, AdamW(lr=2.0**octave, weight_decay=0.0), LINEAR, steps=SHORT)
            swept[width, name].append(nll(model, part=4).mean().item())


def best_octave(values):
    """The vertex of the parabola through the lowest point and its neighbours."""
    i = min(range(len(values)), key=values.__getitem__)
    if i in (0, len(values) - 1):
        return float(OCTAVES[i])
    left, middle, right = values[i - 1 : i + 2]
    return OCTAVES[i] + 0.5 * (left - right) / (left - 2 * middle + right)


shift = {}
for name in ("usual", "muP"):
    best = [best_octave(swept[width, name]) for width in WIDTHS]
    shift[name] = best[-1] - best[0]
    print(f"{name:6} best rate 2^", ", 2^".join(f"{octave:.2f}" for octave in best), f"at widths {WIDTHS}:", end=" ")
    print(f"{shift[name]:+.2f} octaves; best losses", *(f"{min(swept[width, name]):.4f}" for width in WIDTHS))
stay = swept[BASE, "usual"].index(min(swept[BASE, "usual"]))  # the rate that the smallest model found
at_base_rate = {name: swept[WIDTHS[-1], name][stay] for name in shift}
print(f"width {WIDTHS[-1]} at the best rate of width {BASE}:", {name: round(x, 4) for name, x in at_base_rate.items()})
if trained("under muP the best rate stays within an octave"):
    assert abs(shift["muP"]) < 1
    assert at_base_rate["muP"] < at_base_rate["usual"]

# %%
figure, both = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for axes, name in zip(both, ("usual", "muP"), strict=True):
    for color, width in enumerate(WIDTHS):
        axes.plot(OCTAVES, swept[width, name], "o-", markersize=3, color=f"C{color}", label=f"width {width}")
        axes.axvline(best_octave(swept[width, name]), color=f"C{color}", linestyle=":")
    axes.set(xlabel="log2 of the learning rate", title=name)
both[0].set(ylabel="validation loss (nats)")
low = min(min(values) for values in swept.values())
both[0].set_ylim(low - 0.05, low + (1.0 if FULL else 3.0))
both[1].legend(frameon=False)
show(figure)


def results(name):
    """The measures that a benchmark of this repository has recorded; none where it was not run yet."""
    path = Path("../benchmarks/results") / f"{name}.json"
    if not path.exists():
        print(f"benchmarks/results/{path.name} is not there: nothing recorded to compare with")
        return []
    return json.loads(path.read_text(encoding="utf-8"))["measures"]


for measure in results("mup_transfer"):  # widths 64 to 256, more steps and seeds
    print(f"recorded by benchmarks/: {measure['what']}: {measure['value']:.3g} {measure['unit']}")

# %% [markdown]
# ## 11. The whole recipe
#
# The decoder of section 7 at the budget of nanoGPT's recipe in notebook 1: as many characters seen, no more
# parameters, twice the context. nanoGPT's own code reached 1.8982 nats on this split in windows of 64 characters; the
# assertion below compares in windows of 64 as well.

# %%
NANOGPT = 1.8982  # nats per character: its code, its seed, whole validation split (as in notebook 1)
BUDGET = 1_536_000 if FULL else 8 * CHARS
model = build(LONG)
begun = time.perf_counter()
curve, speed = train(model, steps=BUDGET // CHARS, length=2 * T, **BEST)
seconds = time.perf_counter() - begun
final, in_short = nll(model, 2 * T).mean().item(), nll(model, T).mean().item()
size = model.n_parameters()["total"]
print(f"{BUDGET:,} characters in {seconds:.0f} s, {size:,} parameters")
print(f"{final:.4f} nats = {final / math.log(2):.3f} bits per character; in windows of {T}: {in_short:.4f}")
if SHAKESPEARE and trained("the modern decoder is far ahead of nanoGPT's at its budget"):
    print(f"nanoGPT {NANOGPT:.4f}: {in_short - NANOGPT:+.4f} in windows as short as its own")
    assert in_short < NANOGPT - 0.1
for measure in results("shakespeare"):  # recipes/shakespeare.yaml, the same idea with everything tuned
    print(f"recorded by benchmarks/: {measure['what']}: {measure['value']:.4g} {measure['unit']} ({measure['n']} runs)")
print(sky_core.generate(model, tokenizer, "\n", max_new_tokens=300, temperature=0.8, seed=SEED))

# %% [markdown]
# ## 12. Drafting: the same text in fewer passes
#
# A pass over five characters takes hardly longer than a pass over one, because the weights are read once. So let
# something cheap **guess** a few characters, and the model check them all in one pass
# ([arXiv:2211.17192](https://arxiv.org/abs/2211.17192)): a guess x drawn from q is accepted with probability
# $\min(1, p(x)/q(x))$; the first that is not is replaced by a draw from $\mathrm{norm}(\max(p - q, 0))$. What comes
# out is distributed as p, whatever q is. By hand, with a q that is far off:

# %%
from sky_core.generation.speculative import Proposal, accept

p_V = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0], dtype=torch.double)
q_V = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3], dtype=torch.double)
N = 40_000
generator = torch.Generator().manual_seed(SEED)
guess_N = q_V.multinomial(N, replacement=True, generator=generator)
taken_N = torch.rand(N, generator=generator, dtype=torch.double) < p_V[guess_N] / q_V[guess_N]
other_N = (p_V - q_V).clamp(min=0).multinomial(N, replacement=True, generator=generator)
result_V = torch.where(taken_N, guess_N, other_N).bincount(minlength=5) / N
accepted_share = taken_N.double().mean().item()
assert (result_V - p_V).abs().max() < 0.01  # three standard errors of 40,000 draws are 0.0075
assert abs(accepted_share - torch.minimum(p_V, q_V).sum()) < 0.01

rows = guess_N[:4000].tolist()
p_BKV, q_BKV = p_V.expand(len(rows), 2, 5), q_V.expand(len(rows), 1, 5)
theirs = accept(p_BKV, Proposal([[guess] for guess in rows], q_BKV), [generator] * len(rows))
first_V = torch.tensor([tokens[0] for tokens in theirs]).bincount(minlength=5) / len(rows)
assert (first_V - p_V).abs().max() < 0.03  # 4,000 draws
print("wanted ", p_V.tolist())
print("guessed", q_V.tolist(), f"accepted {accepted_share:.1%}")
print(
    "got    ",
    [round(value, 3) for value in result_V.tolist()],
    "by hand;",
    [round(value, 3) for value in first_V.tolist()],
    "by the laboratory",
)
where(accept)

# %% [markdown]
# Three ways to guess: **look up** what followed the last three characters when they occurred before, ask a **small
# model**, or the model's own module of **multi-token prediction** (that of section 9). At temperature 0 the text must
# be the same, character for character.

# %%
from sky_core.components.generation import Greedy
from sky_core.generation.decode import stream_tokens
from sky_core.generation.drafts import DraftModel, MtpDraft, PromptLookup

SMALL = {
    **LONG,
    "n_layer": 1,
    "n_head": 2,
    "n_kv_head": 2,
    "d_model": D // 2,
    "feedforward": {"kind": "swiglu", "d_ff": WIDE // 2},
}
small = build(SMALL)
train(small, length=2 * T, steps=2 * STEPS, **BEST)
print(f"draft model: {nll(small, 2 * T).mean():.4f} nats with {small.n_parameters()['total']:,} parameters")


def write(model, draft=None, rows=8):
    """(texts, tokens per pass, share of guesses accepted, seconds) of greedy continuations that fill the context."""
    known = model.max_length // 3
    prompts = [validation_N[i * 1000 : i * 1000 + known].tolist() for i in range(rows if FULL else 2)]
    begun, texts = time.perf_counter(), [""] * len(prompts)
    options = {"sampler": Greedy(), "max_new_tokens": model.max_length - known, "draft": draft}
    pieces = list(stream_tokens(model, tokenizer, prompts, **options))
    for piece in pieces:
        texts[piece.row] += piece.text
    passes = sum(not piece.accepted for piece in pieces)  # every pass ends with a token of the model's own
    proposed = sum(piece.proposed for piece in pieces)
    return texts, len(pieces) / passes, (len(pieces) - passes) / max(1, proposed), time.perf_counter() - begun


alone, _, _, seconds_alone = write(model)
print(f"no draft:    1.00 characters per pass, {seconds_alone:.2f} s")
tokens_per_pass = {}
for name, draft in (("look-up", PromptLookup(4)), ("small model", DraftModel(small, 4))):
    texts, tokens_per_pass[name], share, seconds = write(model, draft)
    assert texts == alone  # the same text, character for character
    print(
        f"{name:12} {tokens_per_pass[name]:.2f} characters per pass, {share:.0%} of guesses accepted, {seconds:.2f} s"
    )
    assert tokens_per_pass[name] >= 1
ahead = models["9 multi-token"].eval()
texts, tokens_per_pass["multi-token"], share, _ = write(ahead, MtpDraft(1))
assert texts == write(ahead)[0]
print(f"multi-token: {tokens_per_pass['multi-token']:.2f} characters per pass (at most 2), {share:.0%} accepted")
if trained("drafts save passes"):
    assert min(tokens_per_pass["small model"], tokens_per_pass["multi-token"]) > 1.2
where(PromptLookup, DraftModel, MtpDraft)

# %% [markdown]
# Fewer passes are not less time here: at this size a pass is all overhead, and a draft model adds its own. The time
# is won where reading the weights takes it, with a large model that writes for one reader.
#
# ## 13. A Hugging Face checkpoint
#
# The model of section 11 has RMSNorm, RoPE, SwiGLU, grouped queries and a norm on queries and keys: that is Qwen3. So
# it can be written as a Qwen3 checkpoint, which any program that knows Qwen3 reads. The laboratory finds the name by
# itself: it looks for an architecture whose description gives back the same model.

# %%
from sky_core import hf

folder = Path("data/closer_to_modern")
shutil.rmtree(folder, ignore_errors=True)
hf.export(model, tokenizer, folder)
for file in sorted(folder.iterdir()):
    print(f"{file.stat().st_size:10,} bytes  {file.name}")
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
assert config["model_type"] == "qwen3"
assert (config["hidden_size"], config["num_key_value_heads"]) == (D, 2)
print(
    {
        key: config[key]
        for key in (
            "architectures",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "rope_parameters",
        )
    }
)
where(hf.export)

# %% [markdown]
# **safetensors by hand.** Eight bytes hold the length of a JSON header, little end first. The header tells of every
# tensor its type, its shape, and where its bytes lie behind the header. That is the whole format; nothing in it can
# run code, which a pickle can.

# %%
content = (folder / "model.safetensors").read_bytes()
length = int.from_bytes(content[:8], "little")
header = json.loads(content[8 : 8 + length])
tensors = {}
for name, entry_of in header.items():
    if name == "__metadata__":
        continue
    assert entry_of["dtype"] == "F32"
    first, last = (8 + length + offset for offset in entry_of["data_offsets"])
    tensors[name] = torch.frombuffer(bytearray(content[first:last]), dtype=torch.float32).view(entry_of["shape"])
print(f"a header of {length:,} bytes, {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers")
for name in list(tensors)[:4]:
    print(f"  {name}  {tuple(tensors[name].shape)}")

for name, parameter in model.named_parameters():
    assert torch.equal(tensors[f"model.{name}"], parameter)  # Hugging Face's names are ours behind `model.`
assert "lm_head.weight" not in tensors  # the head is the embedding, written once

# %% [markdown]
# **And back**, from the files alone: model and tokenizer.

# %%
x_BT = validation_N[: 4 * T].view(4, T)
if importlib.util.find_spec("tokenizers"):
    loaded, its_tokenizer = sky_core.load(f"hf:{folder}")
    assert its_tokenizer.encode(text[:500]) == tokenizer.encode(text[:500])
    with torch.no_grad():
        difference = (loaded(x_BT) - model(x_BT)).abs().max().item()
    assert difference == 0  # the same weights through the same code
    print(f"loaded from the folder: logits differ by {difference:.0e}")
else:
    loaded = model
    print("the package tokenizers is not installed, which reading a tokenizer.json takes: pip install 'sky-core[hf]'")

# %% [markdown]
# ### Taken apart: the weights
#
# Per layer: the mean gain of the norms, and the largest singular value of each matrix, which is the most that it can
# stretch a vector.

# %%
state = loaded.state_dict()
matrices = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
stretch_LM = torch.tensor(
    [[torch.linalg.matrix_norm(state[f"layers.{i}.{name}.weight"], 2).item() for name in matrices] for i in range(L)]
)
gains = ["input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"]
gain_LM = torch.tensor([[state[f"layers.{i}.{name}.weight"].mean().item() for name in gains] for i in range(L)])
figure, both = plt.subplots(1, 2, figsize=(9.4, 0.35 * L + 1.3), width_ratios=[7, 4])
for axes, table, names, title in (
    (both[0], stretch_LM, matrices, "largest singular value"),
    (both[1], gain_LM, gains, "mean gain of the norms"),
):
    axes.imshow(table, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(names)), [name.split(".")[-1].replace("_", "\n") for name in names], fontsize=7)
    axes.set_yticks(range(L), [f"layer {i + 1}" for i in range(L)])
    axes.set_title(title, fontsize=9)
    for i, row in enumerate(table.tolist()):
        for j, value in enumerate(row):
            dark = value > (table.min() + table.max()).item() / 2
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.tick_params(length=0)
show(figure)

# %% [markdown]
# **What a head can say.** Head h moves $W_o^h W_v^g$ of what it looks at: a D by D map of rank E at most. Its singular
# values tell how many directions it really uses; $\exp$ of the entropy of their shares is their number in effect.


# %%
def in_effect(values):
    """exp of the entropy of shares: 1 where one has all, n where n are equal."""
    share = values / values.sum(-1, keepdim=True)
    return (-(share * share.clamp(min=1e-12).log()).sum(-1)).exp()


spectra_LHE = torch.stack(
    [
        torch.stack(
            [
                torch.linalg.svdvals(
                    state[f"layers.{i}.self_attn.o_proj.weight"][:, h * E : (h + 1) * E]
                    @ state[f"layers.{i}.self_attn.v_proj.weight"][(g := h // (H // 2)) * E : (g + 1) * E]
                )[:E]
                for h in range(H)
            ]
        )
        for i in range(L)
    ]
)
directions_LH = in_effect(spectra_LHE)
assert directions_LH.min() >= 1
assert directions_LH.max() <= E + 1e-3
fresh = build(LONG).state_dict()
random_E = torch.linalg.svdvals(
    fresh["layers.0.self_attn.o_proj.weight"][:, :E] @ fresh["layers.0.self_attn.v_proj.weight"][:E]
)[:E]
figure, axes = plt.subplots(figsize=(5.6, 2.9))
for i in range(L):
    axes.plot(range(1, E + 1), (spectra_LHE[i] / spectra_LHE[i, :, :1]).T, color=f"C{i}", linewidth=1)
    axes.plot([], [], color=f"C{i}", label=f"layer {i + 1}")
axes.plot(range(1, E + 1), random_E / random_E[0], "k--", linewidth=1.2, label="before training")
axes.set(
    xlabel="singular value of a head's value/output map",
    ylabel="relative to its largest",
    title="How many directions a head writes",
)
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)
print(
    "directions in effect, by layer (mean over heads):",
    [round(value, 1) for value in directions_LH.mean(1).tolist()],
    f"of {E};",
    end=" ",
)
print(f"before training {in_effect(random_E):.1f}")

# %% [markdown]
# ### Taken apart: where the heads look
#
# Over windows of the validation text: how many keys a head looks at in effect ($\exp$ of the entropy of its weights),
# and its mean weight on itself, on the previous character and on the first of the window.

# %%
x_BT = validation_N[: 32 * 2 * T].view(-1, 2 * T)[: 32 if FULL else 4]
collect = {"attention": None, "hidden_states": None}
with torch.no_grad():
    loaded.hidden(x_BT, collect=collect)
a_LBHTS = torch.stack([collect["attention"][layer] for layer in range(L)])
assert torch.allclose(a_LBHTS.sum(-1), torch.ones(()), atol=1e-4)
late_LBHTS = a_LBHTS[:, :, :, T // 2 :]  # queries with some past to choose from
keys_LH = in_effect(late_LBHTS).mean((1, 3))
later = torch.arange(T // 2, 2 * T)
on_LHK = torch.stack(
    [late_LBHTS[..., torch.arange(len(later)), column].mean((1, 3)) for column in (later, later - 1, later * 0)], dim=-1
)
rows = [f"layer {i + 1}, head {h + 1}" for i in range(L) for h in range(H)]
table = torch.cat((on_LHK.flatten(0, 1), (keys_LH / (2 * T)).flatten()[:, None]), dim=1)
figure, axes = plt.subplots(figsize=(4.6, 0.25 * len(rows) + 0.8))
axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
axes.set_xticks(range(4), ["itself", "previous", "first", "keys in\neffect"])
axes.set_yticks(range(len(rows)), rows)
for i, row in enumerate(table.tolist()):
    for j, value in enumerate(row):
        shown = f"{value:.2f}" if j < 3 else f"{value * 2 * T:.0f}"
        axes.text(j, i, shown, ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black")
axes.tick_params(length=0)
show(figure)
sharpest, widest = keys_LH.min().item(), keys_LH.max().item()
print(f"keys in effect: {sharpest:.1f} for the sharpest head, {widest:.1f} for the widest, of {2 * T}")
print(f"most weight on the previous character: {on_LHK[..., 1].max():.2f} ({rows[int(on_LHK[..., 1].argmax())]})")
assert 1 <= sharpest <= widest <= 2 * T

# %% [markdown]
# ### Taken apart: the logit lens
#
# The stream that runs through the layers is read by the head only at its end. But nothing keeps us from asking the
# final norm and the head at every layer what they would say
# ([the logit lens](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens)).

# %%
y_BT = validation_N[1 : 1 + x_BT.numel()].view_as(x_BT)
with torch.no_grad():
    lens_LBTV = torch.stack([loaded.logits(loaded.norm(h_BTD)) for h_BTD in collect["hidden_states"]])
    assert torch.allclose(lens_LBTV[-1], loaded(x_BT), atol=1e-4)  # the last layer is the model
    lens_loss = [F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten()).item() for logits_BTV in lens_LBTV]
names = ["embedding", *(f"layer {i + 1}" for i in range(L))]
for name, loss in zip(names, lens_loss, strict=True):
    print(f"{name:10} {loss:.4f} nats")
if trained("the head understands the last layer best"):
    assert lens_loss[-1] == min(lens_loss)
phrase = tokenizer.decode(x_BT[0, :40].tolist())
print(f"\n{'the text':14}", phrase.replace("\n", "↵"))
for name, logits_BTV in zip(names, lens_LBTV, strict=True):
    said = tokenizer.decode(logits_BTV[0, :39].argmax(-1).tolist())
    print(f"{name:14}", " " + said.replace("\n", "↵"))

# %% [markdown]
# A line says what that layer would have said after each character above it (shifted by one: the guess stands under
# what came). The embedding alone, read by the head it is tied to, mostly repeats what it is given; the layers turn it
# into what comes next.
#
# **Exercise 3.** `transformers.AutoModelForCausalLM.from_pretrained("notebooks/data/closer_to_modern")` must give the
# same logits. Then load any small Llama or Qwen3 with `sky_core.load("hf:DIR")` and take it apart with the cells above.
#
# ## 14. What was learned

# %%
LAST = "6 Muon and WSD"  # what the branches behind it are compared with
before = {name: LAST for name in ladder if name[0] in "789"} | {"2 ALiBi": "2 RoPE", "3 SwiGLU": "2 RoPE"}
steps_of_it = [name for name in ladder if name not in before or name == "3 SwiGLU"]
before |= {name: earlier for earlier, name in pairwise(steps_of_it)}
loss = {name: one["loss"] for name, one in ladder.items()}
effect = {name: verdict(loss[before[name]], loss[name]) if name in before else "" for name in ladder}

lines = [
    "| entry | loss (nats) | against | | characters/s | cache (bytes/character) | parameters |",
    "|---|---|---|---|---|---|---|",
]
for name, one in ladder.items():
    active = f" ({one['active']:,} active)" if "active" in one else ""
    cells = [name, f"{one['loss']:.4f}", before.get(name, ""), effect[name], f"{one['speed']:,.0f}"]
    lines.append(f"| {' | '.join(cells)} | {one['cache']:,} | {one['parameters']:,}{active} |")
cache = ladder["7 twice the context"]["cache"]
lines.append(f"| 11 all, {BUDGET:,} characters | {final:.4f} | | | {speed:,.0f} | {cache:,} | {size:,} |")
display(Markdown("\n".join(lines)))

# %%
figure, axes = plt.subplots(figsize=(7, 4))
colors = ["#5b8db8" if name in steps_of_it else "#b8c4d0" for name in ladder]
bars = axes.barh(list(loss), list(loss.values()), color=colors)
axes.bar_label(bars, fmt="%.3f", padding=3)
axes.invert_yaxis()
axes.set_xlim(left=0.9 * min(loss.values()))
axes.set(
    xlabel=f"validation loss after {STEPS} steps (nats per character)",
    title=f"Steps (dark) and branches; differences below {NOISE:.3f} mean nothing",
)
show(figure)

figure, axes = plt.subplots(figsize=(6.6, 3.1))
for name in ("0 GPT-2", "2 RoPE", "5 QK-norm", "6 Muon", "6 Muon and WSD"):
    window = max(1, STEPS // 15)
    mean_N = torch.tensor(ladder[name]["curve"]).unfold(0, window, 1).mean(-1)
    axes.plot(range(window, STEPS + 1), mean_N, linewidth=1.4, label=name)
axes.set(
    xlabel=f"step ({CHARS:,} characters each)", ylabel=f"training loss, mean of {window} steps\n(nats per character)"
)
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

gain = {name: loss[before[name]] - loss[name] for name in before}  # nats, positive where the loss fell
names = {"with QK-norm": "with it", "without": "without"}
scores = ", ".join(f"{at_rate[name][-1][1]:.1f} {words}" for name, words in names.items())
ranges = ", ".join(f"{spread_of_rates[name]:.3f} {words}" for name, words in names.items())
larger = ladder["8 experts with the bias"]["parameters"] / ladder[LAST]["parameters"]
of_bias = f"{busiest['without']:+.0%} over an equal share to {busiest['with the bias']:+.0%}"
learned = [
    (
        f"**Know the noise first.** Seeds lie {max(of_seeds) - min(of_seeds):.4f} nats apart; what differs by less "
        f"than {NOISE:.4f} is called noise here.",
        all(abs(one - other) <= NOISE for one in of_seeds for other in of_seeds),
    ),
    (f"**RMSNorm is LayerNorm without its mean**: {effect['1 RMSNorm']}.", True),
    (
        f"**Distances instead of places.** RoPE brought {gain['2 RoPE']:.4f} nats and took {T * D:,} parameters away.",
        gain["2 RoPE"] > NOISE,
    ),
    (
        f"**Twice the context without training**: plain RoPE goes from {inside['plain']:.3f} to {beyond['plain']:.3f} "
        f"nats, ALiBi from {inside['ALiBi']:.3f} to {beyond['ALiBi']:.3f}. Stretched linearly it is at "
        f"{beyond['linear']:.3f}, by YaRN at {beyond['YaRN']:.3f}, by dynamic NTK at {beyond['dynamic NTK']:.3f}; "
        f"{FURTHER['steps']} further steps make of these {further['linear']:.3f}, {further['YaRN']:.3f} and "
        f"{further['dynamic NTK']:.3f}, and {further['plain']:.3f} of the plain one.",
        beyond["ALiBi"] - inside["ALiBi"] < beyond["plain"] - inside["plain"],
    ),
    (f"**SwiGLU for equal parameters**: {effect['3 SwiGLU']}.", True),
    (
        f"**Half the cache** ({ladder['4 grouped queries']['cache']:,} bytes a character instead of "
        f"{ladder['3 SwiGLU']['cache']:,}): {effect['4 grouped queries']}.",
        2 * ladder["4 grouped queries"]["cache"] == ladder["3 SwiGLU"]["cache"],
    ),
    (
        f"**QK-norm bounds the scores**: {effect['5 QK-norm']}. At a rate of {RATES[-1]:g} the largest score is "
        f"{scores}; between the best and the worst of three rates lie {ranges} (nats).",
        spread_of_rates["with QK-norm"] < spread_of_rates["without"],
    ),
    (
        f"**Muon** brought {gain['6 Muon']:.4f} nats in as many steps, each {slower:.2f} times as long. WSD instead of "
        f"the cosine: {effect['6 Muon and WSD']}.",
        gain["6 Muon"] > NOISE,
    ),
    (
        f"**Twice the context** at equal characters: {effect['7 twice the context']}. Its last places stand at "
        f"{long_end:.3f} nats, those before {T} at {long_middle:.3f}.",
        True,
    ),
    (
        f"**Experts**: {larger:.1f} times the parameters, as many of them active: {effect['8 experts with the bias']}. "
        f"The bias takes the busiest expert from {of_bias}.",
        busiest["with the bias"] < busiest["without"],
    ),
    (
        "**Small things have to earn their place.** "
        + "; ".join(f"{name[2:]}: {words}" for name, words in effect.items() if name[0] == "9")
        + ".",
        True,
    ),
    (
        f"**muP** moves the best rate by {shift['muP']:+.2f} octaves from width {WIDTHS[0]} to {WIDTHS[-1]}, the usual "
        f"parametrisation by {shift['usual']:+.2f}. Logits move {ratios['muP']:.2f} and {ratios['usual']:.2f} times as "
        f"far at width {CHECK[-1]} as at {CHECK[0]}. At the best rate of width {BASE}, width {WIDTHS[-1]} reaches "
        f"{at_base_rate['muP']:.3f} nats under muP and {at_base_rate['usual']:.3f} without it; at the best rate of its "
        f"own {min(swept[WIDTHS[-1], 'muP']):.3f} and {min(swept[WIDTHS[-1], 'usual']):.3f}.",
        abs(shift["muP"]) < 1 and at_base_rate["muP"] < at_base_rate["usual"],
    ),
    (
        f"**The whole recipe** reaches {final:.4f} nats, {in_short:.4f} in windows of {T}, with {size:,} parameters "
        f"and {BUDGET:,} characters" + (f"; nanoGPT {NANOGPT:.4f}." if SHAKESPEARE else "."),
        in_short < NANOGPT - 0.1 or not SHAKESPEARE,
    ),
    (
        "**Drafts change nothing but the passes**: "
        + ", ".join(f"{name} {value:.2f}" for name, value in tokens_per_pass.items())
        + " characters a pass.",
        tokens_per_pass["small model"] > 1,
    ),
    (
        f"**A checkpoint is a header and bytes**: {len(tensors)} tensors behind {length:,} bytes of JSON, equal to "
        f"ours one by one. The head reads {lens_loss[0]:.2f} nats off the embedding and {lens_loss[-1]:.2f} off the "
        "last layer.",
        lens_loss[-1] < lens_loss[0],
    ),
]
for sentence, holds in learned:
    assert holds or not FULL, sentence
if not FULL:
    print("smoke mode: nothing was trained long enough, so the lines that need training are not true here")
display(Markdown("\n".join(f"{i}. {sentence}" for i, (sentence, holds) in enumerate(learned, 1) if holds)))

# %% [markdown]
# **Where to go from here.** `sky show recipes/models/qwen3-0.6b.yaml` prints what a published architecture is made of,
# `sky import hf:DIR` makes a run of a checkpoint, `sky train recipes/shakespeare.yaml data.path=...` is section 11 with
# everything tuned, and `docs/papers.md` lists every technique with its paper and its file.
