"""A limit on memory that is hit in any phase ends in one clear error, and a training that continues with the
same bits."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

# Forks a training for each limit, since a limit once hit leaves its traces in a process.
SCRIPT = """
import faulthandler, os, resource, sys, tempfile
import torch, torch._dynamo, distzo2, distzo2.streaming.offload, distzo2.optim.zosgd
from torch import nn

WIDTH, MIB = 1024, 2**20

class Layer(nn.Linear):
    # No matrix product: MKL's take another way, and so other bits, where they get no memory for their buffers.
    def forward(self, x):
        return x * self.weight.sum(0) + self.bias

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(WIDTH, WIDTH) for _ in range(6))
        self.head = Layer(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x).square().mean()

def mapped():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096

def limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, resource.RLIM_INFINITY))

def train(weights, extra):
    faulthandler.dump_traceback_later(60, exit=True)
    torch.manual_seed(0)
    model, x, losses, phase = Model(), torch.randn(64, WIDTH), [], "offload"
    with tempfile.TemporaryDirectory() as directory:
        if extra is not None:
            limit(mapped() + extra * MIB)
        try:
            model = distzo2.offload(model, device="cpu", weights=weights, directory=directory)
            opt = distzo2.ZOSGD(model, lr=1e-3, eps=1e-3)
            phase = "step"
            while len(losses) < 3:
                losses.append(opt.step(lambda: model(x)))
            phase = "state_dict"
            model.state_dict()
        except (Exception, MemoryError) as error:
            print(phase, "failed:", type(error).__name__, error)
        limit(resource.RLIM_INFINITY)
        if phase != "offload":
            while len(losses) < 3:
                losses.append(opt.step(lambda: model(x)))
            sums = [float(v.double().sum()).hex() for v in model.state_dict().values()]
            print("result:", [float(loss).hex() for loss in losses], sums)
    return 0

for extra in (None, *map(int, sys.argv[2:])):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = train(sys.argv[1], extra)
        sys.stdout.flush()
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    print("ended:", extra, os.waitstatus_to_exitcode(status))
"""

LIMITS = ["0", "4", "16", "28", "40", "52", "60", "72", "88", "104", "128", "160", "192", "256"]  # MiB more than before
CLEAR = re.compile(
    r"cannot map \d+ bytes|cannot get \d+ bytes|can't allocate memory: you tried to allocate|"
    r"cannot start a thread|can't start new thread|Cannot allocate memory"
)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("weights", ["device", "disk"])
def test_a_limit_on_memory_is_a_clear_error_and_loses_nothing(weights):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, weights, *LIMITS],
        capture_output=True,
        text=True,
        timeout=300,  # with one thread: OpenMP ends the process where it gets no second one
    )
    assert done.returncode == 0, done.stderr
    runs = done.stdout.split("ended:")
    ends = [run.split()[:2] for run in runs[1:]]
    assert ends == [[extra, "0"] for extra in ["None", *LIMITS]], done.stdout + done.stderr
    results = re.findall(r"result: (.*)", done.stdout)
    failures = re.findall(r"(\w+) failed: (.*)", done.stdout)
    assert set(results) == {re.findall(r"result: (.*)", runs[0])[0]}  # the first run had no limit
    for phase, text in failures:
        assert CLEAR.search(text), f"{phase}: {text}"
    assert {phase for phase, _ in failures} >= {"offload", "state_dict"}, done.stdout
