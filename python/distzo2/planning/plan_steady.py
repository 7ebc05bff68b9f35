"""Steps in the steady state: a schedule's steps, played until they repeat, and what one of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from distzo2.planning.plan_tasks import Sharing, Task, busy_seconds, play
from distzo2.planning.schedule import Schedule, Work

# Steps that are played first: the first has no update to make and nothing prefetched, and where transfers bound, they
# pile up for a while. More of them while the steps after still differ.
WARM_STEPS = (2, 6, 14)
SAME = 1e-3
MOST_STEPS = 16  # that are played, where blocks are written in turn


@dataclass(frozen=True)
class Played:
    """What came of the work, a step in the steady state."""

    step_s: float
    busy_s: dict[str, float]  # by resource
    wait_s: float  # of compute, for transfers
    noise_s: float  # part of compute, and of side
    bytes_up: float
    bytes_down: float
    bytes_gathered: float  # received from other ranks
    scratch_bytes: int
    tasks: Sequence[Task]
    steps: Sequence[tuple[float, float]]  # begin and end of each step of the steady state


def play_steps(work: Work) -> Played:
    """Plays steps until they repeat, and takes the mean of those after."""
    pairs = ()
    if work.transfers is not None:
        pairs = (("upload", "download", work.transfers.up_speed, work.transfers.down_speed),)
    # A slice's update takes from the device what compute would have; on a CPU so does a gather.
    pool = frozenset({"compute", "side", "gather"} if work.on_host else {"compute", "side"})
    num_steps = max(2, min(work.write_every, MOST_STEPS))
    for warm in WARM_STEPS:
        schedule = Schedule(work)
        for _ in range(warm + num_steps):
            schedule.step()
        play(schedule.tasks, Sharing(pairs, (pool,)))
        ends = [task.end for task in schedule.step_ends]
        lengths = [b - a for a, b in pairwise(ends)]
        before, after = sum(lengths[-2 * num_steps : -num_steps]), sum(lengths[-num_steps:])
        if len(lengths) >= 2 * num_steps and abs(after - before) <= SAME * after:
            break
        if work.write_every > 1 and warm >= work.write_every:
            break
    return _figures(schedule, ends, warm, num_steps)


def _figures(schedule: Schedule, ends: Sequence[float], warm: int, num_steps: int) -> Played:
    begin, end = ends[warm - 1], ends[-1]

    def inside(*kinds: str) -> list[tuple[Task, float]]:
        """Tasks, with the share of them that lies in the window."""
        found = []
        for task in schedule.tasks:
            if task.kind in kinds and task.end > begin and task.start < end and task.end > task.start:
                part = min(task.end, end) - max(task.start, begin)
                found.append((task, part / (task.end - task.start)))
        return found

    def num_bytes(kind: str) -> float:
        return sum(task.args["bytes"] * share for task, share in inside(kind)) / num_steps

    busy = busy_seconds(schedule.tasks, begin, end)
    waits = wait_intervals(schedule.tasks)
    return Played(
        (end - begin) / num_steps,
        {resource: seconds / num_steps for resource, seconds in busy.items()},
        sum(max(0.0, min(b, end) - max(a, begin)) for a, b, _ in waits) / num_steps,
        sum((task.end - task.start) * share for task, share in inside("materialize", "update")) / num_steps,
        num_bytes("upload"),
        num_bytes("download"),
        num_bytes("gather"),
        schedule.scratch_bytes,
        schedule.tasks,
        list(zip(ends[warm - 1 :], ends[warm:], strict=False)),
    )


def wait_intervals(tasks: Sequence[Task]) -> list[tuple[float, float, str]]:
    """When compute stood still for a transfer, and the unit it waited for."""
    result, reached = [], 0.0
    for task in tasks:
        if task.resource != "compute":
            continue
        if task.kind in ("wait", "stall") and task.end > reached:
            issued = max((t.end for t in task.after if t.resource == "host"), default=0.0)
            if task.end > max(reached, issued):
                result.append((max(reached, issued), task.end, task.name))
        reached = max(reached, task.end)
    return result
