"""`distzo2 finetune`: a checkpoint and a JSONL file go in, a run directory comes out.

A run is its base checkpoint and its journal. Everything else here, from the batch of a step to its learning rate, is a
function of the options and the step's number, so a run that was interrupted goes on as if it had not been. What is
here comes before the first step: what can be refused is refused, the run directory is claimed, the model is loaded.
The steps are in train_loop.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import distzo2
from distzo2.checkpoint.writing import DISK_SLACK_BYTES
from distzo2.errors import UsageError
from distzo2.parallel.group import Mesh, current
from distzo2.record.journal import Journal
from distzo2.record.snapshot import snapshots_in
from distzo2.run.directory import RunDirectory
from distzo2.run.launch import launch_id, restarts
from distzo2.run.loop import Result, TrainLoop, together
from distzo2.run.preflight import DTYPES, ModelSize, check_device, check_disk, check_memory, model_size, set_threads
from distzo2.tasks.lines import load_examples, load_tokenizer, sequence_limit
from distzo2.tasks.objectives import Objective, resolve_objective


def finetune(options: Namespace, log: Callable[[str], None] = lambda line: None) -> Result:
    """Runs `options` (see distzo2.run.finetune_options) to the end.

    Raises:
        DistZO2Error: bad input, or the run stopped itself. The journal holds every step that was made.
        KeyboardInterrupt: the step in flight is dropped whole or in the journal whole.
    """
    mesh = current()
    leads = mesh is None or mesh.rank == 0  # this process writes the run directory and prints
    asked = options.resume
    if mesh is not None:
        options = Namespace(**vars(options))
        options.resume = _resumes(options, mesh, log)
        options.parallel = str(mesh.shape)
    elif launch_id() is not None and restarts() and not options.resume:
        options = Namespace(**{**vars(options), "resume": RunDirectory.restarted(options.out, launch_id()) is not None})
    elif options.resume:
        options = Namespace(**{**vars(options), "resume": RunDirectory.unbegun(options.out) is None})
    log = log if leads else (lambda line: None)
    with together(mesh, "reading data and options"):
        device = _device(options, mesh)
        set_threads(options.threads)
        if options.trace and not Path(options.trace).absolute().parent.is_dir():
            raise UsageError(f"--trace {options.trace}: its directory does not exist")
        if options.trace and Path(options.trace).is_dir():
            raise UsageError(f"--trace {options.trace}: a file was expected, not a directory")
        run = RunDirectory(options.out)
        if leads:
            run = RunDirectory.resumed(options.out) if options.resume else None
            run = run or (RunDirectory.unbegun(options.out) if asked else None) or RunDirectory.new(options.out)
        size = model_size(options.model, DTYPES.get(options.dtype))
        tokenizer = load_tokenizer(options.model)
        limit = sequence_limit(options.model, options.max_length)
        train = load_examples(options.train, tokenizer, limit=limit, truncate=options.truncate)
        held_out = (
            load_examples(options.eval, tokenizer, limit=limit, truncate=options.truncate) if options.eval else []
        )
        objective_name = resolve_objective(options.objective, train, options.train)
        if held_out:
            resolve_objective(objective_name, held_out, options.eval)
        check_memory(size, device, options.weights, ranks_here(), copies_here(options.weights))
        if leads and not options.resume and not run.begins_again:
            _check_room(options, size, run)
        train_sha256 = hashlib.sha256(Path(options.train).read_bytes()).hexdigest()
    if mesh is not None:
        mesh.exchange.agree("the data", {"the training file": train_sha256, "the bytes of the model": size.total})
    settings = {k: v for k, v in vars(options).items() if k not in ("command", "run")}
    settings |= {
        k: str(Path(settings[k]).absolute())
        for k in ("model", "train", "eval", "trace", "branch_from", "weights_dir")
        if settings[k]
    }
    loop = None
    try:
        with together(mesh, "claiming the run directory"):
            if leads:
                run.claim()
                if options.resume:
                    _take_over(options, log, run, size, settings, train_sha256)
                else:  # if this process is killed before the journal is there, --resume begins again
                    if run.begins_again:
                        run.remove_leftovers()
                        _check_room(options, size, run)
                    launch = {} if launch_id() is None else {"launch": launch_id()}
                    run.update(options=settings, train_sha256=train_sha256, status="starting", **launch)
        with together(mesh, "loading the model"):
            model = distzo2.from_pretrained(
                options.model,
                device=device,
                weights=options.weights,
                dtype=DTYPES.get(options.dtype),
                directory=options.weights_dir or run.path,
                memory_budget=options.memory_budget,
                write_every=options.write_every,
                train=options.train_mode,
            )
        try:
            pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            objective = Objective(model, objective_name, pad_id=pad_id, device=device)
            loop = TrainLoop(options, log, run, model, objective, train, held_out, size)
            try:
                with together(mesh, "starting the run"):
                    loop.start(settings, train_sha256)
                return loop.run_to_end()
            finally:
                loop.close()
        finally:
            distzo2.runtime_of(model).close()
    except BaseException as error:
        not_ours = isinstance(error.__cause__, FileExistsError)  # a journal that another program made meanwhile
        if loop is None or not loop.has_stepped:
            run.withdraw(with_journal=not not_ours)
        raise
    finally:
        run.release()


def ranks_here() -> int:
    """Ranks of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if current() is not None else 1


def copies_here(weights: str) -> int:
    """Copies of the streamed weights that this machine keeps at least."""
    mesh = current()
    return ranks_here() if mesh is None or mesh.node is None or weights == "device" else 1


def _device(options: Namespace, mesh: Mesh | None) -> torch.device:
    """Where this rank computes: with --device cuda each rank of a machine has a GPU of its own."""
    name = options.device
    return check_device(f"cuda:{mesh.local_rank}" if mesh is not None and name == "cuda" else name)


def _resumes(options: Namespace, mesh: Mesh, log: Callable[[str], None]) -> bool:
    """Whether the run goes on with what is in --out: as asked, or since torchrun has started these ranks anew."""

    def look() -> bytes:
        if options.resume or not restarts() or launch_id() is None:
            return json.dumps(options.resume and RunDirectory.unbegun(options.out) is None).encode()
        resumes = RunDirectory.restarted(options.out, launch_id()) is not None
        if resumes:
            log(f"restart {restarts()}: going on with the run in {options.out}")
        return json.dumps(resumes).encode()

    return json.loads(mesh.exchange.from_rank_0("looking for a run to go on with", look))


def _take_over(
    options: Namespace,
    log: Callable[[str], None],
    run: RunDirectory,
    size: ModelSize,
    settings: dict[str, Any],
    train_sha256: str,
) -> None:
    """What must hold before an earlier process's run goes on, told before anything is loaded."""
    for change in run.check_same(settings, train_sha256):
        log(f"resume: {change}")
    with Journal.open(run.journal) as journal:
        if journal.torn:
            log(journal.torn)
        num_steps = len(journal.entries)
    if num_steps > options.steps:
        advice = f"distzo2 replay {run.path} --to-step {options.steps} makes an earlier checkpoint again"
        raise UsageError(f"--steps {options.steps}: {run.path} has made {num_steps} already; {advice}")
    if options.save != "none":
        run.check_checkpoint()
    run.remove_leftovers()  # they take the room that this run's will
    _check_room(options, size, run)


def _check_room(options: Namespace, size: ModelSize, run: RunDirectory) -> None:
    """The block file and the checkpoint must fit on their disks; a checkpoint that is there is replaced."""
    block_file = (
        {"the file of streamed weights": size.total * copies_here(options.weights)} if options.weights == "disk" else {}
    )
    checkpoint = {"the checkpoint": size.total} if options.save != "none" and not run.has_checkpoint else {}
    if options.snapshot_every or options.snapshot_minutes:
        there = len(snapshots_in(run.snapshots))
        checkpoint["the snapshots"] = size.total * max(1, options.keep + 1 - there)
    if options.save != "none":  # the writer of the checkpoint asks for it at the end
        checkpoint["to spare"] = DISK_SLACK_BYTES
    if options.weights_dir and block_file:
        check_disk(options.weights_dir, block_file)
        block_file = {}
    check_disk(options.out, {**block_file, **checkpoint})
