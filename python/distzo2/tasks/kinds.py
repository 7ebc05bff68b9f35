"""Which kind of model a checkpoint holds. It is read from config.json, before a weight is.

causal           predicts each token from those before it
encoder-decoder  reads the prompt in its encoder, and predicts each token of the answer from the prompt and those before
masked           predicts the word that the mask token in a prompt stands for
classifier       gives a text one of several classes
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distzo2.checkpoint.config import class_of
from distzo2.checkpoint.writing import CONFIG_FILE
from distzo2.errors import DistZO2Error, blaming
from distzo2.models.pretrained import config_of, meta_model
from distzo2.models.shapes import max_positions, text_config

# Fields of config.json that no forward reads.
_NOT_OF_A_FORWARD = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict", "architectures",
    "id2label", "label2id", "task_specific_params", "finetuning_task", "bos_token_id", "eos_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class ModelKind:
    """A checkpoint's kind, and what of its configuration decides how lines become tokens."""

    name: str = "causal"
    model: str = "the model"  # its class
    vocab_size: int | None = None
    positions: int | None = None  # None: no limit
    pad_id: int | None = None  # of the configuration
    start_id: int | None = None  # what a decoder reads first
    num_classes: int = 0
    has_experts: bool = False

    def limit(self, max_length: int | None) -> int | None:
        """The longest sequence: the model's positions, or `max_length` where that is less."""
        return min((n for n in (self.positions, max_length) if n is not None), default=None)

    def padding(self, tokenizer: Any) -> int:
        """A token that fills rows up. Padding is masked, so any id of the vocabulary serves; yet classifiers look for
        the end of a text by the configuration's."""
        ids = (tokenizer.pad_token_id,) if self.name == "causal" else (self.pad_id, tokenizer.pad_token_id)
        return next((i for i in ids if i is not None and i >= 0 and (not self.vocab_size or i < self.vocab_size)), 0)


CAUSAL = ModelKind()


def model_kind(directory: str | os.PathLike) -> ModelKind:
    """The kind of a checkpoint's model.

    Raises:
        DistZO2Error: the directory is no checkpoint, or no objective fits its model.
    """
    directory = Path(directory)
    config = config_of(directory)
    with blaming(f"{directory / CONFIG_FILE}: no model can be made of it"):  # of fields that do not go together
        return _kind_of(directory, config)


def _kind_of(directory: Path, config: Any) -> ModelKind:
    model = class_of(directory, config, None).__name__
    name, text = _name_of(model, config), text_config(config)
    if name is None:
        known = "a causal, encoder-decoder or masked language model, or a sequence classifier"
        raise DistZO2Error(f"{directory}: no objective fits {model}: {known} was expected")
    positions, num_classes = max_positions(config), 0
    if name in ("masked", "classifier"):
        positions = _positions_after_padding(directory, positions)
    if name == "classifier":
        num_classes = config.num_labels
        if num_classes < 2 or getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
            task = getattr(config, "problem_type", None) or f"a head with {num_classes} output"
            raise DistZO2Error(f"{directory}: no objective fits {model} ({task}): two classes or more were expected")
        if getattr(text, "pad_token_id", None) is None:
            advice = "set it to a token that ends no text"
            raise DistZO2Error(
                f"{directory}: config.json has no pad_token_id, by which {model} finds a text's end: {advice}"
            )
    start = _whole(config, "decoder_start_token_id")
    start = _whole(getattr(config, "decoder", None), "bos_token_id") if start is None else start
    return ModelKind(
        name, model, _whole(text, "vocab_size"), positions, _whole(text, "pad_token_id"), start, num_classes,
        any("expert" in key for key in text.to_dict()),
    )  # fmt: skip


def _name_of(model: str, config: Any) -> str | None:
    from transformers.models.auto import modeling_auto

    def has(task: str) -> bool:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values()
        return any(model == each if isinstance(each, str) else model in each for each in names)

    if has("SEQUENCE_CLASSIFICATION"):
        return "classifier"
    if has("SEQ_TO_SEQ_CAUSAL_LM") and getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if has("MASKED_LM") and not (has("CAUSAL_LM") and getattr(config, "causal", False)):
        return "masked"
    if has("CAUSAL_LM"):  # also a decoder by itself, whose configuration may be that of its whole model
        return "causal"
    reads_text = any(map(has, ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")))
    return "causal" if reads_text and not getattr(config, "is_encoder_decoder", False) else None


def _positions_after_padding(directory: Path, positions: int | None) -> int | None:
    """Without the rows that RoBERTa and its like leave unused: their positions begin behind the padding's index."""
    for name, module in meta_model(directory).named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == positions:
            return positions - (0 if module.padding_idx is None else module.padding_idx + 1)
    return positions


def _whole(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def forward_config(directory: str | os.PathLike) -> dict[str, str]:
    """The fields of a configuration that a forward may read, as JSON, to be compared when a run is resumed."""
    path = Path(directory, CONFIG_FILE)
    fields = json.loads(path.read_bytes()) if path.is_file() else config_of(Path(directory)).to_diff_dict()
    used = {key: value for key, value in fields.items() if key not in _NOT_OF_A_FORWARD and value is not None}
    return {key: json.dumps(value, sort_keys=True) for key, value in used.items()}
