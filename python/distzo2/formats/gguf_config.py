"""Configuration and tokenizer out of a GGUF file's metadata.

The keys are a table of our own: that of transformers lacks head_dim of Qwen3, the experts' widths, Gemma's caps, and
every scaling of RoPE, and reads a vocabulary in 8 s where the header takes 0.2. Sources: `set_gguf_parameters` in
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py for what is written, src/llama-model.cpp and
src/llama-vocab.cpp there for what is meant where nothing is written.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.errors import refusing
from distzo2.formats.gguf_file import GgufFile, GgufTensor
from distzo2.text import brief

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDINGS = "token_embd.weight"
HEAD = "output.weight"

logger = logging.getLogger(__name__)


class Architecture(NamedTuple):
    """What a `general.architecture` means in transformers."""

    model_type: str
    keys: dict[str, str]  # of the metadata, after the architecture's name, to attributes of the configuration
    interleaved: bool = False  # rows of q and k: RoPE turns neighbours there, and halves of a head in transformers
    norms_plus_one: bool = False  # 1 is added to norms' weights
    big_layers: int = 0  # number of layers of the size that scales attention by hidden size / heads, not by head_dim
    needed: tuple[str, ...] = ()  # further keys that must be there
    fixed: tuple[tuple[str, Any], ...] = ()  # attributes that no key says, and that differ from transformers' default


_NEEDED = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_COMMON = {"feed_forward_length": "intermediate_size", "attention.head_count_kv": "num_key_value_heads"}
_HEADS = _COMMON | {"attention.key_length": "head_dim"}
_LLAMA = _COMMON | {"rope.dimension_count": "head_dim", "attention.key_length": "head_dim"}
_MIXTRAL = _LLAMA | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_GEMMA = _HEADS | {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA, interleaved=True),  # Mistral, SmolLM and SmolLM2 too
    "qwen2": Architecture("qwen2", _COMMON),
    "qwen2moe": Architecture("qwen2_moe", _COMMON | _EXPERTS),
    "qwen3": Architecture("qwen3", _HEADS),
    "qwen3moe": Architecture("qwen3_moe", _HEADS | _EXPERTS, fixed=(("norm_topk_prob", True),)),
    "gemma2": Architecture("gemma2", _GEMMA, norms_plus_one=True, big_layers=46),
    "gemma3": Architecture(
        "gemma3_text", _GEMMA, norms_plus_one=True, big_layers=62, needed=("attention.sliding_window",)
    ),
}
_IMPLIED = {"vocab_size", "attention.value_length", "attention.key_length"}  # the tensors' shapes say it
_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
}
# How text is cut before merges, by `tokenizer.ggml.pre`: what llama.cpp knows and transformers does not.
_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_GPT2 = {"gpt-2", "mpt", "olmo", "jais"}
# Words that are tokens stay whole, whatever merges say, and a text begins with BOS if the file does not say otherwise.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}


def architecture_of(path: Path, metadata: Mapping[str, Any]) -> Architecture:
    name, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(f"{path}: expected an architecture among {known}, got {brief(name)}")
    if kind != "model":
        raise CheckpointError(f"{path}: expected a model (general.type), got {brief(kind)}")
    if name == "llama" and "llama.expert_count" in metadata:
        return _ARCHITECTURES[name]._replace(model_type="mixtral", keys=_MIXTRAL)
    return _ARCHITECTURES[name]


def config_of(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> Any:
    """See `formats.gguf.gguf_config`."""
    from transformers import AutoConfig

    architecture = architecture_of(path, metadata)
    name = metadata["general.architecture"]
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    keys = _NEEDED | architecture.keys
    if missing := [key for key in (*_NEEDED, *architecture.needed) if key not in own]:
        raise CheckpointError(f"{path}: expected {name}.{missing[0]} in the metadata, found none")
    if EMBEDDINGS not in tensors:
        raise CheckpointError(f"{path}: expected a tensor {EMBEDDINGS!r}, found none")
    for key in (*keys, "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scale_linear"):
        if isinstance(own.get(key, 1), (bool, str, list)) or not own.get(key, 1) > 0:
            raise CheckpointError(f"{path}: expected one positive number as {name}.{key}, got {brief(own[key])}")
    values: dict[str, Any] = {keys[key]: own[key] for key in keys if key in own}
    if values["num_hidden_layers"] > len(tensors):
        found = f"{values['num_hidden_layers']} layers of {len(tensors)} tensors"
        raise CheckpointError(f"{path}: expected some tensors a layer ({name}.block_count), got {found}")
    heads = values["num_attention_heads"]
    values.setdefault("num_key_value_heads", heads)
    values |= {"vocab_size": tensors[EMBEDDINGS].rows, "tie_word_embeddings": HEAD not in tensors}
    values |= dict(architecture.fixed) | {to: metadata[key] for key, to in _IDS.items() if key in metadata}
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    if own.get("rope.dimension_count", head_dim) != head_dim or head_dim % 2:
        found = f"{brief(own.get('rope.dimension_count'))} of {head_dim}"
        raise CheckpointError(f"{path}: RoPE of a part of each head is not computed, got {found}")
    if architecture.big_layers:
        is_big = values["num_hidden_layers"] == architecture.big_layers
        values["query_pre_attn_scalar"] = values["hidden_size"] // heads if is_big else head_dim
    rope = _rope(path, own)
    if ROPE_FACTORS in tensors:
        rope |= _llama3(path, tensors[ROPE_FACTORS], rope, head_dim)
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
        rope = {"full_attention": rope, "sliding_attention": local}
    ignored = [key for key in own if key not in keys.keys() | _IMPLIED and not key.startswith("rope.")]
    if ignored:
        logger.warning("%s: metadata that are not considered: %s", path, ", ".join(map(brief, ignored)))
    with refusing(f"{path}: no configuration of {architecture.model_type}", CheckpointError):
        return AutoConfig.for_model(architecture.model_type, **values, rope_parameters=rope)


def _rope(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, as the metadata have them."""
    scaling = {key.removeprefix("rope.scaling."): v for key, v in own.items() if key.startswith("rope.scaling.")}
    kind, factor = scaling.pop("type", "linear"), scaling.pop("factor", own.get("rope.scale_linear", 1.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    if kind == "none":
        return rope
    scaling.pop("finetuned", None)
    if scaling.get("attn_factor") == 1.0:
        del scaling["attn_factor"]
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        names = {"original_context_length": "original_max_position_embeddings"}
        names |= {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        rope |= {name: scaling.pop(key) for key, name in names.items() if key in scaling}
    elif factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if scaling or kind not in ("linear", "yarn"):
        raise CheckpointError(f"{path}: rope.scaling: {brief(kind)} with {brief(scaling)} is not computed")
    return rope


def _llama3(path: Path, tensor: GgufTensor, rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """What the factors of Llama 3 were computed from. llama.cpp writes only them: by what each frequency is divided."""
    expected = f"{path}: tensor {ROPE_FACTORS!r}: expected {head_dim // 2} factors of Llama 3 in float32"
    if (tensor.kind, tensor.shape) != ("F32", (head_dim // 2,)) or rope["rope_type"] != "default":
        found = f"{tensor.kind} {list(tensor.shape)} beside {rope['rope_type']} scaling"
        raise CheckpointError(f"{expected}, got {found}")
    found = tensor.piece(0, tensor.rows).read().view(torch.float32).double()
    factor = found.max().item()
    turns = 8192 / (2 * torch.pi) * rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((turns - 1) / 3).clamp(0, 1)  # 1 from 4 turns in 8192 positions on, 0 up to one
    if not torch.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise CheckpointError(f"{expected}, for 8192 positions, got {brief(found.tolist())}")
    values = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {} if factor == 1.0 else {"rope_type": "llama3", "factor": factor} | values


def gguf_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a GGUF file.

    Raises:
        CheckpointError: there is none, or how it cuts text is not known.
        DistZO2Error: the package `gguf` is missing.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    with GgufFile(path) as file:  # bounds what the next reader takes
        kind, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    known = [*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS, *_GPT2]
    if kind == "gpt2" and pre not in known:
        expected = f"expected one of {', '.join(sorted(known))}"
        raise CheckpointError(f"{path}: tokenizer.ggml.pre: {expected}, got {brief(pre)}")
    with refusing(f"{path}: the tokenizer cannot be built", CheckpointError):  # of missing or damaged metadata
        architecture, vocabulary, settings = get_gguf_tokenizer(os.fspath(path))
        backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
        if backend.get_vocab_size() > len(vocabulary["tokens"]):  # transformers adds its GPT-2's own special token
            state = json.loads(backend.to_str())
            state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < len(vocabulary["tokens"])]
            backend = Tokenizer.from_str(json.dumps(state))
        if pre in _DIGITS:
            split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            backend.pre_tokenizer = pre_tokenizers.Sequence(split)
        if kind == "gpt2" and pre in _WHOLE_WORDS:
            backend.model.ignore_merges = True
            settings.setdefault("add_bos_token", True)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
