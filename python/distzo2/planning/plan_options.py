"""The options of `distzo2 plan`."""

from __future__ import annotations

import argparse

from distzo2.run.options import num_bytes, positive_int


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
    group = parser.add_argument_group("what")
    group.add_argument(
        "--model", required=True, metavar="DIR|config.json|NAME",
        help="a checkpoint or its configuration (no weights are read), or opt-125m, opt-1.3b, ... opt-175b",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="dtype of the weights; auto: the configuration's, float16 for a name",
    )  # fmt: skip
    group.add_argument("--batch", type=positive_int, default=8, metavar="N", help="sequences a step, of all ranks")
    group.add_argument("--tokens", type=positive_int, default=512, metavar="N", help="tokens of a sequence")
    group.add_argument(
        "--micro-batches", type=positive_int, metavar="N",
        help="parts of the batch, of all ranks; must divide --batch (default: one a data rank)",
    )  # fmt: skip
    group.add_argument("--probes", type=positive_int, default=1, metavar="K", help="perturbations a step")
    group.add_argument("--estimator", choices=("spsa", "fzoo"), default="spsa", help="spsa: 2K forwards; fzoo: K + 1")
    group.add_argument("--noise", choices=("normal", "rademacher"), default="normal", help="of the perturbations")

    group = parser.add_argument_group("where")
    group.add_argument(
        "--machine", default="this", metavar="this|a100|h100|h200|FILE",
        help="this: what distzo2 measure saved; a node of 8 GPUs by name; or a file that distzo2 measure wrote",
    )  # fmt: skip
    group.add_argument("--parallel", metavar="pert=P,data=D", help="the mesh (default: one device)")
    group.add_argument("--nproc", type=positive_int, metavar="N", help="try every mesh of N ranks, and name the best")
    group.add_argument(
        "--slice", choices=("on", "off", "auto"), default="auto",
        help="whether ranks share every block's transfer; auto: both are planned",
    )  # fmt: skip
    group.add_argument("--weights", choices=("device", "host", "disk"), default="host", help="where blocks live")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the machine's GPUs")
    group.add_argument("--slots", type=positive_int, default=3, metavar="N", help="blocks on the device at once")
    group.add_argument(
        "--write-every", type=positive_int, default=1, metavar="N", help="write a block back at every N-th step"
    )
    group.add_argument(
        "--memory-budget", type=num_bytes, metavar="BYTES|auto", help="bytes of the device for weights, as for finetune"
    )
    group.add_argument("--max-lanes", type=positive_int, metavar="N", help="evaluations that share a pass, on a rank")
    group.add_argument(
        "--devices-per-switch", type=positive_int, default=1, metavar="N", help="GPUs that share a link to the host"
    )
    group.add_argument("--no-nvlink", action="store_true", help="all-gathers go over the links to the host")

    group = parser.add_argument_group("what is written")
    group.add_argument("--picture", metavar="FILE", help="the best plan's timeline as a PNG")
    group.add_argument("--trace", metavar="FILE", help="the same as a Chrome trace, which opens in Perfetto")
    group.add_argument("--json", metavar="FILE", help="all of it as JSON; - for standard output, and nothing else")
