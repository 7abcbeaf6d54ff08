"""The composed decoder: causal, cached, ragged, packed, checkpointed, compiled, tiled; and its options."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sky_core.components.attention import Naive, Sdpa
from sky_core.components.layers import GELU, LayerNorm, PostNorm, PreNorm, ReLU, ReLU2, RMSNorm, SwiGLU
from sky_core.components.model import Decoder
from sky_core.components.position import Learned, NoPosition, Rope, Sinusoidal
from sky_core.model.cache import LayerCache
from sky_core.model.context import Context
from sky_core.model.count import kv_bytes_per_token
from sky_core.slots import Memory

VOCAB = 41
POSITIONS = {"learned": Learned(), "sinusoidal": Sinusoidal(), "rope": Rope(), "none": NoPosition()}
KERNELS = {"naive": Naive(), "sdpa": Sdpa()}


def build(seed: int = 0, **options):
    """A small decoder whose weights are large, gains not 1 and biases not 0, in evaluation mode."""
    options = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "max_length": 32, "bias": True} | options
    torch.manual_seed(seed)
    model = Decoder(**options).build(VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within 1e-5 of the largest: the same fp32 sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


EVERY_CHOICE = pytest.mark.parametrize(
    "options",
    [
        *(
            {"position": (position,), "kernel": kernel}
            for position in POSITIONS.values()
            for kernel in KERNELS.values()
        ),
        {"n_kv_head": 4},
        {"n_kv_head": 1},
        {"head_dim": 12},
        {"qk_norm": "head"},
        {"qk_norm": "full"},
        {"block": PostNorm()},
        {"norm": LayerNorm(), "feedforward": (GELU(),)},
        {"tie_embeddings": False, "feedforward": (ReLU2(), ReLU())},
        {"position": (Rope(), NoPosition()), "n_layer": 3},
    ],
    ids=lambda options: ",".join(f"{key}={getattr(value, 'kind', value)}" for key, value in options.items())[:60],
)


# Causality and caches


@EVERY_CHOICE
def test_future_tokens_do_not_change_the_past(options) -> None:
    model, tokens_BT = build(**options), some_tokens(2, 20)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 11:] = (changed_BT[:, 11:] + 1) % VOCAB
    logits_BTV, changed_BTV = model(tokens_BT), model(changed_BT)
    close(changed_BTV[:, :11], logits_BTV[:, :11])
    assert (changed_BTV[:, 11:] - logits_BTV[:, 11:]).abs().min(-1).values.max() > 1e-3


@EVERY_CHOICE
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 1, 8, 3]], ids=["steps", "chunks"])
def test_decoding_in_pieces_equals_the_parallel_forward(options, pieces: list[int]) -> None:
    model, tokens_BT = build(**options), some_tokens(2, 20)
    cache = model.new_cache(2)
    with torch.no_grad():
        decoded = torch.cat([model(piece, cache=cache) for piece in tokens_BT.split(pieces, dim=1)], dim=1)
        close(decoded, model(tokens_BT))
    assert cache.lengths == [20, 20]


@EVERY_CHOICE
def test_rows_of_different_lengths_decode_together_as_alone(options) -> None:
    model, tokens_BT, lengths = build(**options), some_tokens(3, 20), [2, 9, 5]
    valid_BT = torch.arange(9) < torch.tensor(lengths)[:, None]
    prompts_BT = tokens_BT[:, :9].where(valid_BT, some_tokens(3, 9, seed=1))  # padding is any token
    cache = model.new_cache(3)
    with torch.no_grad():
        prefill = model(prompts_BT, valid_BT=valid_BT, cache=cache)
        assert cache.lengths == lengths
        rows = [[prefill[row, :length]] for row, length in enumerate(lengths)]
        for step in range(5):
            pieces = torch.stack([tokens_BT[row, length + step, None] for row, length in enumerate(lengths)])
            for row, logits_TV in enumerate(model(pieces, cache=cache)):
                rows[row].append(logits_TV)
        # A chunk in which rows take in 3, 1 and 0 more: what is not valid leaves no trace.
        starts, counts = [length + 5 for length in lengths], [3, 1, 0]
        chunk = torch.stack([tokens_BT[row, start : start + 3] for row, start in enumerate(starts)])
        ragged = torch.arange(3) < torch.tensor(counts)[:, None]
        last = model(chunk.where(ragged, torch.tensor(0)), valid_BT=ragged, cache=cache)
        for row, count in enumerate(counts):
            rows[row].append(last[row, :count])
        final = model(torch.stack([tokens_BT[r, n, None] for r, n in enumerate(cache.lengths)]), cache=cache)
        whole = model(tokens_BT)
    for row, length in enumerate(lengths):
        n = length + 5 + counts[row]
        close(torch.cat([*rows[row], final[row]]), whole[row, : n + 1])


def test_a_cache_can_drop_repeat_and_empty_rows() -> None:
    model, tokens_BT = build(), some_tokens(3, 12)
    cache = model.new_cache(3)
    with torch.no_grad():
        model(tokens_BT[:, :6], cache=cache)
        whole = model(tokens_BT)
        picked = cache.select([2, 0, 2])
        close(model(tokens_BT[[2, 0, 2], 6:8], cache=picked), whole[[2, 0, 2], 6:8])
        close(model(tokens_BT[:, 6:8], cache=cache), whole[:, 6:8])  # the original has not changed
        cache.reset([1])
        assert cache.lengths == [8, 0, 8]
        mixed = torch.stack([tokens_BT[0, 8:10], tokens_BT[1, :2], tokens_BT[2, 8:10]])
        close(model(mixed, cache=cache), torch.stack([whole[0, 8:10], whole[1, :2], whole[2, 8:10]]))


def test_padding_on_the_right_does_not_change_real_tokens() -> None:
    model, tokens_BT = build(), some_tokens(2, 12)
    padded_BT = torch.cat([tokens_BT, some_tokens(2, 5, seed=3)], dim=1)
    valid_BT = torch.arange(17).expand(2, -1) < 12
    close(model(padded_BT, valid_BT=valid_BT)[:, :12], model(tokens_BT))


def test_the_prefix_of_a_row_sees_itself_whole_and_the_rest_stays_causal() -> None:
    model, tokens_BT, prefix_B = build(), some_tokens(2, 12), torch.tensor([5, 0])
    changed_BT = tokens_BT.clone()
    changed_BT[:, 4] = (changed_BT[:, 4] + 1) % VOCAB
    before, after = model(tokens_BT, prefix_B=prefix_B), model(changed_BT, prefix_B=prefix_B)
    assert (after[0, 0] - before[0, 0]).abs().max() > 1e-3
    close(after[1, :4], before[1, :4])
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = [model(tokens_BT[:, :8], prefix_B=prefix_B, cache=cache), model(tokens_BT[:, 8:], cache=cache)]
    close(torch.cat(pieces, dim=1), before)


# Packed documents


@EVERY_CHOICE
def test_packed_documents_have_the_logits_and_gradients_of_separate_ones(options) -> None:
    model, lengths = build(**options), [4, 9, 6]
    documents = [some_tokens(1, length, seed=length) for length in lengths]
    targets = [some_tokens(1, length, seed=50 + length) for length in lengths]
    separate = [model.hidden(document) for document in documents]
    torch.stack([model.nll(h, y) for h, y in zip(separate, targets, strict=True)]).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    packed = model.hidden(
        torch.cat(documents, dim=1),
        documents_BT=torch.repeat_interleave(torch.tensor(lengths))[None],
        positions_BT=torch.cat([torch.arange(length) for length in lengths])[None],
    )
    close(packed, torch.cat(separate, dim=1))
    model.nll(packed, torch.cat(targets, dim=1)).backward()
    # Relative to the whole gradient: that of k_proj's bias is 0 but for rounding where positions are not rotated.
    size = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * size, name


# Training


class LossyMLP(nn.Module):
    """A feed-forward part with an auxiliary loss, as a mixture of experts has one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BTD: torch.Tensor, ctx) -> torch.Tensor:
        ctx.add_loss("balance", x_BTD.square().mean())
        return self.inner(x_BTD, ctx)


class Lossy(SwiGLU):
    kind = "lossy"

    def build(self, spec) -> nn.Module:
        return LossyMLP(super().build(spec))


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_auxiliary_losses_are_counted_once(recompute: str) -> None:
    model, tokens_BT = build(feedforward=(Lossy(), SwiGLU()), n_layer=4), some_tokens(2, 16)
    model.activation_checkpointing = recompute
    collect: dict = {"hidden_states": None}
    model.hidden(tokens_BT, collect=collect)
    loss = collect["losses"]["balance"]
    value = loss.item()
    loss.backward()
    assert collect["losses"]["balance"].item() == value
    assert model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    by_hand = sum(
        layer.post_attention_layernorm(x + layer.self_attn(layer.input_layernorm(x), fresh_context(x))).square().mean()
        for x, layer in list(zip(collect["hidden_states"], model.layers, strict=False))[::2]
    )
    assert value == pytest.approx(by_hand.item(), rel=1e-5)


def fresh_context(x_BTD: torch.Tensor) -> Context:
    return Context.begin(torch.zeros(x_BTD.shape[:2]), 32)


def test_bf16_autocast_is_finite_and_near() -> None:
    model, tokens_BT = build(), some_tokens(2, 16)
    cache = None
    with torch.autocast("cpu", torch.bfloat16):
        low = model.hidden(tokens_BT)
        model.nll(low, tokens_BT).backward()
        cache = model.new_cache(2)
        with torch.no_grad():
            pieces = [model.hidden(piece, cache=cache) for piece in tokens_BT.split([9, 1, 6], dim=1)]
    assert cache.layers[0].k_BHSE.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients(model).values())
    exact = model.hidden(tokens_BT)
    for given in (low, torch.cat(pieces, dim=1)):
        assert (given.float() - exact).norm() < 0.05 * exact.norm()  # a few dozen roundings of 2^-8


def test_a_model_in_bf16_runs() -> None:
    model, tokens_BT = build(qk_norm="head").bfloat16(), some_tokens(2, 16)
    model.nll(model.hidden(tokens_BT), tokens_BT).backward()
    cache = model.new_cache(2)
    with torch.no_grad():
        model(tokens_BT[:, :15], cache=cache)
        assert model(tokens_BT[:, 15:], cache=cache).isfinite().all()


# torch 2.13 looks at `.grad` of what enters a compiled layer and warns itself.
COMPILES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@COMPILES
@pytest.mark.parametrize("options", [{}, {"position": (Learned(),)}, {"qk_norm": "head", "block": PostNorm()}], ids=str)
def test_layers_compile_once_for_all_without_a_break(options) -> None:
    torch._dynamo.reset()
    model, tokens_BT = build(n_layer=10, **options), some_tokens(2, 16)
    expected = model(tokens_BT)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile_layers(backend=backend, fullgraph=True)
    close(model(tokens_BT), expected)
    # Recompiling per layer would run into torch's limit of 8 and fall back to eager.
    assert len(graphs) == 1
    assert not any("_orig_mod" in name for name in model.state_dict())


@COMPILES
def test_packed_documents_compile_and_decoding_does_not() -> None:
    torch._dynamo.reset()
    model, tokens_BT = build(n_layer=6), some_tokens(2, 16)
    documents_BT = torch.arange(16).expand(2, -1) // 5
    expected = model(tokens_BT, documents_BT=documents_BT), model(tokens_BT)
    graphs = []
    model.compile_layers(backend=lambda graph, inputs: (graphs.append(graph), graph.forward)[1], fullgraph=True)
    close(model(tokens_BT, documents_BT=documents_BT), expected[0])
    assert len(graphs) <= 2  # the layer that lowers the mask, and those that find it lowered
    graphs.clear()
    with torch.no_grad():
        cache = model.new_cache(2)
        pieces = [model(piece, cache=cache) for piece in tokens_BT.split([9, 1, 1, 1, 4], dim=1)]
    close(torch.cat(pieces, dim=1), expected[1])
    assert not graphs


# What a pass can tell


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_collecting_shows_states_and_maps_and_changes_nothing(kernel) -> None:
    model, tokens_BT = build(kernel=kernel, n_layer=3), some_tokens(2, 10)
    collect: dict = {"hidden_states": None, "attention": None}
    hidden_BTD = model.hidden(tokens_BT, collect=collect)
    assert torch.equal(hidden_BTD, model.hidden(tokens_BT))
    assert len(collect["hidden_states"]) == 4
    assert torch.equal(model.norm(collect["hidden_states"][-1]), hidden_BTD)
    assert sorted(collect["attention"]) == [0, 1, 2]
    assert collect["attention"][1].shape == (2, 4, 10, 10)
    torch.testing.assert_close(collect["attention"][1].sum(-1), torch.ones(2, 4, 10))
    nothing: dict = {}
    model.hidden(tokens_BT, collect=nothing)
    assert nothing == {"losses": {}}


# Memories


class Tally(LayerCache):
    def __init__(self, sum_BD: torch.Tensor) -> None:
        self.sum_BD = sum_BD

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"sum": self.sum_BD}

    def replace(self, tensors: dict[str, torch.Tensor]) -> Tally:
        return Tally(tensors["sum"])

    def reset(self, rows_B: torch.Tensor) -> None:
        self.sum_BD[rows_B] = 0


class RunningSum(nn.Module):
    """Adds a fraction of the sum of all inputs so far: a memory whose whole state is one vector."""

    def __init__(self, spec) -> None:
        super().__init__()
        self.layer = spec.layer
        self.gate = nn.Parameter(torch.zeros(spec.d_model))

    def init_weights(self) -> None:
        nn.init.zeros_(self.gate)

    def forward(self, x_BTD: torch.Tensor, ctx) -> torch.Tensor:
        real_BTD = x_BTD if ctx.valid_BT is None else x_BTD * ctx.valid_BT[:, :, None]
        sums_BTD = real_BTD.cumsum(1)
        state = ctx.memory_cache(self.layer)
        if state is not None:
            sums_BTD = sums_BTD + state.sum_BD[:, None]
            state.sum_BD = sums_BTD[:, -1]
        return self.gate * sums_BTD

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> Tally:
        return Tally(torch.zeros(batch, len(self.gate), device=device, dtype=dtype))


class Summing(Memory):
    """A toy."""

    kind = "summing"

    def build(self, spec) -> nn.Module:
        return RunningSum(spec)


@pytest.mark.parametrize("block", [PreNorm(), PostNorm()], ids=["pre", "post"])
def test_a_memory_stands_beside_the_attention_of_its_layers_with_its_own_state(block) -> None:
    model, tokens_BT = build(n_layer=3, block=block, memory=(None, Summing())), some_tokens(3, 12)
    assert [layer.memory is None for layer in model.layers] == [True, False, True]
    plain = build(n_layer=3, block=block)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "memory" not in name})
    lengths = [2, 7, 4]
    with torch.no_grad():
        whole = model(tokens_BT)
        assert (whole - plain(tokens_BT)).abs().max() > 1e-3
        cache = model.new_cache(3)
        assert [state is None for state in cache.memories] == [True, False, True]
        valid_BT = torch.arange(7) < torch.tensor(lengths)[:, None]
        model(tokens_BT[:, :7].where(valid_BT, torch.tensor(0)), valid_BT=valid_BT, cache=cache)
        pieces = torch.stack([tokens_BT[row, length : length + 3] for row, length in enumerate(lengths)])
        decoded = model(pieces, cache=cache)
        for row, length in enumerate(lengths):
            close(decoded[row], whole[row, length : length + 3])
        model.layers[1].memory.init_weights()
        assert torch.equal(model(tokens_BT), plain(tokens_BT))


# Options


def test_a_copy_of_a_model_is_independent() -> None:
    model, tokens_BT = build(), some_tokens(1, 8)
    expected, twin = model(tokens_BT), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(tokens_BT), expected)
    assert twin._attentions[0] is twin.layers[0].self_attn


def test_choices_are_tiled_over_depth() -> None:
    model = build(n_layer=5, feedforward=(GELU(d_ff=48), SwiGLU(d_ff=64), ReLU()), position=(Rope(), NoPosition()))
    kinds = [type(layer.mlp).__name__ for layer in model.layers]
    assert kinds == ["MLP", "GatedMLP", "MLP", "MLP", "GatedMLP"]
    assert [layer.mlp.up_proj.out_features for layer in model.layers] == [48, 64, 128, 48, 64]
    assert [type(layer.self_attn.position).__name__ for layer in model.layers] == [
        "RotaryPosition",
        "PositionEncoding",
    ] * 2 + ["RotaryPosition"]


def test_state_dict_names_are_those_of_llama_checkpoints_without_their_prefix() -> None:
    names = set(build(bias=False, n_layer=1, tie_embeddings=False).state_dict())
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layer = [
        *projections,
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    ]
    assert names == {
        f"{n}.weight" for n in ["embed_tokens", "norm", "lm_head", *(f"layers.0.{part}" for part in layer)]
    }


def test_a_tied_head_is_no_parameter_of_its_own() -> None:
    assert "lm_head.weight" not in build().state_dict()
    assert build().n_parameters()["total"] + VOCAB * 32 == build(tie_embeddings=False).n_parameters()["total"]


def test_learned_positions_are_held_once_however_many_layers_there_are() -> None:
    names = [name for name in build(position=(Learned(),), n_layer=3).state_dict() if "position" in name]
    assert names == ["positions.0.embed_positions.weight"]


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return Decoder(n_layer=2, n_head=2, d_model=32, max_length=8).build(VOCAB).state_dict()

    first, again, other = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_initial_weights_have_the_documented_spread() -> None:
    torch.manual_seed(0)
    model = Decoder(n_layer=8, n_head=4, d_model=128, max_length=64, bias=True, initializer_range=0.05).build(512)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            expected = 0.05 / 4 if ("o_proj" in name or "down_proj" in name) else 0.05  # sqrt(2 * 8) = 4
            # A standard deviation over n >= 16384 draws is known to 1/sqrt(2n) = 0.6%.
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


class OwnInit(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def init_weights(self) -> None:
        for parameter in self.inner.parameters():
            nn.init.constant_(parameter, 0.5)

    def forward(self, x_BTD: torch.Tensor, ctx) -> torch.Tensor:
        return self.inner(x_BTD, ctx)


class OwnInitMLP(SwiGLU):
    kind = "own_init"

    def build(self, spec) -> nn.Module:
        return OwnInit(super().build(spec))


def test_a_module_can_initialise_itself_and_what_it_holds() -> None:
    model = Decoder(n_layer=2, n_head=2, d_model=32, feedforward=(OwnInitMLP(),)).build(VOCAB)
    assert all((parameter == 0.5).all() for layer in model.layers for parameter in layer.mlp.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 33, "n_head": 4}, "d_model 33 is not a multiple of n_head 4: use d_model 36, or set head_dim"),
        ({"n_head": 6, "n_kv_head": 4}, "n_head 6 is not a multiple of n_kv_head 4: use one of 1, 2, 3, 6"),
        ({"head_dim": 7}, "rope turns pairs of numbers, so head_dim must be even, not 7"),
        ({"d_model": 33, "n_head": 3, "position": (Sinusoidal(),)}, "d_model must be even, not 33"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_options_that_do_not_fit_together_say_what_to_do(options, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Decoder(**options)


@pytest.mark.parametrize("option", ["n_layer", "n_head", "d_model", "max_length"])
def test_sizes_are_at_least_one(option: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Decoder(**{option: 0})


def test_swiglu_is_as_large_as_a_plain_part_of_four_times_the_width() -> None:
    with torch.device("meta"):
        models = {d: Decoder(d_model=d, n_layer=1, n_head=8).build(9) for d in (256, 384, 512, 640)}
    widths = {d: model.layers[0].mlp.up_proj.out_features for d, model in models.items()}
    assert widths == {256: 704, 384: 1024, 512: 1408, 640: 1728}


@pytest.mark.parametrize("block", [PreNorm(), PostNorm()])
def test_the_stack_ends_with_a_norm_where_the_blocks_do_not(block) -> None:
    assert isinstance(build(block=block).norm, nn.Identity) == isinstance(block, PostNorm)


# Counting


@pytest.mark.parametrize(
    ("shape", "total", "body", "mflop", "length"),
    [
        ((256, 8, 4, 2, 8192), 8.0, 5.9, 54, 512),
        ((384, 10, 6, 2, 16384), 22.0, 15.7, 156, 1024),
        ((512, 14, 8, 4, 16384), 49.7, 41.3, 342, 1024),
        ((640, 20, 10, 5, 16384), 101.4, 91.0, 687, 1024),
    ],
    ids=["sky-10m", "sky-25m", "sky-50m", "sky-100m"],
)
def test_sizes_and_flops_of_the_named_shapes(shape, total: float, body: float, mflop: int, length: int) -> None:
    d_model, n_layer, n_head, n_kv_head, vocab_size = shape
    config = Decoder(d_model=d_model, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, max_length=1024)
    with torch.device("meta"):
        model = config.build(vocab_size)
    counted = model.n_parameters()
    assert round(counted["total"] / 1e6, 1) == total
    assert round(counted["body"] / 1e6, 1) == body
    assert counted["embedding"] == vocab_size * d_model
    assert round(model.flops_per_token(length) / 1e6) == mflop


def test_gpt2_has_its_124_million_parameters() -> None:
    config = Decoder(
        n_layer=12, n_head=12, d_model=768, bias=True, position=(Learned(),), norm=LayerNorm(), feedforward=(GELU(),)
    )
    with torch.device("meta"):
        assert config.build(50257).n_parameters()["total"] == 124_439_808


def test_flops_per_token_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, length = build(bias=False, n_layer=3, kernel=Naive()), 32
    tokens_BT = some_tokens(2, length)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT).sum().backward()
    # torch counts both halves of the attention square; norms are in our 6N and cost no matrix product.
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    masked_half = 12 * 3 * 4 * 8 * length / 2
    ours = model.flops_per_token(length) - 6 * norms + masked_half
    assert counter.get_total_flops() == pytest.approx(ours * tokens_BT.numel())


def test_a_cache_takes_the_bytes_that_are_counted() -> None:
    cache = build().new_cache(3, 20)
    assert cache.nbytes() == 3 * 20 * kv_bytes_per_token(n_layer=2, n_kv_head=2, head_dim=8, bytes_per_number=4)


# Bad input


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens, but the model's context is max_length=32"):
        build()(some_tokens(1, 33))


def test_a_position_outside_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="position 32, but the model's context is max_length=32"):
        build()(some_tokens(1, 2), positions_BT=torch.tensor([[31, 32]]))


def test_a_full_cache_says_which_row_is_full() -> None:
    model = build()
    cache = model.new_cache(2, 8)
    valid_BT = torch.arange(7).expand(2, -1) < torch.tensor([[3], [7]])
    with torch.no_grad():
        model(some_tokens(2, 7), valid_BT=valid_BT, cache=cache)
        with pytest.raises(ValueError, match="room for 8 tokens per row: row 1 holds 7 and 2 more do not fit"):
            model(some_tokens(2, 2), cache=cache)


def test_a_cache_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="a cache of 33 tokens, but the model's context is max_length=32"):
        build().new_cache(1, 33)


def test_a_cache_for_another_batch_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"the batch has 2 rows and the cache 3; make it with new_cache\(2\)"):
        model(some_tokens(2, 4), cache=model.new_cache(3))


def test_documents_with_a_cache_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="documents_BT cannot be used with a cache"):
        model(some_tokens(1, 4), documents_BT=torch.zeros(1, 4), cache=model.new_cache(1))


def test_rows_padded_on_the_left_are_refused_with_a_cache() -> None:
    model = build()
    with pytest.raises(ValueError, match="pad rows on the right"):
        model(some_tokens(1, 3), valid_BT=torch.tensor([[False, True, True]]), cache=model.new_cache(1))


def test_a_prefix_that_comes_in_pieces_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="prefix of 5 tokens"):
        model(some_tokens(1, 3), prefix_B=torch.tensor([5]), cache=model.new_cache(1))


def test_rmsnorm_and_layernorm_options_reach_their_modules() -> None:
    assert build(norm=RMSNorm(eps=1e-3)).norm.eps == 1e-3
    assert build(norm=LayerNorm(bias=False)).norm.bias is None
