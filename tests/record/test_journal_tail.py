"""What a power cut leaves of a journal's unsynced lines is cut and told; anything else that is wrong is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from journal_cases import bits, make_entry, make_test_header
from power_cut import File

from distzo2.record.journal import Journal, JournalError, StepEntry, read_journal
from distzo2.record.tail import SECTOR_BYTES

NUM_STEPS = 40  # some 10 KB: three pages


@pytest.fixture(params=[False, True], ids=["plain", "chained"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bytes, list[StepEntry], list[int]]:
    """A journal's path, its bytes, its steps, and where each step's line begins, with the end of the last."""
    path = tmp_path / "journal.jsonl"
    # Losses of several lengths, so that lines begin anywhere in a sector.
    entries = [make_entry(step, losses=[[step / 7] * (1 + step % 5)]) for step in range(NUM_STEPS)]
    Journal.create(path, make_test_header(chain=request.param), entries).close()
    data = path.read_bytes()
    starts = [len(b"".join(data.splitlines(True)[:count])) for count in range(1, NUM_STEPS + 2)]
    assert starts[-1] == len(data) > 10_000
    return path, data, entries, starts


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
            found["torn"] += 1
            found["cut in the middle"] += b"\n" in left[starts[num_steps] : -1]
        with Journal.open(path) as again:  # and it goes on to the same bytes
            assert again.torn == contents.torn and again.durable == num_steps
            for entry in entries[num_steps:]:
                again.append(entry)
        assert path.read_bytes() == data
    print(found)
    assert found["torn"] > 40 and found["cut in the middle"] > (20 if lines_a_write < NUM_STEPS else 5)


def test_what_was_cut_is_told(journal) -> None:
    path, data, _, starts = journal
    path.write_bytes(data[: starts[3]] + bytes(starts[5] - starts[3]) + data[starts[5] :])
    torn = read_journal(path).torn
    assert torn.startswith(
        f"{path}: line 5 (step 3) and what follows was torn and left out: {len(data) - starts[3]} bytes"
    )
    assert f" {NUM_STEPS - 5} whole lines among them, with zeros from byte {starts[3]} on" in torn


def test_a_hole_longer_than_a_line_may_be(journal) -> None:
    path, data, _, starts = journal
    path.write_bytes(data[: starts[3]] + bytes(5 << 20) + data[starts[4] :])
    assert len(read_journal(path).entries) == 3


def holed(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + bytes(end - begin) + data[end:]


def refused_damages(data: bytes, starts: list[int]) -> dict[str, bytes]:
    """What each is, and the bytes: most have the zeros of a power cut, and something else too."""
    good = holed(data, starts[9], starts[12])
    swapped = data[starts[20] : starts[21]] + data[starts[19] : starts[20]]
    sector = (starts[9] // SECTOR_BYTES + 1) * SECTOR_BYTES
    changed = bytearray(good)
    changed[starts[20] + 30] ^= 1
    before = bytearray(good)
    before[starts[5] + 30] ^= 1
    return {
        "a zero byte in a line": holed(data, starts[9] + 30, starts[9] + 31),
        "zeros that begin in a line": holed(data, starts[9] + 1, starts[12]),
        "zeros that end in a line": holed(data, starts[9], starts[11] + 1),
        "zeros that end after a sector": holed(data, starts[9], sector + 1),
        "zeros that begin before a sector": holed(data, sector - 1, sector + SECTOR_BYTES),
        "zeros put in, and no line missing": data[: starts[9]] + bytes(SECTOR_BYTES) + data[starts[9] :],
        "a changed line after the hole": bytes(changed),
        "a changed line before the hole": bytes(before),
        "lines after the hole in another order": good[: starts[19]] + swapped + good[starts[21] :],
        "a line after the hole removed": good[: starts[19]] + good[starts[20] :],
        "other bytes after the hole": good[: starts[19]] + b"\xff" + good[starts[19] :],
        "a changed line, and no zeros": data[: starts[-3]] + b"x" + data[starts[-3] :],
    }


def test_damage_that_zeros_do_not_explain_is_refused(journal) -> None:
    path, data, _, starts = journal
    for what, damaged in refused_damages(data, starts).items():
        path.write_bytes(damaged)
        for reader in (read_journal, Journal.open):
            with pytest.raises(JournalError, match=r"journal\.jsonl: line \d+: the CRC does not match"):
                pytest.fail(f"{what}: {reader(path)}")
        assert path.read_bytes() == damaged, what
    path.write_bytes(holed(data, starts[9], starts[12]))
    assert len(read_journal(path).entries) == 9
