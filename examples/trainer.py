"""transformers' Trainer by forward passes only: another trainer and other arguments, everything else as it was.

    python examples/trainer.py [OUTPUT_DIR]        # run it again, and it continues: see zo_existing

The model is a tiny Llama that learns to count; put `AutoModelForCausalLM.from_pretrained(...)` in its place, or
`distzo2.from_pretrained(...)` for one that memory does not hold.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distzo2.integrations.transformers import ZOTrainer, ZOTrainingArguments


def counting(number: int, length: int = 12) -> dict[str, torch.Tensor]:
    ids = (torch.arange(length) + number) % 16
    return {"input_ids": ids, "labels": ids}


def main(output_dir: str = "run", num_steps: int = 200) -> dict[str, float]:
    torch.manual_seed(0)  # a run that continues begins with the same weights
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=16, **sizes))
    arguments = ZOTrainingArguments(
        output_dir,
        learning_rate=2e-2,
        max_steps=num_steps,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=num_steps // 2,
        logging_steps=num_steps // 4,
        save_strategy="no",
        report_to="none",
        zo_probes=4,  # perturbations a step
        zo_estimator="fzoo",
        zo_noise="rademacher",
        zo_weights="host",  # "disk" with zo_directory for a model larger than memory
        zo_existing="resume",
    )
    data = [counting(number) for number in range(16)]
    trainer = ZOTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model()  # a checkpoint that from_pretrained reads
    return trainer.evaluate()


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
