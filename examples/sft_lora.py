"""TRL's SFTTrainer with a LoRA adapter, by forward passes only: the base is frozen and streams one way.

    python examples/sft_lora.py [OUTPUT_DIR]

The model is a tiny Llama over bytes. The adapter is saved alone, as peft reads it.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distzo2.integrations.trl import ZOSFTConfig, ZOSFTTrainer

TEXTS = ["To be, or not to be, that is the question.", "All the world's a stage.", "The rest is silence."]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def main(output_dir: str = "run", num_steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    trainer = ZOSFTTrainer(
        model=model,
        args=ZOSFTConfig(
            output_dir, learning_rate=5e-2, max_steps=num_steps, logging_steps=num_steps // 3, report_to="none",
            save_strategy="no", max_length=64, zo_estimator="fzoo", zo_noise="rademacher", zo_probes=4, zo_eps=1e-2,
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS * 8}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()  # adapter_model.safetensors and adapter_config.json
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
