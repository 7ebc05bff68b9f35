"""Lines and their torn end: what a kill or a power cut leaves is cut and reported; other damage is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from journal_cases import bits, make_entry, make_test_header
from power_cut import File

from distzo2.record.entry import StepEntry
from distzo2.record.journal import Journal, read_journal
from distzo2.record.line import JournalError

NUM_STEPS = 40  # some 10 KB: three pages


@pytest.fixture
def journal(tmp_path: Path) -> tuple[Path, bytes, list[StepEntry], list[int]]:
    """A journal's path, its bytes, its steps, and where each step's line begins, with the end of the last."""
    path = tmp_path / "journal.jsonl"
    # Losses of several lengths, so that lines begin anywhere in a page.
    entries = [make_entry(step, losses=[[step / 7] * (1 + step % 5)]) for step in range(NUM_STEPS)]
    Journal.create(path, make_test_header(), entries).close()
    data = path.read_bytes()
    starts = [len(b"".join(data.splitlines(True)[:count])) for count in range(1, NUM_STEPS + 2)]
    assert starts[-1] == len(data) > 10_000
    return path, data, entries, starts


# ---- the torn end


@pytest.mark.parametrize("lines_a_write", [1, 7, NUM_STEPS])
def test_whatever_a_power_cut_leaves_is_read_up_to_there(journal, lines_a_write) -> None:
    """With one line a write (--fsync-every N), and with a write of several lines over several pages."""
    path, data, entries, starts = journal
    rng = random.Random(lines_a_write)
    found = {"whole": 0, "torn": 0, "cut in the middle": 0}
    for _ in range(100):
        num_synced = rng.randrange(NUM_STEPS)
        file = File(bytearray(data[: starts[num_synced]]))
        for step in range(num_synced, NUM_STEPS, lines_a_write):
            last = min(NUM_STEPS, step + lines_a_write)
            file.write(starts[step], data[starts[step] : starts[last]])
        left = file.some(rng)
        path.write_bytes(left)
        contents = read_journal(path)
        num_steps = len(contents.entries)
        assert num_steps >= num_synced
        assert [bits(e) for e in contents.entries] == [bits(e) for e in entries[:num_steps]]
        assert contents.num_bytes == starts[num_steps] and left[: starts[num_steps]] == data[: starts[num_steps]]
        assert (contents.torn is None) == (len(left) == starts[num_steps])
        if contents.torn is None:
            found["whole"] += 1
        else:
            assert contents.torn.startswith(f"{path}: line {num_steps + 2} (step {num_steps}) ")
            assert f" left out: {len(left) - starts[num_steps]} bytes" in contents.torn
            found["torn"] += 1
            found["cut in the middle"] += b"\n" in left[starts[num_steps] : -1]
        with Journal.open(path) as again:  # and it is continued to the same bytes
            assert again.torn == contents.torn and again.durable == num_steps
            for entry in entries[num_steps:]:
                again.append(entry)
        assert path.read_bytes() == data
    print(found)
    assert found["torn"] > 40 and found["cut in the middle"] > (20 if lines_a_write < NUM_STEPS else 5)


def test_a_line_torn_at_any_byte(journal) -> None:
    path, data, entries, starts = journal
    for length in range(starts[2], starts[3]):
        path.write_bytes(data[:length])
        contents = read_journal(path)
        assert path.read_bytes() == data[:length] and len(contents.entries) == 2
        with Journal.open(path) as again:
            assert (again.torn is None) == (length == starts[2]) and contents.torn == again.torn
            if again.torn is not None:
                assert again.torn.endswith(
                    f"line 4 (step 2) was torn and left out: {length - starts[2]} bytes"
                )  # fmt: skip
            assert path.read_bytes() == data[: starts[2]]
            again.append(entries[2])
        assert path.read_bytes() == data[: starts[3]]


def test_what_is_cut_at_zeros_is_reported(journal) -> None:
    path, data, _, starts = journal

    def holed(begin: int, end: int) -> bytes:
        return data[:begin] + bytes(end - begin) + data[end:]

    for damaged, step, num_whole in (
        (holed(starts[3], starts[5]), 3, NUM_STEPS - 5),
        (holed(starts[3] + 9, starts[3] + 10), 3, NUM_STEPS - 4),
        (holed(starts[3] + 9, starts[5] + 1), 3, NUM_STEPS - 6),
        (data[: starts[3]] + bytes(9 << 20) + data[starts[4] :], 3, NUM_STEPS - 4),  # longer than a line may be
    ):
        path.write_bytes(damaged)
        contents = read_journal(path)
        assert len(contents.entries) == step and contents.num_bytes == starts[step]
        assert contents.torn.startswith(
            f"{path}: line {step + 2} (step {step}) and all after it were torn and left out: "
            f"{len(damaged) - starts[step]} bytes, {num_whole} whole lines among them; "
        )


def test_damage_without_a_zero_byte_is_refused(journal) -> None:
    path, data, _, starts = journal
    changed = bytearray(data)
    changed[starts[5] + 30] ^= 1
    hole_after = changed[: starts[9]] + bytes(100) + changed[starts[10] :]
    for damaged in (changed, hole_after, data[: starts[5]] + b"x\n" + data[starts[5] :]):
        path.write_bytes(damaged)
        for reader in (read_journal, Journal.open):
            with pytest.raises(JournalError, match=r"journal\.jsonl: line 7: the CRC does not match"):
                reader(path)
        assert path.read_bytes() == damaged
