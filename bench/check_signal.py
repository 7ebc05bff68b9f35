"""How much of L+ - L- is signal on a device, in each dtype that it computes in and, on a GPU, with products in TF32.

    python bench/check_signal.py                                   # OPT-125M's shape on a GPU
    python bench/check_signal.py --device cpu --layers 1 --batch 1 --tokens 16

Weights are random, stored in bfloat16, and the reference is float32 without TF32, as of `distzo2 signal`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench_common import write_results
from transformers import OPTForCausalLM

import distzo2
from distzo2.models.shapes import shape_config
from distzo2.optim.signal import TF32
from distzo2.run.inference import json_of_signals, table_of_signals


def main() -> None:
    """Parse the options, measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer than OPT-125M has")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = OPTForCausalLM(shape_config("opt-125m", options.layers)).bfloat16()
    distzo2.offload(model, device=options.device, weights="device")
    ids = torch.randint(model.config.vocab_size, (options.batch, options.tokens), device=options.device)
    optimizer = distzo2.ZOSGD(model, lr=1e-6)
    dtypes = [torch.float32, *([TF32] if options.device != "cpu" else []), torch.bfloat16, torch.float16]
    signals = optimizer.signal(
        lambda: model(input_ids=ids, labels=ids).loss, eps=[1e-3, 1e-4], dtypes=dtypes, probes=options.probes
    )
    print("\n".join(table_of_signals(signals)), flush=True)
    write_results(options.json, "signal-check", json_of_signals(signals))


if __name__ == "__main__":
    main()
