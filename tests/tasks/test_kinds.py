"""The kind of a model from its configuration, and what of it the tokens depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from tiny_kinds import BART, BERT, T5, make
from tiny_text import make_checkpoint, make_tokenizer
from transformers import GPT2Config, LlamaConfig, MambaConfig, OPTConfig

from distzo2.errors import DistZO2Error
from distzo2.models.shapes import max_positions
from distzo2.tasks.kinds import ModelKind, forward_config, model_kind


def config_of(directory: Path, name: str, **fields) -> Path:
    """A directory with the config.json of a class, which needs no weights to be judged."""
    config = getattr(transformers, name).config_class(**fields)
    config.architectures = [name]
    config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("OPTForCausalLM", "causal"), ("MixtralForCausalLM", "causal"), ("LlavaForConditionalGeneration", "causal"),
        ("BertLMHeadModel", "causal"),  # whether it is one, its logits tell
        ("BartForCausalLM", "causal"), ("PegasusForCausalLM", "causal"),
        ("MT5ForConditionalGeneration", "encoder-decoder"), ("PegasusForConditionalGeneration", "encoder-decoder"),
        ("MarianMTModel", "encoder-decoder"), ("DebertaV2ForMaskedLM", "masked"), ("ModernBertForMaskedLM", "masked"),
        ("DistilBertForSequenceClassification", "classifier"), ("T5ForSequenceClassification", "classifier"),
    ],
)  # fmt: skip
def test_kinds(name: str, kind: str, tmp_path: Path) -> None:
    found = model_kind(config_of(tmp_path, name))
    assert (found.name, found.model) == (kind, name)
    assert found.num_classes == (2 if kind == "classifier" else 0)
    assert found.has_experts == (name == "MixtralForCausalLM")


NONE = [
    "BertForQuestionAnswering", "BertForTokenClassification", "BertForMultipleChoice", "BertForNextSentencePrediction",
    "T5EncoderModel", "T5Model", "CLIPModel", "WhisperForConditionalGeneration", "Wav2Vec2ForCTC",
]  # fmt: skip
HEAD = "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        *((name, {}, f"no objective fits {name}: a causal") for name in NONE),
        (HEAD, BERT | {"num_labels": 1}, r"\(a head with 1 output\): two classes"),
        (HEAD, BERT | {"num_labels": 3, "problem_type": "regression"}, r"\(regression\): two classes"),
        (HEAD, BERT | {"num_labels": 3, "problem_type": "multi_label_classification"}, r"\(multi_label_class.*\): two"),
        (HEAD, BERT | {"num_labels": 3, "pad_token_id": None}, f"has no pad_token_id, by which {HEAD}"),
    ],
)
def test_models_without_an_objective(name: str, fields: dict, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DistZO2Error, match=reason):
        model_kind(config_of(tmp_path, name, **fields))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("EsmForMaskedLM", {}),  # without the size of a vocabulary
        ("NemotronForSequenceClassification", {"pad_token_id": 0, "num_key_value_heads": 0}),
        ("BertForMaskedLM", {"hidden_size": 7, "num_attention_heads": 2}),
        ("BertForSequenceClassification", {"hidden_act": "nobody's"}),
    ],
)
def test_configurations_that_make_no_model(name: str, fields: dict, tmp_path: Path) -> None:
    config_of(tmp_path, name)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | fields))
    with pytest.raises(DistZO2Error, match=r"config\.json: no(t a configuration| model can be made of it: )") as error:
        model_kind(tmp_path)
    assert "\n" not in str(error.value)


def test_positions_of_configs(tmp_path: Path) -> None:
    assert max_positions(OPTConfig(max_position_embeddings=77)) == 77
    assert max_positions(LlamaConfig(max_position_embeddings=78)) == 78
    assert max_positions(GPT2Config(n_positions=79)) == 79
    assert max_positions(MambaConfig()) is None
    # RoBERTa's begin behind the padding's index.
    for name, pad_id, positions in (
        ("RobertaForMaskedLM", 1, 30), ("RobertaForMaskedLM", 0, 31), ("CamembertForMaskedLM", 1, 30),
        ("XLMRobertaForSequenceClassification", 1, 30), ("BertForMaskedLM", 1, 32),
        ("BartForConditionalGeneration", 1, 32),
    ):  # fmt: skip
        kind = model_kind(config_of(tmp_path, name, **(BART if "Bart" in name else BERT) | {"pad_token_id": pad_id}))
        assert kind.positions == positions and kind.limit(None) == positions
        assert kind.limit(7) == 7 and kind.limit(1000) == positions
    assert model_kind(config_of(tmp_path, "MambaForCausalLM")).limit(None) is None


def test_any_valid_id_pads(tmp_path: Path) -> None:
    def pad(of_tokenizer, **fields) -> int:
        return ModelKind(**{"vocab_size": 10} | fields).padding(SimpleNamespace(pad_token_id=of_tokenizer))

    assert pad(3) == 3 and pad(9) == 9
    assert pad(None) == pad(10) == pad(-1) == pad(2**40) == 0
    assert pad(3, vocab_size=None) == 3 and pad(10, vocab_size=None) == 10
    assert pad(3, name="classifier", pad_id=4) == 4 and pad(3, name="masked", pad_id=None) == 3
    assert pad(3, name="classifier", pad_id=10) == 3 and pad(3, pad_id=4) == 3


def test_fields_that_change_a_forward(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m")
    before = forward_config(directory)
    config = json.loads((directory / "config.json").read_text())
    same = {"transformers_version": "9", "use_cache": False, "dtype": "bfloat16", "sliding_window": None}
    (directory / "config.json").write_text(json.dumps(config | same))
    assert forward_config(directory) == before
    (directory / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, math.inf], "x": math.nan}))
    assert forward_config(directory) == json.loads(json.dumps(forward_config(directory), allow_nan=False)) != before
    for change in ({"rms_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"rope_parameters": {"rope_theta": 7.0}}):
        (directory / "config.json").write_text(json.dumps(config | change))
        assert forward_config(directory) != before


def test_tiny_checkpoints_are_of_their_kinds(tmp_path: Path) -> None:
    assert model_kind(make(tmp_path / "t5", "T5ForConditionalGeneration")).start_id == T5["decoder_start_token_id"]
    assert model_kind(make(tmp_path / "bart", "BartForConditionalGeneration")).start_id == 2
    assert model_kind(make_checkpoint(tmp_path / "llama")).vocab_size == len(make_tokenizer())
