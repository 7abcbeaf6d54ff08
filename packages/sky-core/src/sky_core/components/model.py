"""The decoder as run-file options. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sky_core import slots
from sky_core.component import Schema, Slot, Tiled
from sky_core.components.attention import Sdpa
from sky_core.components.position import Rope, Sinusoidal

if TYPE_CHECKING:
    from sky_core.model.decoder import DecoderLM


class MuP(Schema):
    """Maximal update parametrisation: learning rate and initialisation tuned at a base width serve at every width."""

    base_d_model: Annotated[int, Field(ge=1, description="width that the hyper-parameters were tuned at")]
    base_head_dim: Annotated[
        int | None, Field(ge=1, description="width of a head there; null: heads keep their width")
    ] = None


class Decoder(slots.Model):
    """A decoder-only Transformer; the defaults make a Llama-style one."""

    kind: ClassVar = "decoder"
    paper: ClassVar = "arXiv:1706.03762"

    n_layer: Annotated[int, Field(ge=1, description="residual blocks")] = 6
    n_head: Annotated[int, Field(ge=1, description="query heads of each attention layer")] = 6
    n_kv_head: Annotated[
        int | None, Field(ge=1, description="key/value heads, shared by groups of query heads; null: n_head, 1: one")
    ] = None
    d_model: Annotated[int, Field(ge=1, description="width of the residual stream")] = 384
    head_dim: Annotated[int | None, Field(ge=1, description="width of a head; null: d_model / n_head")] = None
    max_length: Annotated[int, Field(ge=1, description="the context: most tokens the model can look back on")] = 1024
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability, on embeddings, weights and residuals")] = 0.0
    bias: Annotated[bool, Field(description="biases in the linear layers")] = False
    vocab_size: Annotated[
        int | None, Field(ge=1, description="rows of the embedding, the tokenizer's ids among them; null: just these")
    ] = None
    tie_embeddings: Annotated[bool, Field(description="the head shares the weight of the embedding")] = True
    scale_embeddings: Annotated[bool, Field(description="multiply embeddings by sqrt(d_model), as Gemma does")] = False
    embedding_norm: Annotated[bool, Field(description="norm embeddings before the first layer, as BLOOM does")] = False
    logit_softcap: Annotated[float | None, Field(gt=0, description="bound of the logits: c tanh(logit / c)")] = None
    initializer_range: Annotated[float, Field(gt=0, description="standard deviation of initial weights")] = 0.02
    zero_residual: Annotated[
        bool, Field(description="projections into the residual stream start at zero, not just smaller")
    ] = False
    mup: Annotated[MuP | None, Field(description="scale initialisation, rates and logits with the width")] = None
    n_mtp: Annotated[int, Field(ge=0, description="modules that predict further tokens (objective: multi_token)")] = 0
    qk_norm: Annotated[
        Literal["head", "full"] | None, Field(description="norm queries and keys: each head, or all heads together")
    ] = None

    # Parts are meant by name, like those of a run file, so that the schema of editors names them too.
    block: Annotated[Slot[slots.Block], Field(description="residual wiring")] = Field("pre", validate_default=True)
    attention: Annotated[Tiled[slots.Attention], Field(description="attention of each layer, tiled over depth")] = (
        Field("full", validate_default=True)
    )
    kernel: Annotated[Slot[slots.Kernel], Field(description="how softmax(QKᵀ)V is computed")] = Field(
        "auto", validate_default=True
    )
    feedforward: Annotated[
        Tiled[slots.FeedForward], Field(description="position-wise part of each layer, tiled over depth")
    ] = Field("swiglu", validate_default=True)
    position: Annotated[
        Tiled[slots.Position],
        Field(description="how order is known, tiled over depth; those that act on the embedding act once"),
    ] = Field("rope", validate_default=True)
    norm: Annotated[Slot[slots.Norm], Field(description="normalisation")] = Field("rmsnorm", validate_default=True)
    memory: Annotated[
        Tiled[slots.Memory, None],
        Field(description="memory beside each layer's attention, tiled over depth; null: none"),
    ] = Field(None, validate_default=True)

    @property
    def width_of_head(self) -> int:
        """`head_dim` as used."""
        return self.head_dim or self.d_model // self.n_head

    @property
    def width_ratio(self) -> float:
        """muP's m, 1 without it."""
        return 1.0 if self.mup is None else self.d_model / self.mup.base_d_model

    @model_validator(mode="after")
    def _fits_together(self) -> Decoder:
        def problem(message: str, **values: Any) -> PydanticCustomError:
            return PydanticCustomError("decoder", message, {**self.__dict__, **values})

        if self.head_dim is None and self.d_model % self.n_head:
            raise problem(
                "d_model {d_model} is not a multiple of n_head {n_head}: use d_model {near}, or set head_dim",
                near=-(-self.d_model // self.n_head) * self.n_head,
            )
        if self.n_head % (self.n_kv_head or self.n_head):
            divisors = ", ".join(str(d) for d in range(1, self.n_head + 1) if self.n_head % d == 0)
            raise problem(
                "n_head {n_head} is not a multiple of n_kv_head {n_kv_head}: use one of {divisors}", divisors=divisors
            )
        if isinstance(self.kernel, Sdpa) and any(getattr(attention, "softcap", None) for attention in self.attention):
            raise problem("kernel sdpa cannot cap scores, as attention.softcap asks: use kernel: naive or auto")
        for position in self.position:
            if isinstance(position, Rope) and (misfit := position.misfit(self.width_of_head)):
                raise problem("{misfit}", misfit=misfit)
            if isinstance(position, Sinusoidal) and self.d_model % 2:
                raise problem("sinusoidal positions come in pairs, so d_model must be even, not {d_model}")
        return self

    def build(self, vocab_size: int) -> DecoderLM:
        from sky_core.model.decoder import DecoderLM

        return DecoderLM(self, vocab_size)
