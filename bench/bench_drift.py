"""How far rounding alone takes weights from a float32 run: many small steps of SPSA, stored in several ways.

    python bench/bench_drift.py --steps 1000

A small Llama is trained by the same perturbations and data, stored in float32, bfloat16, and as codes of 16 and 8 bits
(affine16, affine8), all computed in float32 and from the same weights, rounded as each is stored. After every
`--every` steps: what a run's change of weights differs from that of the float32 run, relative to the weights' own size
(root mean square over the matrices of all blocks), and how far the float32 run has moved. So what storing rounds once,
at the start, does not count, and what a step cannot represent does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_common import RESULTS, machine
from transformers import LlamaConfig, LlamaForCausalLM

import distzo2

STORED = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "affine16": {"dtype": torch.float32, "store": "affine16"},
    "affine8": {"dtype": torch.float32, "store": "affine8"},
}


def main() -> None:
    """Parse the options, run, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "drift.json")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip
    # Its weights are those of 16 bits, so that float32 and bfloat16 begin at the same ones.
    plain = LlamaForCausalLM(config).bfloat16().float()
    ids = torch.randint(0, 512, (options.steps, 4, 32), generator=torch.Generator().manual_seed(options.seed))
    with tempfile.TemporaryDirectory() as directory:
        plain.save_pretrained(directory)
        models = {
            name: distzo2.from_pretrained(directory, compute_dtype=torch.float32, **how) for name, how in STORED.items()
        }
    settings = {"lr": options.lr, "eps": options.eps, "seed": options.seed}
    optimizers = {name: distzo2.ZOSGD(model, **settings) for name, model in models.items()}
    first = {name: weights_of(model) for name, model in models.items()}
    size = first["float32"].norm().item()
    rows = []
    for step in range(options.steps):
        for name, model in models.items():
            batch = ids[step]
            optimizers[name].step(lambda model=model, batch=batch: model(input_ids=batch, labels=batch).loss)
        if (step + 1) % options.every == 0:
            moved = {name: weights_of(model) - first[name] for name, model in models.items()}
            row = {"step": step + 1, "moved": moved["float32"].norm().item() / size}
            row |= {n: (m - moved["float32"]).norm().item() / size for n, m in moved.items() if n != "float32"}
            rows.append(row)
            print("  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    result = {"bench": "drift", "machine": machine(), "settings": settings, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    """The matrices of all blocks, float64: of codes, the values that they stand for."""
    found = [v for name, v in model.state_dict().items() if ".layers." in name and v.dim() == 2]
    return torch.cat([value.double().reshape(-1) for value in found])


if __name__ == "__main__":
    main()
