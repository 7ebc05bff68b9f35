"""Perplexity of a page of English by a GGUF file as it is, streamed, and by the model that transformers makes of it.

    python bench/bench_perplexity.py SmolLM2-135M-Instruct.Q4_1.gguf --work /fast

transformers decodes with the package `gguf` and computes without DistZO2. Losses and logits of all tokens are compared
bit for bit. The same matrices as Q8_0, quantized by `gguf` into a file in --work, are a second model.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import gguf
import torch
from bench_common import RESULTS, machine
from gguf import GGMLQuantizationType as Type
from smollm2 import PAGE
from transformers import AutoModelForCausalLM

import distzo2
from distzo2.tasks.tokenize import load_tokenizer

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    """Parse the options, run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--work", type=Path, required=True, help="directory of the Q8_0 file and of block files")
    parser.add_argument("--out", type=Path, default=RESULTS / "perplexity.json")
    options = parser.parse_args()
    again = options.work / f"{options.file.stem}.as.Q8_0.gguf"
    quantize(options.file, again)
    ids = torch.tensor([load_tokenizer(options.file)(PAGE).input_ids])
    rows = [
        row for file in (options.file, again) for dtype in DTYPES for row in compared(file, ids, dtype, options.work)
    ]
    settings = {"file": options.file.name, "tokens": ids.shape[1]}
    options.out.write_text(json.dumps({"bench": "perplexity", "machine": machine(), **settings, "rows": rows}) + "\n")
    print(f"wrote {options.out}")


@torch.no_grad()
def compared(file: Path, ids: torch.Tensor, dtype: torch.dtype, work: Path) -> list[dict[str, Any]]:
    """A row for each place of the weights."""
    plain = (
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval().requires_grad_(False)
    )
    expected, rows = plain(input_ids=ids, labels=ids), []
    del plain
    types = sorted({tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors} - {"F32"})
    for weights in ("host", "disk"):
        model = distzo2.from_pretrained(file, weights=weights, directory=work, dtype=dtype)
        found = model(input_ids=ids, labels=ids)
        runtime = distzo2.runtime_of(model)
        losses, stored = [each.loss.item() for each in (found, expected)], runtime.stats()["streamed_bytes"]
        row = {"file": file.name, "types": types, "dtype": str(dtype).removeprefix("torch."), "weights": weights}
        row |= {"perplexity": math.exp(losses[0]), "plain_perplexity": math.exp(losses[1]), "streamed_bytes": stored}
        row |= {"loss": losses[0].hex(), "plain_loss": losses[1].hex()}
        row |= {"different_logits": int((found.logits != expected.logits).sum()), "logits": found.logits.numel()}
        rows.append(row)
        print(f"{file.name} {row['dtype']:<8} {weights}: perplexity {row['perplexity']:.6f}, plain "
              f"{row['plain_perplexity']:.6f}, {row['different_logits']} of {row['logits']} logits differ")  # fmt: skip
        runtime.close()
    return rows


def quantize(source: Path, target: Path) -> None:
    """Writes a file with the header of `source` and its matrices as Q8_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None  # of an array
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.tensor_type not in (Type.F32, Type.Q8_0):
            data = gguf.quantize(gguf.dequantize(data, tensor.tensor_type), Type.Q8_0)
        writer.add_tensor(tensor.name, data, raw_dtype=None if tensor.tensor_type == Type.F32 else Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
