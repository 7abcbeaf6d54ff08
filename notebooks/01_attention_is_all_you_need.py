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
# # Attention is all you need, one idea at a time
#
# We begin with a table of letter pairs and end with the decoder of *Attention Is All You Need*
# (Vaswani et al. 2017, [arXiv:1706.03762](https://arxiv.org/abs/1706.03762)) in the form that GPT-2 gave it. Every
# section adds **one** idea, writes it out in a few lines of PyTorch, proves something about it with an `assert`,
# trains it, and measures what the idea was worth. Then the same model runs through the laboratory's trainer and is
# compared with [nanoGPT](https://github.com/karpathy/nanoGPT).
#
# | section | the idea | what is shown |
# |---|---|---|
# | 0 | predict the next character | the loss, in bits |
# | 1 | bigrams | training a softmax is counting |
# | 2 | average the past | one matrix product looks at every prefix at once |
# | 3 | attention | the average, with weights that the text itself decides |
# | 4 | heads | several questions at the same price |
# | 5 | positions | without them the past is a bag |
# | 6 | feed-forward | each position thinks by itself |
# | 7 | residuals and norms | why depth works |
# | 8 | the whole decoder | ours, `nano.py` and the run file are one function |
# | 9 | train it | nanoGPT's number, and what the heads learned |
# | 10 | heads and blocks | which of the two dials matters |
# | 11 | what was learned | every claim with its number |
#
# **How to read the names.** A suffix tells a tensor's shape: `x_BTD` has the axes
# B batch, T time (characters), D width of the model; and S keys, H heads, E = D/H width of a head, V vocabulary,
# L layers, N characters of a text. `a_BHTS[b, h, t, s]` is how much position t of text b looks at position s.
#
# **How to run it.** `python tools/notebooks.py run 01` (about ten minutes on two cores). `SKY_DATA` names a folder
# with `tinyshakespeare/input.txt`. `SKY_NOTEBOOK=smoke` shrinks everything to seconds; what only a trained model can
# show is then not asserted, and the output says so.

# %%
import io
import json
import math
import os
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Image, Markdown, display
from torch import nn
from torch.nn.utils.rnn import pad_sequence

SEED = 1234
FULL = os.environ.get("SKY_NOTEBOOK", "full") == "full"
T = 64  # the context: how many characters a model may look back on
D, H = (64, 4) if FULL else (32, 4)  # width of the small models, heads
STEPS, B = (500, 32) if FULL else (15, 8)  # the budget of every stage: optimizer steps, windows a step

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


# %% [markdown]
# ## 0. What we predict
#
# The text is one long row of characters. A model reads some of them and gives each possible next character a
# probability. That is all a language model does; the rest of this notebook is about doing it well.

# %%
SHAKESPEARE = "SKY_DATA" in os.environ
if SHAKESPEARE:
    text = (Path(os.environ["SKY_DATA"]) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    print("text: tinyshakespeare")
else:
    from pydoc_data.topics import topics  # the language reference that every Python carries

    text = "\n".join(topics[name] for name in sorted(topics))
    print(
        "text: Python's own documentation. SKY_DATA is not set, so nothing here can be compared with nanoGPT's number."
    )

if not (FULL and SHAKESPEARE):  # a smaller alphabet and, in smoke mode, a shorter text
    text = text if FULL else text[:40_000]
    rare = {character for character in set(text) if text.count(character) < 20}
    text = "".join(character for character in text if character not in rare)

alphabet = sorted(set(text))
V = len(alphabet)
number = {character: i for i, character in enumerate(alphabet)}


def encode(string):
    return torch.tensor([number[character] for character in string])


def decode(ids_N):
    return "".join(alphabet[i] for i in ids_N)


ids_N = encode(text)
border = int(0.9 * len(ids_N))  # the first nine tenths train, the last tenth validates: nanoGPT's split
train_N, validation_N = ids_N[:border], ids_N[border:]

assert decode(encode(text[:1000])) == text[:1000]
assert set(validation_N.tolist()) <= set(train_N.tolist())
print(f"{len(text):,} characters, {V} different: {''.join(alphabet)!r}")
print(f"{len(train_N):,} train, {len(validation_N):,} validate")
print("-" * 60, text[:180], "-" * 60, sep="\n")

# %% [markdown]
# One window of T characters holds T exercises: at each position, everything up to it is the question and the
# character after it is the answer. The targets are the inputs, shifted by one.


# %%
def draw_batch(generator, batch=B):
    """Windows from random places of the training text: (inputs x_BT, targets y_BT)."""
    start_B1 = torch.randint(len(train_N) - T, (batch, 1), generator=generator)
    window_BT = train_N[start_B1 + torch.arange(T + 1)]
    return window_BT[:, :-1], window_BT[:, 1:]


x_BT, y_BT = draw_batch(torch.Generator().manual_seed(SEED))
assert (x_BT[:, 1:] == y_BT[:, :-1]).all()
print("x_BT", tuple(x_BT.shape), " y_BT", tuple(y_BT.shape))
for t in range(8):
    print(f"t={t}  after {decode(x_BT[0, : t + 1].tolist())!r:14} comes {decode(y_BT[0, t : t + 1].tolist())!r}")

# %% [markdown]
# **The loss** is the negative logarithm of the probability that the model gave to what really came next
# (cross-entropy). With the natural logarithm its unit is the *nat*; divided by ln 2 it is the *bit*. Bits have a
# meaning: with an arithmetic coder, a model of so many bits per character compresses the text to that size. Two
# models need no training and mark the start: every character equally likely ($\log_2 V$ bits), and each as likely as
# it is frequent (the entropy of the letters).


# %%
def bits(nats):
    return nats / math.log(2)


frequency_V = torch.bincount(train_N, minlength=V) / len(train_N)
uniform = -torch.full((V,), 1 / V).log()[validation_N].mean().item()
letters = -frequency_V.log()[validation_N[1:]].mean().item()  # nothing stands before the first

assert abs(uniform - math.log(V)) < 1e-5
assert letters < uniform
losses = {"uniform": uniform, "letter frequencies": letters}  # validation loss of every stage, in nats
print(f"uniform             {uniform:.4f} nats = {bits(uniform):.3f} bits per character")
print(f"letter frequencies  {letters:.4f} nats = {bits(letters):.3f} bits per character")

# %% [markdown]
# All stages are measured the same way: on the **whole** validation split, cut into windows of T characters, no random
# sample of it. A model is anything that maps `x_BT` to `logits_BTV`.

# %%
windows_BT = pad_sequence(validation_N[:-1].split(T), batch_first=True)
answers_BT = pad_sequence(validation_N[1:].split(T), batch_first=True, padding_value=-100)  # -100: carries no loss


@torch.no_grad()
def validation_nll(model, windows_BT=windows_BT, answers_BT=answers_BT):
    """nll_BT in nats: how surprised the model was by each character of the validation split."""
    parts = [
        F.cross_entropy(model(x_BT).transpose(1, 2), y_BT, reduction="none")
        for x_BT, y_BT in zip(windows_BT.split(256), answers_BT.split(256), strict=True)
    ]
    return torch.cat(parts)


def evaluate(model):
    """Validation loss in nats per character."""
    return (validation_nll(model).sum() / (answers_BT >= 0).sum()).item()


class Frequencies(nn.Module):
    """The letter frequencies, as a model."""

    def forward(self, x_BT):
        return frequency_V.log().expand(*x_BT.shape, V)


assert abs(evaluate(Frequencies()) - letters) < 1e-4  # the windows leave no character out

# %% [markdown]
# ## 1. Bigrams: training a softmax is counting
#
# The smallest model that looks at anything looks at one character. It is a table: row a holds the logits of what
# follows a. The training loss depends on the text only through the pair counts $N_{ab}$,
#
# $$\mathcal L(W) = -\frac1N \sum_{ab} N_{ab} \log \mathrm{softmax}(W_a)_b,
#   \qquad \frac{\partial \mathcal L}{\partial W_{ab}} = \frac{N_a}{N}\,
#   \bigl(\mathrm{softmax}(W_a)_b - N_{ab}/N_a\bigr).$$
#
# The gradient is *what the model says minus what the text says*. It is zero where both agree, so the optimum is known
# without training: $\mathrm{softmax}(W_a)_b = N_{ab}/N_a$. We check the formula against autograd, then train anyway
# and arrive at the same loss.

# %%
pairs_VV = torch.bincount(train_N[:-1] * V + train_N[1:], minlength=V * V).view(V, V).double()
total_V1 = pairs_VV.sum(1, keepdim=True)
share_VV = pairs_VV / total_V1.clamp(min=1)
counted = -(pairs_VV * share_VV.clamp(min=1e-300).log()).sum().item() / pairs_VV.sum().item()

table_VV = torch.zeros(V, V, dtype=torch.double, requires_grad=True)
optimizer = torch.optim.Adam([table_VV], lr=0.2)
curve = []
for step in range(400):
    loss = -(pairs_VV * table_VV.log_softmax(dim=1)).sum() / pairs_VV.sum()
    optimizer.zero_grad()
    loss.backward()
    if step == 0:
        formula_VV = total_V1 / pairs_VV.sum() * (1 / V - share_VV)  # the table is all zeros: its softmax is 1/V
        assert torch.allclose(table_VV.grad, formula_VV, atol=1e-12)
    optimizer.step()
    curve.append(loss.item())

bigram_end = curve[-1]
print(f"training loss, counted  {counted:.4f} nats")
print(f"training loss, trained  {bigram_end:.4f} nats after {len(curve)} steps")
assert 0 <= bigram_end - counted < 0.01  # from above: pairs that never occur want logits of minus infinity

# %%
figure, axes = plt.subplots(figsize=(5, 2.6))
axes.plot(curve, label="trained softmax")
axes.axhline(counted, color="black", linestyle="--", linewidth=1, label="counted pairs")
axes.set(xlabel="step", ylabel="training loss (nats per character)", title="Training a bigram softmax is counting")
axes.legend(frameon=False)
show(figure)

# %% [markdown]
# On text that was not counted, a pair that never occurred would cost infinitely many bits. Adding one to every count
# (Laplace) avoids that. Softmax models never give a probability of zero, so they need no such repair.


# %%
class Bigram(nn.Module):
    """logits_BTV = log p(next | this character), from counts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("log_VV", ((pairs_VV + 1) / (total_V1 + V)).log().float())

    def forward(self, x_BT):
        return self.log_VV[x_BT]


unseen = (pairs_VV[validation_N[:-1], validation_N[1:]] == 0).sum().item()
losses["1 bigram"] = evaluate(Bigram())
models = {"1 bigram": Bigram()}
assert losses["1 bigram"] < losses["letter frequencies"]
print(f"{unseen} of {len(validation_N) - 1:,} validation pairs never occur in the training text")
print(f"bigram: {losses['1 bigram']:.4f} nats = {bits(losses['1 bigram']):.3f} bits per character")

# %%
shown = [c for c in "\n abcdefghijklmnopqrstuvwxyz" if c in number]
rows = encode("".join(shown))
names = [{"\n": "↵", " ": "␣"}.get(c, c) for c in shown]
figure, axes = plt.subplots(figsize=(5.2, 4.6))
image = axes.imshow(share_VV[rows][:, rows], cmap="Blues", vmin=0, vmax=0.6)
axes.set_xticks(range(len(names)), names)
axes.set_yticks(range(len(names)), names)
axes.set(xlabel="next character", ylabel="this character", title="What a bigram knows: after q comes u")
figure.colorbar(image, label="probability", shrink=0.8)
show(figure)
if "q" in number:
    assert share_VV[number["q"]].argmax() == number["u"]


# %%
@torch.no_grad()
def sample(model, characters=160, seed=SEED):
    """Text that the model writes, beginning after a line break; it sees the last T characters."""
    generator = torch.Generator().manual_seed(seed)
    ids_1T = encode("\n")[None]
    for _ in range(characters):
        p_1V = model(ids_1T[:, -T:])[:, -1].softmax(dim=-1)
        ids_1T = torch.cat((ids_1T, torch.multinomial(p_1V, 1, generator=generator)), dim=1)
    return decode(ids_1T[0].tolist())


print(sample(Bigram()))

# %% [markdown]
# **Exercise 1.** Count triples instead of pairs ($V^3$ numbers) and evaluate with add-one smoothing. Then quadruples.
# At which length does the validation loss turn upwards, and why? This is the wall that neural models climb over.
#
# ## 2. Average the past
#
# To look further back than one character we need something that takes *any number* of characters. The simplest is an
# average: position t gets the mean of positions 0..t. Here it is three times: as a loop, as a product with a
# triangular matrix, and as a softmax over scores in which the future is minus infinity. The third one looks
# needlessly clever. It is the one we will keep, because scores can be computed from the text.

# %%
torch.manual_seed(SEED)
toy_BTD = torch.randn(4, 8, 2)
toy_T = toy_BTD.shape[1]

loop_BTD = torch.zeros_like(toy_BTD)
for b in range(4):
    for t in range(toy_T):
        loop_BTD[b, t] = toy_BTD[b, : t + 1].mean(dim=0)

past_TS = torch.ones(toy_T, toy_T).tril()
product_BTD = (past_TS / past_TS.sum(1, keepdim=True)) @ toy_BTD

scores_TS = torch.zeros(toy_T, toy_T).masked_fill(past_TS == 0, -torch.inf)
softmax_BTD = scores_TS.softmax(dim=-1) @ toy_BTD

assert torch.allclose(loop_BTD, product_BTD, atol=1e-6)
assert torch.allclose(loop_BTD, softmax_BTD, atol=1e-6)
print(scores_TS.softmax(dim=-1)[:4, :4])

# %% [markdown]
# To train such things we need three pieces that stay the same until section 8: `Reader` turns characters into
# vectors, lets a `body` mix them over time and reads logits off; `train` is plain AdamW with a warm-up and a cosine;
# and `future_matters` is the test that every body has to pass: whoever can see the answer learns to copy it, and
# nothing else. Every stage gets the same budget: the same steps, windows, learning rate and seed.


# %%
class Reader(nn.Module):
    """characters -> vectors x_BTD -> body -> logits_BTV."""

    def __init__(self, body, positions=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)
        self.embed_positions = nn.Embedding(T, D) if positions else None
        self.body = body
        self.head = nn.Linear(D, V)

    def forward(self, x_BT):
        x_BTD = self.embed_tokens(x_BT)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions.weight[: x_BT.shape[1]]
        return self.head(self.body(x_BTD))


def train(model, steps=STEPS, batch=B, lr=1e-2):
    """AdamW; the training loss of each step (nats per character)."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    curve = []
    for _ in range(steps):
        x_BT, y_BT = draw_batch(generator, batch)
        loss = F.cross_entropy(model(x_BT).flatten(0, 1), y_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return curve


@torch.no_grad()
def future_matters(model):
    """Whether the logits of the first half change when the second half does."""
    x_1T = validation_N[None, :T].clone()
    before = model(x_1T)[:, : T // 2]
    x_1T[:, T // 2 :] = (x_1T[:, T // 2 :] + 1) % V
    return not torch.equal(model(x_1T)[:, : T // 2], before)


curves = {}


def stage(name, make):
    """Build, check, train and measure one stage of the ladder."""
    torch.manual_seed(SEED)
    model = make()
    assert not future_matters(model)
    start = time.perf_counter()
    curves[name], models[name] = train(model), model.eval()
    losses[name] = evaluate(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    print(f"{name}: {losses[name]:.4f} nats = {bits(losses[name]):.3f} bits  ({size:,} parameters, {seconds:.0f} s)")


# %%
class AveragePast(nn.Module):
    """y_t = mean of x_0 .. x_t."""

    def forward(self, x_BTD):
        past_TS = torch.ones(x_BTD.shape[1], x_BTD.shape[1]).tril()
        return (past_TS / past_TS.sum(1, keepdim=True)) @ x_BTD


stage("2 average of the past", lambda: Reader(AveragePast()))
if trained("an average of the whole past is worse than the last character alone"):
    assert losses["2 average of the past"] > losses["1 bigram"]

# %% [markdown]
# It sees 64 times as much as the bigram and does **worse**: in an average, the last character is one among many, and
# the last character is what matters most. What is missing is a way to look at *some* of the past.
#
# **Exercise 2.** Replace the mean by one with weights that decay with distance, $w^{t-s}$, and learn $w$. How close
# to the bigram do you get? (State-space models grow out of this idea.)
#
# ## 3. Attention: an average with weights that the text decides
#
# Each position sends out three vectors, all linear in its $x$: a **query** (what am I looking for?), a **key** (what
# am I?), a **value** (what do I tell those who look at me?). The score of query t for key s is their inner product; a
# softmax over the visible keys turns scores into weights, and the output is the weighted mean of the values (section
# 3.2.1, equation 1):
#
# $$\mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{E}}\right) V$$
#
# The mask is the triangle of section 2. With queries of zero all scores are equal, and attention *is* the average of
# the past.


# %%
def attention(q_BTE, k_BSE, v_BSE, scale=None):
    """Causal attention: (y_BTE, a_BTS), the result and the weights. Any axes may stand before T (heads will)."""
    time, width = q_BTE.shape[-2:]
    scores_BTS = q_BTE @ k_BSE.mT * (width**-0.5 if scale is None else scale)
    future_TS = torch.ones(time, time, dtype=torch.bool).triu(diagonal=1)
    a_BTS = scores_BTS.masked_fill(future_TS, -torch.inf).softmax(dim=-1)
    return a_BTS @ v_BSE, a_BTS


torch.manual_seed(SEED)
q_BTE, k_BSE, v_BSE = torch.randn(3, 4, 8, 16)
y_BTE, a_BTS = attention(q_BTE, k_BSE, v_BSE)
print("q_BTE", tuple(q_BTE.shape), " a_BTS", tuple(a_BTS.shape), " y_BTE", tuple(y_BTE.shape))

assert torch.allclose(a_BTS.sum(-1), torch.ones(4, 8))  # weights of a mean
assert (a_BTS.triu(1) == 0).all()  # no weight on the future
assert torch.allclose(attention(torch.zeros_like(q_BTE), k_BSE, v_BSE)[0], AveragePast()(v_BSE), atol=1e-6)
assert torch.allclose(y_BTE, F.scaled_dot_product_attention(q_BTE, k_BSE, v_BSE, is_causal=True), atol=1e-6)

# %% [markdown]
# **Why $1/\sqrt E$?** A sum of E products of independent numbers of variance 1 has variance E. Without the scale,
# wide heads start with huge scores, the softmax puts everything on one key, and its derivative ($\partial a_s /
# \partial z_s = a_s (1 - a_s)$) is nearly zero: nothing can be learned. Measured on random queries and keys:

# %%
torch.manual_seed(SEED)
widths, keys = [4, 16, 64, 256, 1024], 64
spread, slope = {True: [], False: []}, {True: [], False: []}
for width in widths:
    z_NS = torch.randn(2000, 1, width) @ torch.randn(2000, width, keys)
    assert abs(z_NS.var() / width - 1) < 0.1
    for scaled in (True, False):
        a_NS = (z_NS * (width**-0.5 if scaled else 1)).softmax(dim=-1)[:, 0]
        entropy_N = -(a_NS * a_NS.clamp(min=1e-30).log()).sum(-1)
        spread[scaled].append(entropy_N.exp().mean().item())
        slope[scaled].append((a_NS * (1 - a_NS)).sum(-1).mean().item())
print("width of the head            ", *(f"{w:7}" for w in widths))
for scaled in (True, False):
    word = "scaled  " if scaled else "unscaled"
    print(f"{word}: keys in effect       ", *(f"{v:7.2f}" for v in spread[scaled]))
    print(f"{word}: slope of the softmax ", *(f"{v:7.3f}" for v in slope[scaled]))
assert max(slope[True]) - min(slope[True]) < 0.05  # the same for every width
assert slope[False][-1] < 0.2 * slope[True][-1]  # saturated
assert spread[False][-1] < 2 < 20 < spread[True][-1]

# %%
figure, axes = plt.subplots(figsize=(5, 2.8))
axes.semilogx(widths, spread[True], "o-", base=2, label=r"scores divided by $\sqrt{E}$")
axes.semilogx(widths, spread[False], "s--", base=2, label="raw scores")
axes.set(
    xlabel="width of a head, E",
    ylabel="keys in effect, of 64\n(exp of the entropy)",
    title="Without the scale a wide head sees one key",
    ylim=(0, 64),
)
axes.legend(frameon=False, loc="upper right")
show(figure)


# %%
class Head(nn.Module):
    """One head as wide as the model."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)

    def forward(self, x_BTD):
        y_BTD, self.a_BTS = attention(self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD))
        return y_BTD


stage("3 one head of attention", lambda: Reader(Head()))
if trained("attention is better than the average"):
    assert losses["3 one head of attention"] < losses["2 average of the past"]

# %% [markdown]
# What does it look at? Row t of the map shows where position t looks. Before training the weights are nearly those of
# the average. Afterwards the head searches by *content*: knowing no positions, the only way to find its own character
# is to look for characters like it.

# %%
phrase = "First, we are seated; then we see the sea." if SHAKESPEARE else "The same sentence is seen as the same set."
phrase = "".join(c for c in phrase if c in number)[:T]
phrase_1T = encode(phrase)[None]
torch.manual_seed(SEED)
fresh = Reader(Head())
maps, same_TS = {}, (phrase_1T[0][:, None] == phrase_1T[0]).tril()
for name, model in (("before training", fresh), ("after training", models["3 one head of attention"])):
    model(phrase_1T)
    maps[name] = model.body.a_BTS[0].detach()
on_same = {name: (a_TS * same_TS).sum(-1).mean().item() for name, a_TS in maps.items()}
print("weight on the same character:", {name: round(value, 3) for name, value in on_same.items()})
if trained("the head looks for characters like its own"):
    assert on_same["after training"] > 2 * on_same["before training"]

# %%
ticks = [{"\n": "↵", " ": "␣"}.get(c, c) for c in phrase]
figure, both = plt.subplots(1, 2, figsize=(9.5, 4.9), sharey=True)
for axes, (name, a_TS) in zip(both, maps.items(), strict=True):
    axes.imshow(a_TS.sqrt(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(ticks)), ticks, fontsize=6)
    axes.set_yticks(range(len(ticks)), ticks, fontsize=6)
    axes.set(xlabel="key: what is looked at", title=name)
both[0].set_ylabel("query: who looks")
figure.suptitle(
    "One head without positions looks for its own character (colour: square root of the weight)", fontsize=10
)
show(figure)

# %% [markdown]
# ## 4. Heads: several questions at the same price
#
# One softmax asks one question. Split the width D into H heads of width E = D/H, let each attend by itself, and join
# the answers with one more matrix (section 3.2.2). Every head has its own map, and the number of parameters and of
# multiplications stays what it was.


# %%
class SelfAttention(nn.Module):
    """Multi-head attention; the names are those of `sky_core.model.nano`."""

    def __init__(self, d_model=D, n_head=H):
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def split(self, x_BTD):
        batch, time, _ = x_BTD.shape
        return x_BTD.view(batch, time, self.n_head, -1).transpose(1, 2)  # x_BHTE

    def forward(self, x_BTD):
        q_BHTE, k_BHTE, v_BHTE = (self.split(proj(x_BTD)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y_BHTE, self.a_BHTS = attention(q_BHTE, k_BHTE, v_BHTE)
        return self.o_proj(y_BHTE.transpose(1, 2).reshape(x_BTD.shape))


torch.manual_seed(SEED)
layer, x_BTD = SelfAttention(), torch.randn(2, 10, D)
one_by_one_BTD = torch.cat(
    [
        attention(*(proj(x_BTD)[..., e : e + D // H] for proj in (layer.q_proj, layer.k_proj, layer.v_proj)))[0]
        for e in range(0, D, D // H)
    ],
    dim=-1,
)
assert torch.allclose(layer(x_BTD), layer.o_proj(one_by_one_BTD), atol=1e-6)  # heads are slices, side by side
sizes = {n: sum(p.numel() for p in SelfAttention(n_head=n).parameters()) for n in (1, 2, 4, 8)}
assert set(sizes.values()) == {4 * D * D}  # whatever the number of heads
print("x_BTD", tuple(x_BTD.shape), " a_BHTS", tuple(layer.a_BHTS.shape), " parameters by heads:", sizes)

# %%
stage("4 four heads", lambda: Reader(SelfAttention()))
if trained("four heads are no worse than one"):
    assert losses["4 four heads"] < losses["3 one head of attention"] + 0.03
print(f"four heads instead of one: {losses['4 four heads'] - losses['3 one head of attention']:+.4f} nats")

# %% [markdown]
# ## 5. Positions: without them the past is a bag
#
# Neither the scores nor the mean know where a key stands. We prove it: shuffle everything before the last character,
# and the prediction after the last character stays the same. So *dog bites man* is *man bites dog*. The cure is to
# add to each character's vector one that stands for its place (a learned table here; the paper's sines and cosines,
# section 3.5, work as well).


# %%
@torch.no_grad()
def order_matters(model):
    """How much the last logits change when the characters before the last are shuffled (relative)."""
    x_BT = validation_N[: 8 * T].view(8, T)
    shuffled_BT = torch.cat((x_BT[:, torch.randperm(T - 1)], x_BT[:, -1:]), dim=1)
    before, after = model(x_BT)[:, -1], model(shuffled_BT)[:, -1]
    return ((after - before).norm() / before.norm()).item()


torch.manual_seed(SEED)
blind = order_matters(models["4 four heads"])
sighted = order_matters(Reader(SelfAttention(), positions=True))
two_layers = order_matters(Reader(nn.Sequential(SelfAttention(), SelfAttention())))
print(f"change of the prediction when the past is shuffled: without positions {blind:.1e}, with {sighted:.1e},")
print(f"two layers without positions {two_layers:.1e}")
assert blind < 1e-5  # rounding
assert sighted > 100 * blind
assert two_layers > 100 * blind

# %% [markdown]
# The third number is a surprise worth knowing: **two** causal layers do see order without being told. In the first
# layer each position averages another prefix, so its output already carries a trace of where it stands, and the
# second layer can read it ([arXiv:2305.19466](https://arxiv.org/abs/2305.19466)). One layer cannot.

# %%
stage("5 + positions", lambda: Reader(SelfAttention(), positions=True))
if trained("knowing the order helps"):
    assert losses["5 + positions"] < losses["4 four heads"] - 0.05
    assert losses["5 + positions"] < losses["1 bigram"]

# %% [markdown]
# **A comparison of ideas is also one of budgets.** The learning rate of the ladder was chosen: a table of positions
# learns slowly, and with a rate of $3 \cdot 10^{-3}$ instead of $10^{-2}$ these few steps hardly show what it is
# worth. The same two stages again, with the small rate:

# %%
slow = {}
for positions in (False, True):
    torch.manual_seed(SEED)
    model = Reader(SelfAttention(), positions)
    train(model, lr=3e-3)
    slow[positions] = evaluate(model)
slow_gain, fast_gain = slow[False] - slow[True], losses["4 four heads"] - losses["5 + positions"]
print(f"positions are worth {fast_gain:+.4f} nats at the rate of the ladder, {slow_gain:+.4f} at 0.003 ({STEPS} steps)")
if trained("what positions are worth depends on the learning rate"):
    assert fast_gain > slow_gain + 0.02

# %% [markdown]
# **Exercise 3.** Write the sines and cosines of section 3.5 into `Reader` (no parameters). Compare the loss. Then
# evaluate both models on windows of `2 * T`: which of the two can be evaluated at all?
#
# ## 6. Feed-forward: each position thinks by itself
#
# Attention moves information between positions, but what it does to the values is linear. The second half of a
# Transformer layer is a small network applied to each position separately, four times as wide inside (section 3.3;
# GPT-2 has GELU where the paper has ReLU). It mixes nothing over time: permuting the positions permutes its outputs.


# %%
class MLP(nn.Module):
    """W_down gelu(W_up x)."""

    def __init__(self, d_model=D):
        super().__init__()
        self.up_proj = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down_proj = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x_BTD):
        return self.down_proj(F.gelu(self.up_proj(x_BTD)))


torch.manual_seed(SEED)
mlp, order_T = MLP(), torch.randperm(10)
assert torch.allclose(mlp(x_BTD[:, order_T]), mlp(x_BTD)[:, order_T], atol=1e-6)
assert sum(p.numel() for p in mlp.parameters()) == 8 * D * D  # twice as many as attention
print("x_BTD", tuple(x_BTD.shape), " hidden units", tuple(mlp.up_proj(x_BTD).shape), " output", tuple(mlp(x_BTD).shape))

# %%
stage("6 + feed-forward", lambda: Reader(nn.Sequential(SelfAttention(), MLP()), positions=True))
if trained("thinking helps"):
    assert losses["6 + feed-forward"] < losses["5 + positions"]

# %% [markdown]
# ## 7. Residuals and norms: why depth works
#
# The natural next step is to stack such layers. Four ways to wire each part f (attention, then feed-forward):
#
# | wiring | formula | |
# |---|---|---|
# | plain | $f(x)$ | each layer replaces what was there |
# | residual | $x + f(x)$ | each layer adds to a stream that runs through |
# | post-norm | $\mathrm{norm}(x + f(x))$ | the paper (section 3.1) |
# | pre-norm | $x + f(\mathrm{norm}(x))$ | GPT-2, and nearly everything since |
#
# LayerNorm gives each vector mean 0 and variance 1 and then a learned gain. All matrices start at $\mathcal N(0,
# 1/\text{inputs})$, which keeps the variance of what passes through a matrix, so plain stacks get a fair chance.
# First the gradients at the start, then the loss that training reaches.


# %%
class Wired(nn.Module):
    """One layer, wired in one of four ways."""

    def __init__(self, wiring):
        super().__init__()
        self.wiring = wiring
        self.parts = nn.ModuleList([SelfAttention(), MLP()])
        self.norms = nn.ModuleList([nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)])

    def forward(self, x_BTD):
        for f, norm in zip(self.parts, self.norms, strict=True):
            if self.wiring == "plain":
                x_BTD = f(x_BTD)
            elif self.wiring == "residual":
                x_BTD = x_BTD + f(x_BTD)
            elif self.wiring == "post-norm":
                x_BTD = norm(x_BTD + f(x_BTD))
            else:
                x_BTD = x_BTD + f(norm(x_BTD))
        return x_BTD


def stack(wiring, depth):
    """`depth` layers; a pre-norm stack ends with a norm, because nothing else norms its stream."""
    torch.manual_seed(SEED)
    end = nn.LayerNorm(D, bias=False) if wiring == "pre-norm" else nn.Identity()
    model = Reader(nn.Sequential(*(Wired(wiring) for _ in range(depth)), end), positions=True)
    for parameter in model.body.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


WIRINGS = ["plain", "residual", "post-norm", "pre-norm"]
DEEP = 12
gradient = {}
for wiring in WIRINGS:
    model = stack(wiring, DEEP)
    x_BT, y_BT = draw_batch(torch.Generator().manual_seed(SEED))
    F.cross_entropy(model(x_BT).flatten(0, 1), y_BT.flatten()).backward()
    gradient[wiring] = [layer.parts[1].down_proj.weight.grad.norm().item() for layer in model.body[:DEEP]]
print(f"norm of the gradient of down_proj at the start: layer 1, layer {DEEP // 2}, layer {DEEP}")
for wiring, norms in gradient.items():
    print(f"{wiring:10}", *(f"{norms[layer - 1]:10.1e}" for layer in (1, DEEP // 2, DEEP)))

assert max(gradient["plain"]) < 0.1 * min(gradient["pre-norm"])  # vanishes
assert min(gradient["residual"]) > 100 * max(gradient["pre-norm"])  # explodes
assert min(gradient["pre-norm"] + gradient["post-norm"]) > 0.01
assert max(gradient["pre-norm"] + gradient["post-norm"]) < 10
assert gradient["pre-norm"][-1] < gradient["post-norm"][-1]

# %%
STYLES = dict(zip(WIRINGS, ["s--", "^:", "D-.", "o-"], strict=True))
figure, axes = plt.subplots(figsize=(5.4, 3.2))
for wiring in WIRINGS:
    axes.semilogy(range(1, DEEP + 1), gradient[wiring], STYLES[wiring], markersize=4, label=wiring)
axes.set(
    xlabel="layer (1 is next to the input)",
    ylabel="gradient norm at the start",
    title="Norms keep the gradient of every layer near one",
)
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

# %% [markdown]
# Without norms, the plain stack hands its layers next to nothing and the residual one far too much. Norms keep the
# gradient in bounds at every layer. Of the two that do, pre-norm is the gentler at the last layer; Xiong et al. 2020
# ([arXiv:2002.04745](https://arxiv.org/abs/2002.04745)) trace to this that post-norm needs a careful warm-up and
# pre-norm does not. What does training make of it? (A smaller batch than elsewhere, to save time.)

# %%
DEPTHS, SHORT = ([1, 2, 6], 150) if FULL else ([1, 2], 4)
reached = {wiring: [] for wiring in WIRINGS}
for depth in DEPTHS:
    for wiring in WIRINGS:
        model = stack(wiring, depth)
        train(model, steps=SHORT, batch=B // 2)
        reached[wiring].append(evaluate(model))
print(f"validation loss after {SHORT} steps (nats per character), depth {DEPTHS}")
for wiring in WIRINGS:
    print(f"{wiring:10}", *(f"{loss:8.4f}" for loss in reached[wiring]))

# %%
figure, axes = plt.subplots(figsize=(5.4, 3.2))
for wiring in WIRINGS:
    axes.plot(DEPTHS, [bits(loss) for loss in reached[wiring]], STYLES[wiring], markersize=4, label=wiring)
axes.set_xticks(DEPTHS)
top = bits(uniform) + 0.5
axes.set(
    xlabel="layers",
    ylabel="validation loss\n(bits per character)",
    title=f"Depth needs residuals and norms ({SHORT} steps)",
    ylim=(None, top),
)
off = [wiring for wiring in WIRINGS if bits(max(reached[wiring])) > top]
axes.set_title(f"beyond the scale: {', '.join(off)}" if off else "", loc="right", fontsize=7, y=0.93)
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)
if trained("depth hurts a plain stack, not a pre-norm one; post-norm falls behind without a long warm-up"):
    assert reached["plain"][-1] > reached["plain"][0]
    assert reached["pre-norm"][-1] < reached["pre-norm"][0] + 0.1
    assert reached["pre-norm"][-1] < reached["plain"][-1] - 0.1
    assert reached["pre-norm"][-1] < reached["post-norm"][-1]

# %% [markdown]
# **Exercise 4.** Post-norm is what the paper trained. Give it the paper's warm-up (section 5.3: hundreds of steps,
# not 50) and more steps: how much of the gap closes? See [arXiv:2002.04745](https://arxiv.org/abs/2002.04745).
#
# From here on the layer is pre-norm. One such block, and four of them, at the budget of the earlier stages:


# %%
class Block(nn.Module):
    """Look at the others, then think; each adds to the stream."""

    def __init__(self, d_model=D, n_head=H):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(d_model, bias=False)
        self.self_attn = SelfAttention(d_model, n_head)
        self.post_attention_layernorm = nn.LayerNorm(d_model, bias=False)
        self.mlp = MLP(d_model)

    def forward(self, x_BTD):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def blocks(n_layer, n_head=H):
    stack = (Block(n_head=n_head) for _ in range(n_layer))
    return Reader(nn.Sequential(*stack, nn.LayerNorm(D, bias=False)), positions=True)


stage("7 + residual and norm", lambda: blocks(1))
stage("7 four blocks", lambda: blocks(4))
if trained("residual and norm help, and with them depth does"):
    assert losses["7 + residual and norm"] < losses["6 + feed-forward"]
    assert losses["7 four blocks"] < losses["7 + residual and norm"] - 0.03

# %% [markdown]
# ## 8. The whole decoder
#
# What is left are two touches. The head **shares its weights** with the embedding (section 3.4): the vector that
# means a character on the way in is the one that scores it on the way out. And the projections that write into the
# stream **start smaller** by $\sqrt{2 L}$, so that 2L additions do not make it grow (GPT-2). This is the decoder,
# whole:


# %%
class Decoder(nn.Module):
    def __init__(self, n_layer, n_head, d_model):
        super().__init__()
        self.embed_tokens = nn.Embedding(V, d_model)
        self.embed_positions = nn.Embedding(T, d_model)
        self.layers = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if into_stream else 0.02)

    def forward(self, x_BT):
        x_BTD = self.embed_tokens(x_BT) + self.embed_positions.weight[: x_BT.shape[1]]
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.norm(x_BTD) @ self.embed_tokens.weight.T


L, HEADS, WIDTH = (4, 4, 128) if FULL else (2, 4, 32)  # nanoGPT's recipe for the CPU
torch.manual_seed(SEED)
ours = Decoder(L, HEADS, WIDTH)
size = sum(parameter.numel() for parameter in ours.parameters())
assert size == V * WIDTH + T * WIDTH + L * 12 * WIDTH**2 + (2 * L + 1) * WIDTH
assert not future_matters(ours)
at_start = evaluate(ours)
assert abs(at_start - uniform) < 0.1  # small weights: at the start it knows nothing, and says so
print(f"{size:,} parameters, of which {L * 12 * WIDTH**2:,} stand in the {L} blocks (12 D² each)")
print(f"loss before training {at_start:.4f} nats, uniform {uniform:.4f}")

# %% [markdown]
# **Is it the real thing?** `sky_core.model.nano` is the same model in one file, with dropout and generation. Its
# names are ours, so the weights load without translation, and the logits must be equal.

# %%
from sky_core.model import nano

one_file = nano.GPT(nano.Config(V, max_length=T, n_layer=L, n_head=HEADS, d_model=WIDTH, bias=False))
one_file.load_state_dict(ours.state_dict())
x_BT = windows_BT[:4]
with torch.no_grad():
    difference = ((one_file(x_BT) - ours(x_BT)).norm() / ours(x_BT).norm()).item()
print(f"this notebook and nano.py: logits differ by {difference:.1e} (relative)")
assert difference < 1e-5

# %% [markdown]
# And the third form: a **run file** composes the model of parts, each chosen by name, so that any of them can be
# replaced by another (`position: rope`, `norm: rmsnorm`, an attention from a plugin) without touching code. The
# recipe of section 9 gives the same function once more.

# %%
from sky_core.config import read_run

RECIPE = Path("../recipes/nanogpt_cpu.yaml")
size_of_model = [f"model.n_layer={L}", f"model.n_head={HEADS}", f"model.d_model={WIDTH}"]
run = read_run(RECIPE, size_of_model)
print("model:" + RECIPE.read_text().partition("\nmodel:")[2].partition("eval:")[0])
torch.manual_seed(SEED)
composed = run.model.build(V)
assert abs(evaluate(composed) - uniform) < 0.1  # it starts as ignorant as ours
renamed = {
    name.replace("embed_positions.", "positions.0.embed_positions."): value for name, value in ours.state_dict().items()
}
composed.load_state_dict(renamed)
with torch.no_grad():
    difference = ((composed(x_BT) - ours(x_BT)).norm() / ours(x_BT).norm()).item()
print(f"this notebook and the run file's decoder: logits differ by {difference:.1e} (relative)")
assert difference < 1e-5

# %% [markdown]
# ## 9. Train it: nanoGPT's recipe
#
# nanoGPT's README trains this model on a CPU: 4 blocks, 4 heads, width 128, windows of 64 characters, 12 a step, 2000
# steps of AdamW. The loss of 1.88 that it prints is an estimate from 20 random batches. Measured on the whole
# validation split, that run of nanoGPT reaches 1.8982 nats per character. Here the recipe is a run file, and the
# laboratory's trainer takes it from here: metrics, evaluations and checkpoints go to a run directory, and a killed
# run could be resumed.

# %%
import sky_core

NANOGPT = 1.8982  # nats per character: its code, its seed, whole validation split (measured for the recipe's header)
NEAR = 0.03  # the spread that another seed and another order of the data may make

Path("data").mkdir(exist_ok=True)
Path("data/text.txt").write_text(text, encoding="utf-8")
options = ["data.path=data/text.txt", "log.every=250", "sample.every=null", *size_of_model]
if not FULL:
    options += ["train.steps=10", "eval.every=5", "checkpoint.every=10", "log.every=1", "schedule.warmup=2"]
result = sky_core.train(RECIPE, overrides=options)

losses["9 nanoGPT's recipe"] = result.evaluation["loss"]
assert result.state == "done"
print("whole validation split:", {name: round(value, 4) for name, value in result.evaluation.items()})


# %%
def results(name):
    """The measures that a benchmark of this repository has recorded; none where it was not run yet."""
    path = Path("../benchmarks/results") / f"{name}.json"
    if not path.exists():
        print(f"benchmarks/results/{path.name} is not there: nothing recorded to compare with")
        return []
    return json.loads(path.read_text(encoding="utf-8"))["measures"]


here = losses["9 nanoGPT's recipe"]
if SHAKESPEARE and trained("nanoGPT's number is reached"):
    print(f"nanoGPT {NANOGPT:.4f} nats, this run {here:.4f} nats: {here - NANOGPT:+.4f}")
    assert here < NANOGPT + NEAR
elif not SHAKESPEARE:
    print("another text than nanoGPT's: its number cannot be compared with this one")
for measure in results("nanogpt_cpu"):
    print(f"recorded by benchmarks/: {measure['what']}: {measure['value']:.4g} {measure['unit']} ({measure['n']} runs)")

# %% [markdown]
# **Load it back** as anyone would: one call gives the model and its tokenizer. Our own evaluation of section 0 and
# the laboratory's must agree: two programs, one number.

# %%
model, tokenizer = sky_core.load(result.directory)
assert "".join(tokenizer.decode([i]) for i in range(tokenizer.vocab_size)) == "".join(alphabet)  # ids mean the same
models["9 nanoGPT's recipe"] = model
assert not future_matters(model)
assert abs(evaluate(model) - here) < 1e-3
print(f"this notebook measures {evaluate(model):.4f} nats, the trainer measured {here:.4f}")

# %%
from sky_core.run_directory import RunDirectory

events = [event for event in RunDirectory.open(result.directory).events() if event["event"] == "eval"]
tokens_a_step = run.train.batch_tokens
figure, axes = plt.subplots(figsize=(5.6, 3.2))
axes.plot([e["step"] for e in events], [bits(e["loss"]) for e in events], "o-", markersize=4, label="this run")
if SHAKESPEARE and FULL:
    axes.axhline(bits(NANOGPT), color="black", linestyle="--", linewidth=1, label="nanoGPT, at its end")
axes.set(xlabel="step", ylabel="validation loss\n(bits per character)", title="nanoGPT's recipe in this laboratory")
axes.legend(frameon=False)
show(figure)

# %% [markdown]
# ### The ladder
#
# Every stage on one scale. The stages 2 to 7 had equal budgets; the last one is wider and trained as nanoGPT trains.
# (The stages 1 and *letter frequencies* count, so they have seen the whole training text.)

# %%
names = list(losses)
values = [bits(losses[name]) for name in names]
figure, axes = plt.subplots(figsize=(7, 3.9))
bars = axes.barh(names, values, color=["#b8c4d0"] * 3 + ["#5b8db8"] * (len(names) - 4) + ["#1f4e79"])
axes.bar_label(bars, fmt="%.2f", padding=3)
axes.invert_yaxis()
axes.set(xlabel="validation loss (bits per character)", title="What each idea is worth")
show(figure)
for before, name in pairwise(names):
    print(f"{name:24} {losses[name]:.4f} nats  {losses[name] - losses[before]:+.4f}")
if trained("the whole decoder is the best of all"):
    assert min(losses, key=losses.get) == "9 nanoGPT's recipe"

# %%
figure, axes = plt.subplots(figsize=(7, 3.9))
window = max(1, STEPS // 20)
for name, curve in curves.items():
    smooth = torch.tensor(curve).unfold(0, window, 1).mean(-1) / math.log(2)
    axes.plot(range(window, len(curve) + 1), smooth, linewidth=1.4, label=name)
axes.axhline(bits(losses["1 bigram"]), color="black", linestyle="--", linewidth=1, label="1 bigram (validation)")
axes.set(
    xlabel=f"step ({B * T:,} characters each)",
    ylabel=f"training loss, mean of {window} steps\n(bits per character)",
    title="Every idea bends the curve further down",
)
if FULL:
    axes.set_ylim(top=bits(losses["letter frequencies"]))
axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure)

# %% [markdown]
# The same in text. All of them start after a line break with the same seed.

# %%
for name, stage_model in models.items():
    if name != "9 nanoGPT's recipe":
        print(f"--- {name}: {bits(losses[name]):.2f} bits", sample(stage_model), sep="\n")
print(f"--- 9 nanoGPT's recipe: {bits(here):.2f} bits")
print(sky_core.generate(model, tokenizer, "\n", max_new_tokens=400, temperature=1.0, seed=SEED))

# %% [markdown]
# ### More context helps
#
# The first character of a window is predicted from one character, the last from 64. The mean loss at each place shows
# what the model gains from looking back; a bigram gains nothing after its first character.

# %%
edges = [0, *(2**i for i in range(int(math.log2(T)) + 1))]  # places 1, 2, 3 to 4, 5 to 8, ...


def by_context(name):
    """Bits per character, averaged over places that see about equally much."""
    nll_BT, seen_BT = validation_nll(models[name]), answers_BT >= 0
    return [bits((nll_BT[:, a:b].sum() / seen_BT[:, a:b].sum()).item()) for a, b in pairwise(edges)]


at = {name: by_context(name) for name in ("1 bigram", "9 nanoGPT's recipe")}
figure, axes = plt.subplots(figsize=(5.6, 3.2))
for name, style in zip(at, ("s--", "o-"), strict=True):
    axes.semilogx(edges[1:], at[name], style, base=2, label=name)
axes.set(
    xlabel="characters that are seen, at most",
    ylabel="validation loss\n(bits per character)",
    title="The context pays, its beginning most",
)
axes.legend(frameon=False)
show(figure)
alone, middle, late = (at["9 nanoGPT's recipe"][i] for i in (0, 3, -1))
print(f"seeing 1 character {alone:.3f} bits, 5 to 8 {middle:.3f}, more than half of the window {late:.3f}")
if trained("more context helps, its beginning most"):
    assert late < middle < alone
    assert middle - late < alone - middle

# %% [markdown]
# ### What the heads learned
#
# `collect` asks a model for its attention maps. Here are those of one sentence: one row per layer, one column per
# head.

# %%
phrase = (
    "ROMEO:\nWhat, shall we see the king to-morrow night?"
    if SHAKESPEARE
    else "A class is a class of a class is a type."
)
phrase = "".join(c for c in phrase if c in number)[:T]
ticks = [{"\n": "↵", " ": "␣"}.get(c, c) for c in phrase]
collect = {"attention": None}
with torch.no_grad():
    model.hidden(encode(phrase)[None], collect=collect)
maps_LHTS = torch.cat([collect["attention"][layer] for layer in range(L)])
assert maps_LHTS.shape == (L, HEADS, len(phrase), len(phrase))
assert torch.allclose(maps_LHTS.sum(-1), torch.ones(L, HEADS, len(phrase)), atol=1e-5)

figure, grid = plt.subplots(L, HEADS, figsize=(2.2 * HEADS, 2.3 * L + 0.6), sharex=True, sharey=True, squeeze=False)
for layer in range(L):
    for head in range(HEADS):
        axes = grid[layer][head]
        axes.imshow(maps_LHTS[layer, head].sqrt(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        axes.set_xticks(range(0, len(ticks), 8))
        axes.set_yticks(range(0, len(ticks), 8))
figure.supxlabel("key: position that is looked at", fontsize=9)
figure.supylabel("query: position that looks", fontsize=9)
figure.suptitle(f"Attention in {phrase!r} (colour: square root of the weight)", fontsize=10)
show(figure)

# %% [markdown]
# Looking at maps tempts one to tell stories, so we measure. For every head, over many windows of the validation
# split: how much weight goes to the position itself, to the **previous** one, to the first of the window, to earlier
# copies of the **same** character, and to what came right **after** such a copy (an *induction* head,
# [arXiv:2209.11895](https://arxiv.org/abs/2209.11895)). The last row is what equal weights on the past would give.


# %%
def head_scores(a_BLHTS, x_BT):
    """score_LHK: mean weight on each of the `KINDS` of keys, over queries with some past to choose from."""
    time = x_BT.shape[1]
    same_BTS = (x_BT[:, :, None] == x_BT[:, None, :]).tril(diagonal=-1)
    after_BTS = same_BTS.roll(1, dims=2).tril()
    after_BTS[:, :, 0] = False
    eye_TS = torch.eye(time, dtype=torch.bool)
    first_TS = torch.zeros(time, time, dtype=torch.bool)
    first_TS[:, 0] = True
    places = [eye_TS, eye_TS.roll(-1, dims=1).tril(), first_TS]
    kinds_KBTS = torch.stack([*(place.expand_as(same_BTS) for place in places), same_BTS, after_BTS]).float()
    return torch.einsum("blhts,kbts->blhtk", a_BLHTS, kinds_KBTS)[:, :, :, time // 4 :].mean((0, 3))


KINDS = ["itself", "previous", "first", "same\ncharacter", "after the\nsame"]
x_BT = windows_BT[: 64 if FULL else 8]
x_BT = x_BT[(answers_BT[: len(x_BT)] >= 0).all(1)]
collect = {"attention": None}
with torch.no_grad():
    model.hidden(x_BT, collect=collect)
a_BLHTS = torch.stack([collect["attention"][layer] for layer in range(L)], dim=1)
score_LHK = head_scores(a_BLHTS, x_BT)
past_TS = torch.ones(T, T).tril()
equal_K = head_scores((past_TS / past_TS.sum(1, keepdim=True)).expand(len(x_BT), 1, 1, T, T), x_BT)[0, 0]

toy_1T = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])  # a text in which the right answers are known
perfect_TS = torch.zeros(8, 8)
perfect_TS[range(3, 8), range(1, 6)] = 1  # each looks at what came after its last copy
assert head_scores(perfect_TS.expand(1, 1, 1, 8, 8), toy_1T)[0, 0, 4] >= 5 / 6 - 1e-6
assert abs(head_scores(torch.eye(8).roll(-1, 0).tril().expand(1, 1, 1, 8, 8), toy_1T)[0, 0, 1]) < 1.01

rows = [f"layer {layer + 1}, head {head + 1}" for layer in range(L) for head in range(HEADS)] + ["equal weights"]
table = torch.cat((score_LHK.flatten(0, 1), equal_K[None]))
figure, axes = plt.subplots(figsize=(5.2, 0.27 * len(rows) + 0.9))
axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
axes.set_xticks(range(len(KINDS)), KINDS)
axes.set_yticks(range(len(rows)), rows)
for i, row in enumerate(table.tolist()):
    for j, value in enumerate(row):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black")
axes.axhline(len(rows) - 1.5, color="black", linewidth=0.8)
axes.set_title("Mean weight of each head on five kinds of keys")
axes.tick_params(length=0)
show(figure)

# %%
previous = score_LHK[:, :, 1]
best = int(previous.argmax())
before = f"layer {best // HEADS + 1}, head {best % HEADS + 1}"
print(f"previous-character head: {before}: {previous.max():.3f} of its weight, equal weights {equal_K[1]:.3f}")
if trained("some head looks at the previous character"):
    assert previous.max() > 3 * equal_K[1]


# %% [markdown]
# **Do these heads matter?** A map shows where a head looks, not whether anyone listens. So we cut heads off, one at a
# time (its columns of `o_proj` become zero), and measure the damage.


# %%
@contextmanager
def without(layer, head):
    """The model with one head silenced; whole again afterwards."""
    weight = model.layers[layer].self_attn.o_proj.weight
    columns = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, columns] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


quarter = slice(0, len(windows_BT) // 4)


def loss_on_a_quarter():
    nll_BT = validation_nll(model, windows_BT[quarter], answers_BT[quarter])
    return (nll_BT.sum() / (answers_BT[quarter] >= 0).sum()).item()


whole = loss_on_a_quarter()
damage_LH = torch.zeros(L, HEADS)
for layer in range(L):
    for head in range(HEADS):
        with without(layer, head):
            damage_LH[layer, head] = loss_on_a_quarter() - whole
assert loss_on_a_quarter() == whole  # the model is whole again
worst = int(damage_LH.argmax())
print(
    f"the head that is missed most: layer {worst // HEADS + 1}, head {worst % HEADS + 1}: {damage_LH.max():+.4f} nats"
)
same = worst == best
print(f"it is {'also' if same else 'not'} the head that looks most at the previous character")
print(f"the one that is missed least: {damage_LH.min():+.4f} nats; by layer {damage_LH.mean(1).numpy().round(4)}")
if trained("some heads matter far more than others"):
    assert damage_LH.max() > 0.02
    assert damage_LH.max() > 2 * damage_LH.median()

# %%
figure, axes = plt.subplots(figsize=(5.6, 3.2))
axes.bar(range(L * HEADS), damage_LH.flatten(), color=[f"C{i // HEADS}" for i in range(L * HEADS)])
axes.set_xticks(range(L * HEADS), [f"{i // HEADS + 1}.{i % HEADS + 1}" for i in range(L * HEADS)], fontsize=7)
axes.set(
    xlabel="layer.head that is cut off",
    ylabel="rise of the validation loss\n(nats per character)",
    title="Cutting heads off, one at a time",
)
show(figure)

# %% [markdown]
# **Exercise 5.** Cut off *two* heads at once. Is the damage the sum of both? Where it is more, the two were doing the
# same job. Then cut off a whole feed-forward part.
#
# ## 10. Heads and blocks
#
# Both are numbers in the run file (`model.n_head`, `model.n_layer`), so this is a small grid: same width, same steps,
# same data. Heads are free, as section 4 asserted; blocks cost 12 D² parameters each.

# %%
GRID_LAYERS, GRID_HEADS, GRID_STEPS = ([1, 2, 4], [1, 2, 8], 250) if FULL else ([1, 2], [1, 4], 3)
grid_loss = torch.zeros(len(GRID_LAYERS), len(GRID_HEADS))
for i, n_layer in enumerate(GRID_LAYERS):
    for j, n_head in enumerate(GRID_HEADS):
        start = time.perf_counter()
        torch.manual_seed(SEED)
        candidate = blocks(n_layer, n_head)
        train(candidate, steps=GRID_STEPS, batch=B // 2)
        grid_loss[i, j] = evaluate(candidate)
        size = sum(parameter.numel() for parameter in candidate.body.parameters())
        assert size == n_layer * (12 * D**2 + 2 * D) + D  # no n_head in it
        print(
            f"{n_layer} blocks, {n_head:2} heads: {grid_loss[i, j]:.4f} nats"
            f"  ({size:,} parameters in the body, {time.perf_counter() - start:.0f} s)"
        )

# %%
figure, axes = plt.subplots(figsize=(4.6, 2.9))
image = axes.imshow(grid_loss / math.log(2), cmap="Blues_r", aspect="auto")
axes.set_xticks(range(len(GRID_HEADS)), GRID_HEADS)
axes.set_yticks(range(len(GRID_LAYERS)), GRID_LAYERS)
for i in range(len(GRID_LAYERS)):
    for j in range(len(GRID_HEADS)):
        dark = grid_loss[i, j] < grid_loss.min() + 0.4 * (grid_loss.max() - grid_loss.min())
        axes.text(j, i, f"{bits(grid_loss[i, j].item()):.3f}", ha="center", va="center", color="w" if dark else "k")
axes.set(xlabel="heads", ylabel="blocks", title=f"Validation loss after {GRID_STEPS} steps, width {D}")
figure.colorbar(image, label="bits per character")
axes.spines[:].set_visible(False)
show(figure)
by_blocks = (grid_loss[0] - grid_loss[-1]).mean().item()
best_heads = GRID_HEADS[int(grid_loss[-1].argmin())]
by_heads = (grid_loss[-1].max() - grid_loss[-1].min()).item()
print(f"from {GRID_LAYERS[0]} to {GRID_LAYERS[-1]} blocks: {by_blocks:+.4f} nats gained (mean over heads)")
print(f"with {GRID_LAYERS[-1]} blocks {best_heads} heads are best, the worst number is {by_heads:.4f} nats behind")
if trained("blocks help at every number of heads"):
    assert (grid_loss[-1] < grid_loss[0]).all()

# %% [markdown]
# ## 11. What was learned
#
# Every line below is made from the numbers above, and every assertion behind it has passed if you can read this.

# %%
gain = {name: losses[before] - losses[name] for before, name in pairwise(names)}
learned = [
    (
        "**Training is counting.** The trained bigram softmax ended "
        f"{bigram_end - counted:.4f} nats above the optimum that counting gives.",
        0 <= bigram_end - counted < 0.01,
    ),
    (
        "**More input alone is no help.** An average of the whole past lost "
        f"{-gain['2 average of the past']:.3f} nats against the last character alone.",
        gain["2 average of the past"] < 0,
    ),
    (
        "**Attention is that average with weights from the text.** Choosing where to look won back "
        f"{gain['3 one head of attention']:.3f} nats.",
        gain["3 one head of attention"] > 0,
    ),
    (
        f"**The scale keeps it trainable.** At width {widths[-1]} a head sees {spread[True][-1]:.0f} of {keys} keys "
        f"with the scale and {spread[False][-1]:.1f} without.",
        spread[True][-1] > 20 > 2 > spread[False][-1],
    ),
    (
        f"**Heads cost nothing.** 1, 2, 4 or 8 of them have {sizes[1]:,} parameters; four instead of one changed the "
        f"loss by {-gain['4 four heads']:+.3f} nats.",
        len(set(sizes.values())) == 1,
    ),
    (
        f"**One layer without positions sees a bag.** Shuffling the past changed its prediction by {blind:.0e}; two "
        f"layers noticed ({two_layers:.0e}). Positions gave {gain['5 + positions']:.3f} nats.",
        blind < 1e-5 < two_layers and gain["5 + positions"] > 0,
    ),
    (
        f"**An idea is worth what the budget lets it show.** Positions gave {fast_gain:.3f} nats at the ladder's "
        f"learning rate and {slow_gain:+.3f} at a third of it, in as many steps.",
        fast_gain > slow_gain,
    ),
    (
        f"**Looking and thinking are two things.** The feed-forward part gave "
        f"{gain['6 + feed-forward']:.3f} nats more.",
        gain["6 + feed-forward"] > 0,
    ),
    (
        f"**Depth needs residuals and norms.** At {DEPTHS[-1]} layers and {SHORT} steps the plain stack stands at "
        f"{bits(reached['plain'][-1]):.2f} bits, pre-norm at {bits(reached['pre-norm'][-1]):.2f}.",
        reached["pre-norm"][-1] < reached["plain"][-1],
    ),
    (
        f"**It is one function.** This notebook's decoder, `nano.py` and the run file's differ by {difference:.0e} in "
        "their logits.",
        difference < 1e-5,
    ),
    (
        f"**nanoGPT's recipe** ends at {here:.4f} nats = {bits(here):.3f} bits per character"
        + (f" (nanoGPT: {NANOGPT:.4f} nats)." if SHAKESPEARE else " (another text: not comparable with nanoGPT)."),
        here < NANOGPT + NEAR or not SHAKESPEARE,
    ),
    (
        f"**Context pays, its beginning most.** Going from 1 character to 5-8 gave {alone - middle:.2f} bits, from "
        f"there to more than half of the window {middle - late:.2f}.",
        alone - middle > middle - late > 0,
    ),
    (
        f"**Some heads have a trade.** One puts {previous.max():.0%} of its weight on the previous character; cutting "
        f"off the most needed head costs {damage_LH.max():.3f} nats, the least needed {damage_LH.min():.3f}.",
        bool(previous.max() > 3 * equal_K[1] and damage_LH.max() > 2 * damage_LH.min()),
    ),
    (
        f"**Blocks are bought, heads are chosen.** {GRID_LAYERS[-1]} blocks instead of {GRID_LAYERS[0]} gave "
        f"{by_blocks:.3f} nats for {GRID_LAYERS[-1]} times the parameters. The number of heads costs none, and "
        f"more is not always more: at width {D} and {GRID_STEPS} steps {best_heads} did best, the worst choice lost "
        f"{by_heads:.3f} nats.",
        by_blocks > 0,
    ),
]
for sentence, holds in learned:
    assert holds or not FULL, sentence
if not FULL:
    print("smoke mode: nothing was trained long enough, so the lines that need training are not true here")
display(Markdown("\n".join(f"{i}. {sentence}" for i, (sentence, holds) in enumerate(learned, 1) if holds)))

# %% [markdown]
# **Where to go from here.** `packages/sky-core/src/sky_core/model/nano.py` is the model of this notebook in one file;
# `model/decoder.py` is the composed one. `sky train recipes/shakespeare.yaml data.path=...` trains a modern decoder
# (rotary positions, RMSNorm, SwiGLU, Muon) at nanoGPT's size and budget, `sky show` prints what a run file means, and
# `docs/papers.md` lists every technique with its paper and its file.
