"""A config.json, read so that nothing in it is silently left out.

Each key that an architecture understands is taken; a key that is left over must be known to change no logit, or the
checkpoint is refused: computing something near to the model would be worse than not loading it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sky_core.errors import UserError

FILE = "config.json"


def words(text: str) -> frozenset[str]:
    """The words of a text: many keys, legibly."""
    return frozenset(text.split())


# In turn: what the file is and who wrote it; ids, which the tokenizer's files say; dropout and losses of training; what
# a caller gets back, and heads of other tasks; generation, as old files have it.
HARMLESS = words("""
    _name_or_path name_or_path architectures model_type transformers_version dtype torch_dtype tokenizer_class auto_map
    unsloth_fixed unsloth_version is_llama_config transformers.js_config max_sequence_length
    bos_token_id eos_token_id pad_token_id decoder_start_token_id sep_token_id cls_token_id unk_token_id
    attention_dropout hidden_dropout classifier_dropout output_router_logits router_aux_loss_coef pretraining_tp
    use_cache cache_implementation output_attentions output_hidden_states return_dict use_return_dict torchscript
    problem_type id2label label2id num_labels task_specific_params finetuning_task gradient_checkpointing
    chunk_size_feed_forward
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_new_tokens prefix
""")
"""Keys that change no logit of a causal language model, whatever the architecture."""

INERT: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False, True),
    "pruned_heads": ({}, None),
    "tf_legacy_loss": (False,),
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
    "rope_scaling": (None,),
    "rope_interleaved": (False,),
}
"""Keys that change nothing as long as they have one of these values."""

REQUIRED: Any = object()


class Config:
    """The keys of a config.json that nobody has taken yet."""

    def __init__(self, values: Mapping[str, Any], file: str | Path = FILE) -> None:
        self.file = file
        self._left = dict(values)

    @classmethod
    def read(cls, folder: Path) -> Config:
        """The config.json of a checkpoint. Raises `UserError` when it is missing or damaged."""
        file = folder / FILE
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one with a Hugging Face checkpoint (none is downloaded)")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder}: no {FILE}, so this is no Hugging Face checkpoint") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: damaged ({error}); get it again") from None
        if not isinstance(values, dict):
            raise UserError(f"{file}: damaged (no JSON object); get it again")
        return cls(values, file)

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of `key`, which is thereby understood; null counts as absent where there is a default."""
        value = self._left.pop(key, None)
        if value is None and default is REQUIRED:
            raise UserError(f"{self.file}: {key} is missing; get the whole file again")
        return default if value is None else value

    def number(self, key: str, default: Any = REQUIRED, *, least: int = 1) -> Any:
        """As `take`, for a whole number of at least `least`."""
        value = self.take(key, default)
        if value is not default and (type(value) is not int or value < least):
            raise UserError(f"{self.file}: {key} is {value!r}; a whole number of at least {least} is needed")
        return value

    def real(self, key: str, default: Any = REQUIRED) -> Any:
        """As `take`, for a number, as a float."""
        value = self.take(key, default)
        if value is default:
            return value
        if type(value) not in (int, float):
            raise UserError(f"{self.file}: {key} is {value!r}; a number is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """As `take`, for true or false."""
        value = self.take(key, default)
        if type(value) is not bool:
            raise UserError(f"{self.file}: {key} is {value!r}; true or false is needed")
        return value

    def only(self, key: str, *values: Any) -> None:
        """Take `key`, which may be absent or one of `values`; anything else is refused."""
        if key in self._left and (value := self._left.pop(key)) not in values:
            raise self.refused(key, value, f"only {' or '.join(map(json.dumps, values))} is computed here")

    def choice(self, key: str, names: Mapping[str, Any], default: Any = REQUIRED) -> Any:
        """What `names` says of the value of `key`; anything else is refused."""
        name = self.take(key, default)
        if not isinstance(name, str) or name not in names:
            raise self.refused(key, name, f"known here are {', '.join(names)}")
        return names[name]

    def refused(self, key: str, value: Any, why: str) -> UserError:
        return UserError(
            f"{self.file}: {key} is {json.dumps(value)}, which would change what the model computes; {why}"
        )

    def done(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuse what was not taken and is not known to be harmless."""
        for key, values in INERT.items():
            self.only(key, *values)
        for key, value in self._left.items():
            if key not in HARMLESS | harmless:
                raise self.refused(key, value, "this option is not known here: remove it only if you know that it does"
                                   " nothing")  # fmt: skip
