"""`distzo2 finetune`: a checkpoint and a JSONL file go in, a run directory comes out.

A run is its base checkpoint and its journal. Everything else, from the batch of a step to its learning rate, is a
function of the options and the step's number, so a run that was interrupted continues as if it had not been. This
module is what comes before the first step: what can be refused is refused, the run directory is claimed, the model is
loaded. The steps are in loop.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from distzo2.checkpoint.pretrained import from_pretrained
from distzo2.checkpoint.writing import DISK_SLACK_BYTES
from distzo2.errors import UsageError
from distzo2.parallel.group import current
from distzo2.record.journal import Journal
from distzo2.record.weight_file import WeightFile
from distzo2.run.directory import RunDirectory
from distzo2.run.launch import from_rank_0, launch_id, restarts, together
from distzo2.run.loop import TrainLoop
from distzo2.run.metrics import peak_bytes
from distzo2.run.options import FinetuneOptions, changed
from distzo2.run.preflight import DTYPES, ModelSize, check_disk, check_memory, check_output, model_size
from distzo2.streaming.offload import runtime_of, usable_device
from distzo2.tasks.objectives import Objective, resolve_objective
from distzo2.tasks.tokenize import load_examples, load_tokenizer, sequence_limit
from distzo2.text import gib

_PATHS = ("model", "train", "eval", "trace", "branch_from", "weights_dir")  # absolute in run.json


def finetune(options: FinetuneOptions, log: Callable[[str], None] = lambda line: None) -> None:
    """Runs `distzo2 finetune` to the end.

    Raises:
        DistZO2Error: bad input, or the run stopped itself. The journal holds every step that was made.
        KeyboardInterrupt: the step in flight is dropped whole or in the journal whole.
    """
    mesh, run = current(), RunDirectory(options.out)
    leads = mesh is None or mesh.rank == 0  # this process writes the run directory and prints
    log = log if leads else (lambda line: None)
    resume = from_rank_0("looking for a run to continue", lambda: _continues(options, run, log))
    options = replace(options, resume=resume, parallel=options.parallel if mesh is None else str(mesh.shape))
    with together(mesh, "reading data and options"):
        # With --device cuda each rank of a machine has a GPU to itself.
        own_gpu = mesh is not None and options.device == "cuda"
        device = usable_device(f"cuda:{mesh.local_rank}" if own_gpu else options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        check_output(trace=options.trace)
        size = model_size(options.model, DTYPES.get(options.dtype))
        tokenizer = load_tokenizer(options.model)
        limit = sequence_limit(options.model, options.max_length)
        reading = {"limit": limit, "truncate": options.truncate}
        train = load_examples(options.train, tokenizer, **reading)
        objective_name = resolve_objective(options.objective, train, options.train)
        held_out = load_examples(options.eval, tokenizer, **reading) if options.eval else []
        if held_out:
            resolve_objective(objective_name, held_out, options.eval)
        check_memory(size, device, options.weights, _ranks_here(), _copies_here(options.weights))
        train_sha256 = hashlib.sha256(Path(options.train).read_bytes()).hexdigest()
    if mesh is not None:
        mesh.exchange.agree("the data", {"the training file": train_sha256, "the bytes of the model": size.total})
    settings = asdict(options)
    settings |= {name: str(Path(settings[name]).absolute()) for name in _PATHS if settings[name]}
    loop = None
    try:
        with together(mesh, "claiming the run directory"):
            if leads:
                run.claim()
                if options.resume:
                    _take_over(options, log, run, settings, train_sha256)
                if run.resumes:
                    run.remove_leftovers()  # they take the room that this run's will
                _check_room(options, size, run)
                if not options.resume:  # if this process is killed before the journal is there, --resume begins again
                    run.update(options=settings, train_sha256=train_sha256, status="starting", launch=launch_id())
        with together(mesh, "loading the model"):
            model = from_pretrained(
                options.model,
                device=device,
                weights=options.weights,
                dtype=DTYPES.get(options.dtype),
                memory_budget=options.memory_budget,
                write_every=options.write_every,
                weight_file=_weight_file(options, run, log),
                train=options.train_mode,
            )
        with closing(runtime_of(model)):
            objective = Objective(model, objective_name, pad_id=tokenizer.pad_token_id or 0, device=device)
            loop = TrainLoop(options, log, run, model, objective, train, held_out, size)
            with closing(loop):
                with together(mesh, "starting the run"):
                    loop.start(settings)
                loop.run_to_end()
        memory = f"peak memory {gib(peak_bytes())}, weights {gib(size.total)}"
        log(f"{loop.optimizer.step_count} steps in {run.path}; {memory}")
    except BaseException as error:
        foreign = isinstance(error.__cause__, FileExistsError)  # another program made a journal meanwhile
        if loop is None or not loop.has_stepped:
            run.withdraw(with_journal=not foreign)
            if isinstance(error, KeyboardInterrupt) and not options.resume:
                raise KeyboardInterrupt("interrupted before the first step: nothing was written") from None
        raise
    finally:
        run.release()


def _continues(options: FinetuneOptions, run: RunDirectory, log: Callable[[str], None]) -> bool:
    """Whether the run continues what is in --out: as asked, or because torchrun restarted these ranks."""
    restarted = restarts() > 0 and run.is_of_launch(launch_id())
    continues = run.check(options.resume or restarted)
    if continues and restarted:
        log(f"restart {restarts()}: continuing the run in {options.out}")
    return continues


def _ranks_here() -> int:
    """Ranks of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if current() is not None else 1


def _copies_here(weights: str) -> int:
    """Copies of the streamed weights that this machine keeps at least."""
    mesh = current()
    return _ranks_here() if mesh is None or mesh.node is None or weights == "device" else 1


def _take_over(
    options: FinetuneOptions, log: Callable[[str], None], run: RunDirectory, settings: dict, train_sha256: str
) -> None:
    """Checks what must hold before an earlier process's run continues."""
    for change in changed(run.record["options"], settings, str(run.path)):
        log(f"resume: {change}")
    if run.record.get("train_sha256") != train_sha256:
        raise UsageError(f"{run.path}: the training file is not the one that the run began with: {settings['train']}")
    with Journal.open(run.journal) as journal:
        if journal.torn:
            log(journal.torn)
        num_steps = len(journal.entries)
    if num_steps > options.steps:
        advice = f"distzo2 replay {run.path} --to-step {options.steps} makes an earlier checkpoint again"
        raise UsageError(f"--steps {options.steps}: {run.path} has made {num_steps} already; {advice}")
    if options.save != "none":
        run.check_checkpoint()
    if (run.path / "snapshots").exists():
        log(f"{run.path / 'snapshots'}: snapshots of an earlier version are not read, and may be removed")


def _weight_file(options: FinetuneOptions, run: RunDirectory, log: Callable[[str], None]) -> WeightFile | None:
    """Where the run keeps weights that survive a crash; None if it keeps none, and an earlier process kept none."""
    path, every = run.weight_file(options.weights_dir), options.snapshot_every
    if every is None:
        every = 100 if options.weights == "disk" else 0
    exists = from_rank_0("looking for a weight file", path.exists)  # machines may share no disk
    if not (every or options.snapshot_minutes or options.weights == "disk" or exists):
        return None
    return WeightFile(path, run.journal, every, options.snapshot_minutes, options.snapshot_pace, log)


def _check_room(options: FinetuneOptions, size: ModelSize, run: RunDirectory) -> None:
    """Raises DistZO2Error unless the weight files and the checkpoint fit on their disks. A checkpoint of fewer steps
    makes room for the new one, and so does a weight file."""
    weights, exists = {}, run.weight_file(options.weights_dir).exists()
    if options.weights == "disk" and not exists:
        weights = {"the file of streamed weights": size.total * _copies_here(options.weights)}
    elif (options.snapshot_every or options.snapshot_minutes) and not exists:
        weights = {"the copies of the weights": size.total}
    needs = {"the checkpoint": size.total} if options.save != "none" and not run.has_checkpoint else {}
    if options.save != "none":  # the writer of the checkpoint asks for it at the end
        needs["to spare"] = DISK_SLACK_BYTES
    if options.weights_dir:
        check_disk(options.weights_dir, weights)
        weights = {}
    check_disk(options.out, weights | needs)
