"""What the processes that tests fork have ready: imports, and what transformers makes once in a process."""

import gc
import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in (
    "torch._dynamo", "torch.distributed.device_mesh", "transformers.models.llama.modeling_llama",
    "distzo2.cli.main", "distzo2.optim.shared_step", "distzo2.optim.zosgd", "distzo2.run.train",
):  # fmt: skip
    importlib.import_module(name)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
gc.freeze()  # a collection looks at what comes later alone
