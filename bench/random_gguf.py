"""GGUF files of Llama's published shapes with random codes, written tensor by tensor: no model is in memory.

python bench/random_gguf.py llama-3-70b --out /fast/llama-3-70b.Q4_0.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

KIND = gguf.GGMLQuantizationType.Q4_0
SHAPES = {
    "tiny": {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama-3-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-3-70b": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
SCALE = 0.02 / 4.6  # of all blocks: weights have a standard deviation of 0.02
POOL_BLOCKS = 1 << 22  # random blocks of which tensors take parts


def write_random_gguf(path: Path, name: str) -> None:
    """Writes a model of shape `name` whose matrices, embeddings and head among them, are Q4_0, and norms are 1."""
    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    block, block_bytes = gguf.GGML_QUANT_SIZES[KIND]
    tensors = []
    for key, param in model.named_parameters():
        to, is_packed = names.get_name(key.removesuffix(".weight")) + ".weight", param.dim() > 1
        num_bytes = param.numel() // block * block_bytes if is_packed else 4 * param.numel()
        kind = KIND if is_packed else gguf.GGMLQuantizationType.F32
        # Of bytes, the writer is told the length of a row in bytes.
        shape = (*param.shape[:-1], param.shape[-1] // block * block_bytes) if is_packed else tuple(param.shape)
        dtype = np.dtype(np.uint8) if is_packed else np.dtype(np.float32)
        writer.add_tensor_info(to, shape, dtype, num_bytes, raw_dtype=kind)
        tensors.append((is_packed, num_bytes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (POOL_BLOCKS, block_bytes), dtype=np.uint8)
    pool[:, :2] = np.array([SCALE], np.float16).view(np.uint8)
    for is_packed, num_bytes in tqdm(tensors, unit="tensor"):
        left = num_bytes // block_bytes if is_packed else 0
        while left:
            count = min(left, int(rng.integers(POOL_BLOCKS // 2, POOL_BLOCKS)))
            begin = int(rng.integers(0, POOL_BLOCKS - count + 1))
            file.write(memoryview(pool[begin : begin + count]).cast("B"))
            left -= count
        if not is_packed:
            file.write(np.ones(num_bytes // 4, np.float32).tobytes())
        writer.write_padding(file, num_bytes)
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, num_tokens: int) -> None:
    """A vocabulary of bytes, letters, and words that no text has."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    tokens += [f"▁#{i}" for i in range(num_tokens - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(num_tokens)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (num_tokens - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_random_gguf(options.out, options.name)
