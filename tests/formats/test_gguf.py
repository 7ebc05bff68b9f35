"""Models, configurations and tokenizers out of GGUF files, against the models they were written from and against what
transformers itself loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

import tiny_gguf  # noqa: E402
from checkpoint_models import T  # noqa: E402
from packed_decode import decode  # noqa: E402
from same_bits import same_bits  # noqa: E402
from tiny_text import make_tokenizer  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from distzo2.checkpoint.mapping import CheckpointMap  # noqa: E402
from distzo2.checkpoint.tensor_files import CheckpointError  # noqa: E402
from distzo2.formats.gguf import gguf_config, is_gguf, open_gguf  # noqa: E402
from distzo2.formats.gguf_config import gguf_tokenizer  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip
TEXT = torch.arange(3, 43).view(1, 40) % 64


def weights(opened: CheckpointMap) -> dict[str, torch.Tensor]:
    """Each parameter, as it is decoded or read."""
    found = {name: decode(param) for name, param in opened.packed.items()}
    for name, tensor in opened.mapped.items():
        found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        opened.read(name, found[name])
    opened.close()
    return found


def filled(model: torch.nn.Module, opened: CheckpointMap) -> torch.nn.Module:
    missing, unexpected = model.load_state_dict(weights(opened), strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def assert_same_model(path: Path, model: torch.nn.Module) -> None:
    found, opened = open_gguf(path, dtype=torch.float32)
    assert not opened.packed and type(found) is type(model)
    with torch.no_grad():
        assert torch.equal(filled(found, opened)(TEXT).logits, model(TEXT).logits)
    for name, param in model.named_parameters():
        assert same_bits(found.get_parameter(name).data, param.data), name


@pytest.mark.parametrize("name", tiny_gguf.MODELS)
def test_a_model_comes_back_as_it_was_written(name: str, tmp_path: Path):
    model = tiny_gguf.make_model(name)
    assert_same_model(tiny_gguf.write(tmp_path / "x.gguf", name, model), model)


@pytest.mark.parametrize("name", [name for name in tiny_gguf.MODELS if name != "mixtral"])  # transformers reads none
def test_packed_weights_have_the_bits_of_transformers(name: str, tmp_path: Path):
    kinds = {"llama": "Q4_1", "llama wide heads": "Q4_0", "qwen2": "Q5_0", "qwen2moe": "Q8_0", "qwen3": "Q5_K"}
    kind = kinds.get(name, "Q4_K" if name == "qwen3moe" else "Q6_K")
    path = tiny_gguf.write(tmp_path / "x.gguf", name, tiny_gguf.make_model(name), kind)
    model, opened = open_gguf(path, dtype=torch.float32)
    assert {param.format for param in opened.packed.values()} == {kind}
    assert all(param.pieces[0].path == path or kind == "Q5_0" for param in opened.packed.values())  # no copy
    if name.endswith("moe"):  # transformers takes the experts' widths for those of one checkpoint
        expected = dequantized(path, model)
    else:
        loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
        expected = {key: param.data for key, param in loaded.named_parameters()}
        ours, theirs = gguf_config(path).to_dict(), loaded.config.to_dict()
        differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        caps = {"query_pre_attn_scalar", "final_logit_softcapping"} if name.startswith("gemma") else set()
        names = {"_name_or_path", "_model_name_or_path", "dtype", "architectures", "quantization_config"}
        assert differing <= caps | names
    found = weights(opened)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert same_bits(found[key], value), key


def dequantized(path: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a mixture of experts by gguf alone."""
    tensors = gguf.GGUFReader(path).tensors
    stored = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in tensors}
    is_second = "Qwen2" in type(model).__name__
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE if is_second else gguf.MODEL_ARCH.QWEN3MOE, 2)
    found = {}
    for name, param in model.named_parameters():
        base, leaf = re.fullmatch(r"(.*?)(\.weight|\.bias|)", name).groups()
        if base.endswith("gate_up_proj"):
            to = names.get_name(base.replace("gate_up", "down"))
            found[name] = torch.cat([stored[to.replace("down", way) + ".weight"] for way in ("gate", "up")], dim=1)
        else:
            found[name] = stored[names.get_name(base) + (leaf or ".weight")].view(param.shape)
    return found


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("name", ["llama wide heads", "mixtral"])
def test_raw_halves_are_read_where_they_lie(name: str, kind: str, tmp_path: Path):
    """q and k are permuted, and experts of gate and up alternate, by ranges."""
    model = tiny_gguf.make_model(name)
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    _, opened = open_gguf(tiny_gguf.write(tmp_path / "x.gguf", name, model, kind))
    assert not opened.packed and {tensor.dtype for tensor in opened.mapped.values()} == {dtype}
    for key, value in weights(opened).items():
        assert same_bits(value, model.get_parameter(key).data.to(dtype)), key


def test_experts_whose_rows_do_not_lie_evenly_are_refused(tmp_path: Path):
    model = tiny_gguf.make_model("qwen3moe", moe_intermediate_size=25)
    down = {f"blk.{i}.ffn_down_exps.weight": np.zeros((4, 256, 25), np.float32) for i in range(2)}
    path = tiny_gguf.write(tmp_path / "x.gguf", "qwen3moe", model, "Q8_0", tensors=down)
    with pytest.raises(CheckpointError, match="expected experts of a multiple of 32 rows, got 25"):
        open_gguf(path)


def test_raw_weights_stream_from_the_file_where_they_lie_in_it(tmp_path: Path):
    for name, is_stored in {"qwen3": True, "gemma2": False}.items():  # 1 is taken away from Gemma's norms
        model = tiny_gguf.make_model(name)
        _, raw = open_gguf(tiny_gguf.write(tmp_path / "x.gguf", name, model))
        found = raw.stored_as("model.norm.weight")
        assert (found is not None) == is_stored
        ((path, offset, num_bytes, _),) = (found or raw.stored_as("model.embed_tokens.weight")).ranges
        param = model.model.norm.weight if is_stored else model.model.embed_tokens.weight
        assert path.read_bytes()[offset : offset + num_bytes] == param.detach().numpy().tobytes()


def test_the_dtype_is_that_of_the_embeddings_or_bfloat16(tmp_path: Path):
    model = tiny_gguf.make_model("llama")
    for kind, dtype in {"Q4_0": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.items():
        _, opened = open_gguf(tiny_gguf.write(tmp_path / "x.gguf", "llama", model, kind))
        assert {tensor.dtype for tensor in opened.mapped.values()} == {dtype}


def test_scales_that_are_not_finite_are_refused(tmp_path: Path):
    path = tiny_gguf.write(tmp_path / "x.gguf", "llama", tiny_gguf.make_model("llama"), "Q6_K")
    _, opened = open_gguf(path)
    for param in opened.packed.values():
        param.check_scales()
    param = opened.packed["model.layers.1.mlp.down_proj.weight"]
    with open(path, "r+b") as file:
        file.seek(param.pieces[0].offset + 77 * 210 + 208)  # the scale of block 77, which is row 77
        file.write(b"\x00\xfc")
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight \(Q6_K\), row 77: expected finite numbers .* got -inf"
    ):
        param.check_scales()


def test_a_split_model_is_one(tmp_path: Path):
    model = tiny_gguf.make_model("qwen2")
    tiny_gguf.write(tmp_path / "x.gguf", "qwen2", model, split_max_tensors=11)
    first, second, third = sorted(tmp_path.iterdir())
    assert_same_model(first, model)
    with pytest.raises(CheckpointError, match="expected the first file"):
        open_gguf(second)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00003.gguf: cannot be opened"):
        open_gguf(first)


def factors(config: Any) -> np.ndarray:
    """What llama.cpp stores for Llama 3: by what each frequency is divided."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    return (plain / scaled).numpy().astype(np.float32)


def test_factors_of_llama_3_become_its_parameters(tmp_path: Path):
    model = tiny_gguf.make_model("llama", rope_parameters=dict(LLAMA3), max_position_embeddings=1 << 17)
    found = factors(model.config)
    assert found[0] == 1 and found[-1] == 8 and ((found > 1) & (found < 8)).any()
    path = tiny_gguf.write(tmp_path / "x.gguf", "llama", model, tensors={"rope_freqs.weight": found})
    assert gguf_config(path).rope_parameters == LLAMA3
    assert_same_model(path, model)
    tiny_gguf.write(path, "llama", model, tensors={"rope_freqs.weight": found * 0 + 1})
    assert gguf_config(path).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    tiny_gguf.write(path, "llama", model, tensors={"rope_freqs.weight": found[::-1].copy()})
    with pytest.raises(CheckpointError, match="expected 32 factors of Llama 3"):
        gguf_config(path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({".rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({".rope.scaling.type": "none", ".rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        (
            {
                ".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.attn_factor": 1.0,
                ".rope.scaling.original_context_length": 128, ".rope.scaling.finetuned": True,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({".rope.scaling.type": "longrope"}, "'longrope' with {} is not computed"),
        ({".rope.scaling.type": "yarn", ".rope.scaling.yarn_ext_factor": 0.5}, "'yarn_ext_factor': 0.5"),
        ({".rope.dimension_count": 32}, "RoPE of a part of each head is not computed, got 32 of 128"),
    ],
)  # fmt: skip
def test_scalings_of_rope(metadata: dict[str, Any], expected: dict[str, Any] | str, tmp_path: Path):
    path = tiny_gguf.write(tmp_path / "x.gguf", "qwen3", tiny_gguf.make_model("qwen3"), metadata=metadata)
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=expected):
            gguf_config(path)
    else:
        assert gguf_config(path).rope_parameters == {"rope_theta": 10000.0, **expected}


def test_gemma_3_scales_its_global_layers_alone(tmp_path: Path):
    scaling = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 5000.0}
    ropes = {"full_attention": scaling, "sliding_attention": local}
    model = tiny_gguf.make_model("gemma3", rope_parameters=ropes, sliding_window=16)
    metadata = {".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0, ".rope.freq_base_swa": 5000.0}
    assert_same_model(tiny_gguf.write(tmp_path / "x.gguf", "gemma3", model, metadata=metadata), model)


def test_the_largest_gemma_scales_attention_by_its_hidden_size(tmp_path: Path):
    model = tiny_gguf.make_model("gemma2", hidden_size=32, intermediate_size=32, num_hidden_layers=46)
    path = tiny_gguf.write(tmp_path / "x.gguf", "gemma2", model)
    assert gguf_config(path).query_pre_attn_scalar == 32 // 4


EXTRA = np.zeros((32, 256), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"metadata": {"general.architecture": "rwkv7"}}, "expected an architecture among .* got 'rwkv7'"),
    "adapter": ({"metadata": {"general.type": "adapter"}}, "expected a model .* got 'adapter'"),
    "no layers": ({"metadata": {".block_count": None}}, "expected llama.block_count in the metadata"),
    "heads by layer": ({"metadata": {".attention.head_count": [4, 4]}}, r"number as .*head_count, got \[4, 4\]"),
    "no heads": ({"metadata": {".attention.head_count": 0}}, "positive number as llama.attention.head_count, got 0"),
    "odd heads": ({"metadata": {".attention.key_length": 63}}, "a part of each head is not computed"),
    "a theta": ({"metadata": {".rope.freq_base": "x"}}, "positive number as llama.rope.freq_base, got 'x'"),
    "architectures": ({"metadata": {"general.architecture": ["llama"]}}, "expected an architecture"),
    "a million layers": ({"metadata": {".block_count": 1 << 20}}, "got 1048576 layers of 20 tensors"),
    "more layers": ({"metadata": {".block_count": 3}}, "expected a tensor 'blk.2.attn_q.weight' for .*, found none"),
    "fewer layers": ({"metadata": {".block_count": 1}}, "has no place for 'blk.1.attn_k.weight' and 8 others"),
    "a bias": ({"tensors": {"blk.0.attn_q.bias": EXTRA[0]}}, "no place for 'blk.0.attn_q.bias'"),
    "no embeddings": ({"tensors": {"token_embd.weight": None}}, "expected a tensor 'token_embd.weight', found none"),
    "no norm": ({"tensors": {"output_norm.weight": None}}, "a tensor 'output_norm.weight' for 'model.norm.weight'"),
    "a shape": ({"tensors": {"blk.0.attn_k.weight": EXTRA}}, r"expected 128 rows of 256 for .* got shape \[32, 256\]"),
    "a split": ({"metadata": {"split.count": 2}}, "expected the first file of a split model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_its_model_is_refused(case: str, tmp_path: Path):
    options, reason = REFUSED[case]
    path = tiny_gguf.write(tmp_path / "x.gguf", "llama", tiny_gguf.make_model("llama"), **options)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_types_that_are_not_decoded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_gguf.make_model("mixtral")
    for kind in ("IQ4_XS", "Q2_K", "MXFP4"):
        monkeypatch.setitem(tiny_gguf.HALVES, kind, [])
        path = tiny_gguf.write(tmp_path / "x.gguf", "mixtral", model, kind)
        with pytest.raises(CheckpointError, match=f"tensor 'token_embd.weight': expected a type among .* got {kind}"):
            open_gguf(path)
    mixed = {"blk.0.ffn_up_exps.weight": np.zeros((4, 256, 256), np.float32)}
    tiny_gguf.write(path, "mixtral", model, "Q8_0", tensors=mixed)
    with pytest.raises(CheckpointError, match=r"gate_up_proj' joins tensors of different types, Q8_0 and F32"):
        open_gguf(path)


def test_metadata_that_nothing_reads_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tiny_gguf.write(tmp_path / "x.gguf", "llama", tiny_gguf.make_model("llama"), metadata={".logit_scale": 2.0})
    gguf_config(path)
    assert "not considered: 'logit_scale'" in caplog.text


def byte_level(path: Path, name: str, pre: str | None, **more: Any) -> Path:
    """A file with the vocabulary of `make_tokenizer`, two spaces as a token, and a word that no merge makes."""
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = [*sorted(state["vocab"], key=state["vocab"].get), "ĠĠ", "Ġzzqzz"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]] + ["Ġ Ġ"],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2), "tokenizer.ggml.scores": None,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.unknown_token_id": None,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<eos>", **more,
    }  # fmt: skip
    return tiny_gguf.write(path, name, tiny_gguf.make_model(name), metadata=metadata)


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", "x Ġ Ġ 1 2 Ġ z z q z z"),
        ("smollm", "x ĠĠ 1 2 Ġ z z q z z"),
        ("llama-bpe", "<s> x Ġ Ġ 1 2 Ġzzqzz"),
        ("qwen2", "x Ġ Ġ 1 2 Ġ z z q z z"),
    ],
)
def test_text_is_cut_as_the_vocabulary_was_made(pre: str, tokens: str, tmp_path: Path):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "x.gguf", "llama", pre))
    found = tokenizer.convert_ids_to_tokens(tokenizer("x  12 zzqzz").input_ids)
    assert " ".join(found) == tokens
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == "Ġzzqzz"  # and no token beside the file's
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<eos>", None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False) == "cat<eos>"


def test_bos_is_added_as_the_file_says(tmp_path: Path):
    for pre, flag in {"llama-bpe": False, "qwen2": True}.items():
        path = byte_level(tmp_path / "x.gguf", "llama", pre, **{"tokenizer.ggml.add_bos_token": flag})
        assert (gguf_tokenizer(path)("cat").input_ids[0] == 1) == flag


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path):
    path = tmp_path / "x.gguf"
    if name == "qwen2":
        byte_level(path, name, "qwen2")
    else:
        tiny_gguf.write(path, name, tiny_gguf.make_model(name))
    ours, theirs = gguf_tokenizer(path), T.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in ("a than  an", "zzqzz the cat 12", " lead", "</s> x"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path):
    path, model = tmp_path / "x.gguf", tiny_gguf.make_model("llama")
    for pre in (None, "default", "bloom"):
        with pytest.raises(CheckpointError, match=f"tokenizer.ggml.pre: expected one of .*smollm.* got {pre!r}"):
            gguf_tokenizer(byte_level(path, "llama", pre))
    tiny_gguf.write(path, "llama", model, tokenizer=False)
    with pytest.raises(CheckpointError, match="tokenizer cannot be built"):
        gguf_tokenizer(path)


def test_a_gguf_file_is_told_by_its_first_bytes_or_its_name(tmp_path: Path):
    path = tiny_gguf.write(tmp_path / "no suffix", "llama", tiny_gguf.make_model("llama"))
    (tmp_path / "x.gguf").write_bytes(b"GG")
    assert is_gguf(path)
    assert not any(map(is_gguf, (tmp_path, tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match="truncated"):
        open_gguf(tmp_path / "x.gguf")
