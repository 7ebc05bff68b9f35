"""A step of a large OPT with random weights made in memory: resident, streamed, and ZO2's loop, one after the other.

    python bench/bench_large_step.py bare resident streamed zo2 --json /tmp/steps.json
    python bench/bench_large_step.py streamed --device cpu --model tiny --tokens 32 --json /tmp/steps.json

bare      what a step cannot be faster than: two forwards of the plain model, and its blocks copied up, down and both
          ways from and to memory pinned by torch
resident  our step with the weights on the device, with one probe and with many
streamed  our step with the blocks in pinned memory
zo2       ZO2's loop (bench/baselines/zo2_loop.py), blocks in pinned memory

Each adds its rows to the file as it measures them, so that contenders may be run as processes of their own. All have
the same weights and token ids. The plain model's loss is that of both of ours, and so are the losses of every step of
the resident and the streamed model, to the bit; if not, the status is 1. Seconds are those of some steps in a row, from
one idle device to the next, divided by their number.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from baselines.zo2_loop import ZO2Loop
from bench_common import machine, synchronize
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import distzo2
from distzo2.files import write_whole
from distzo2.models.shapes import SHAPES, shape_config

LR, EPS, SEED = 1e-7, 1e-3, 5
WARMUPS = 2
MANY_REPEATS = 2  # of a step of many probes
TINY = {"vocab_size": 512, "hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


class RandomWeights:
    """Fills parameters by name: matrices N(0, 0.02²), equal ones for equal shapes, norms 1, biases 0."""

    def __init__(self, device: str) -> None:
        self.device, self.made = device, {}

    def __call__(self, name: str, view: torch.Tensor) -> None:
        if view.dim() == 1:
            view.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        if view.shape not in self.made:  # by the device, since a CPU makes 0.2 G/s
            generator = torch.Generator(self.device).manual_seed(view.numel())
            matrix = torch.empty(view.shape, dtype=view.dtype, device=self.device)
            self.made[view.shape] = matrix.normal_(0, 0.02, generator=generator)
        view.copy_(self.made[view.shape])


class Steps:
    """The rows of one file, and what all contenders share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.path: Path = options.json
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        self.batches = [int(batch) for batch in options.batches.split(",")]
        self.wrong: list[str] = []
        self.machine = machine()

    def meta_model(self) -> nn.Module:
        """The model, its parameters on meta."""
        config = shape_config(self.options.model) if self.options.model in SHAPES else OPTConfig(
            **TINY, word_embed_proj_dim=TINY["hidden_size"], max_position_embeddings=2048
        )  # fmt: skip
        with torch.device("meta"):
            return OPTForCausalLM._from_config(config, dtype=getattr(torch, self.options.dtype)).eval()

    def ids(self, batch: int) -> torch.Tensor:
        """Token ids [batch, tokens]."""
        generator = torch.Generator().manual_seed(batch)
        vocabulary = TINY["vocab_size"] if self.options.model == "tiny" else 50000
        return torch.randint(4, vocabulary, (batch, self.options.tokens), generator=generator).to(self.device)

    def seconds_of(self, call: Callable[[], object], warmups: int, repeats: int) -> dict[str, Any]:
        """Seconds of a call: in a row, as the host saw each return, and of the first ever."""
        first_s = self.total_seconds(call, 1)[0]
        self.total_seconds(call, warmups - 1)
        total, each = self.total_seconds(call, repeats)
        return {"seconds": total / repeats, "host_seconds": each, "first_s": first_s}

    def total_seconds(self, call: Callable[[], object], repeats: int) -> tuple[float, list[float]]:
        """Seconds of calls in a row, and of each as the host saw it return."""
        synchronize(self.device)
        marks = [time.perf_counter()]
        for _ in range(repeats):
            call()
            marks.append(time.perf_counter())
        synchronize(self.device)
        return time.perf_counter() - marks[0], [after - before for before, after in pairwise(marks)]

    def add(self, contender: str, **figures: Any) -> None:
        """Keeps a row, and writes the file anew."""
        if self.device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(self.device)
            figures["device_bytes"] = total - free
        row = {"contender": contender, "model": self.options.model, "tokens": self.options.tokens, **figures}
        self.rows.append(row)
        name = f"{contender} {figures.get('batch', '')} {figures.get('probes', '')}"
        print(f"{name:24} {1e3 * figures['seconds']:9.2f} ms", flush=True)
        result = {"bench": "large_step", "machine": self.machine, "rows": self.rows}
        write_whole(self.path, json.dumps(result).encode() + b"\n")  # a run may be killed at any time

    def compare(self, what: str, contender: str, value: Any, **key: Any) -> None:
        """Notes an error if another contender's row has another value of `what`."""
        for row in self.rows:
            if row["contender"] == contender and all(row.get(k) == v for k, v in key.items()) and row[what] != value:
                self.wrong.append(f"{what} of {key}: {value}, but {row[what]} by {contender}")

    # ---- contenders -------------------------------------------------------------------------------------------------

    def bare(self) -> None:
        """Two forwards of the plain model, and the raw copies of its blocks."""
        meta, fill = self.meta_model(), RandomWeights(self.device)
        blocks = meta.model.decoder.layers
        self.links(len(blocks), sum(p.numel() * p.element_size() for p in blocks[0].parameters()))
        model = meta.to_empty(device=self.device)
        model.tie_weights()
        with torch.no_grad():
            for name, p in model.named_parameters():
                fill(name, p)
            for batch in self.batches:
                ids = self.ids(batch)
                forward = closure(model, ids)
                times = self.seconds_of(lambda forward=forward: (forward(), forward()), WARMUPS, self.options.repeats)
                self.add("compute", batch=batch, loss=forward().item(), **times)

    def links(self, num_blocks: int, num_bytes: int) -> None:
        """All blocks up, down, and both ways at once on two streams."""
        cuda = self.device.startswith("cuda")
        hosts = [torch.ones(num_bytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        slots = [torch.ones(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
        streams = [torch.cuda.Stream() for _ in range(2)] if cuda else []

        def copy(ways: tuple[int, ...]) -> None:
            for _ in range(num_blocks):
                for way in ways:
                    target, source = (slots[0], hosts[0]) if way == 0 else (hosts[1], slots[1])
                    if cuda:
                        with torch.cuda.stream(streams[way]):
                            target.copy_(source, non_blocking=True)
                    else:
                        target.copy_(source)

        for name, ways in (("up", (0,)), ("down", (1,)), ("both", (0, 1))):
            times = self.seconds_of(lambda ways=ways: copy(ways), 1, 3)
            self.add(name, num_bytes=num_blocks * num_bytes, **times)

    def resident(self) -> None:
        """Our step, weights on the device."""
        self.ours("resident", "device")

    def streamed(self) -> None:
        """Our step, blocks in pinned memory."""
        self.ours("streamed", "host")

    def ours(self, contender: str, weights: str) -> None:
        start = time.perf_counter()
        model, fill = (
            distzo2.offload(self.meta_model(), device=self.device, weights=weights),
            RandomWeights(self.device),
        )
        runtime = distzo2.runtime_of(model)
        with torch.no_grad():
            if weights == "device":
                for unit, stored in runtime.access.visit():
                    for param, view in zip(unit.params, stored, strict=True):
                        fill(param.name, view)
            else:
                for unit in runtime.units:
                    with runtime.access.writing(unit) as views:
                        for name, view in views.items():
                            fill(name, view)
        del fill
        print(f"{contender}: made in {time.perf_counter() - start:.1f} s", flush=True)
        with torch.no_grad():  # before any step
            for batch in self.batches:
                self.compare("loss", "compute", closure(model, self.ids(batch))().item(), batch=batch)
        for batch in self.batches:
            self.our_steps(contender, model, batch, 1, WARMUPS, self.options.repeats)
        if self.options.probes > 1:
            self.our_steps(contender, model, self.batches[0], self.options.probes, 1, MANY_REPEATS)
        runtime.close()

    def our_steps(self, contender: str, model: nn.Module, batch: int, probes: int, warmups: int, repeats: int) -> None:
        """Steps of a new optimizer."""
        opt = distzo2.ZOSGD(model, lr=LR, eps=EPS, seed=SEED + batch, num_probes=probes)
        runtime, losses, forward = distzo2.runtime_of(model), [], closure(model, self.ids(batch))

        def step() -> None:
            if len(losses) == warmups:
                runtime.reset_stats()
            opt.step(forward)
            losses.append(opt.last.losses)

        times = self.seconds_of(step, warmups, repeats)
        counted = {k: v / repeats for k, v in runtime.stats().items() if k.endswith("_s") or k.startswith("bytes_")}
        opt.close()
        if contender == "streamed":
            self.compare("losses", "resident", losses, batch=batch, probes=probes)
        self.add(contender, batch=batch, probes=probes, losses=losses, per_step=counted, **times)

    def zo2(self) -> None:
        """ZO2's loop."""
        start = time.perf_counter()
        loop, fill = ZO2Loop(self.meta_model(), self.device, lr=LR, eps=EPS, seed=SEED), RandomWeights(self.device)
        with torch.no_grad():
            for name, view in loop.named_weights():
                fill(name, view)
        del fill
        print(f"zo2: made in {time.perf_counter() - start:.1f} s", flush=True)
        for batch in self.batches:
            ids, losses = self.ids(batch), []
            step = lambda ids=ids, losses=losses: losses.append(loop.step(ids))  # noqa: E731
            times = self.seconds_of(step, WARMUPS, self.options.repeats)
            self.add("zo2", batch=batch, probes=1, losses=losses, **times)
        loop.close()


def closure(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The loss of one forward."""
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.float()


def main() -> None:
    """Parse the options, run the contenders in turn; status 1 if bits differ that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="+", choices=["bare", "resident", "streamed", "zo2"])
    parser.add_argument("--model", choices=[*SHAPES, "tiny"], default="opt-13b", help="published OPT shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", help="float32, bfloat16 or float16")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--batches", default="1,4", help="sequences a step, comma-separated")
    parser.add_argument("--probes", type=int, default=16, help="of the step of many probes; 1: no such step")
    parser.add_argument("--repeats", type=int, default=5, help="steps in a row, of which the mean is reported")
    parser.add_argument("--json", type=Path, required=True, help="where rows are added")
    options = parser.parse_args()
    steps = Steps(options)
    for contender in options.contenders:
        getattr(steps, contender)()
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    if steps.wrong:
        raise SystemExit("\n".join(["error: bits differ", *steps.wrong]))


if __name__ == "__main__":
    main()
