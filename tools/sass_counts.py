"""Counts the instructions that the CUDA kernels spend on an element, from their machine code.

    python tools/sass_counts.py build/core/libdistzo2_kernels.a                 # a table
    python tools/sass_counts.py build/core/libdistzo2_kernels.a --check         # against bench/results/sass_counts.json
    python tools/sass_counts.py build/core/libdistzo2_kernels.a --write         # the record, after a change on purpose

A thread works on octets, in one loop for each dtype. What is counted is the way through that loop without exceptions:
whole octets, moved in 16-byte accesses, all noise made, no NaN. Of the paths with the most 16-byte accesses, square
roots and wide products it is the shortest. --check fails where a count is more than 3% over the recorded one, a kernel
spills, or a bf16 perturbation needs more than 45 instructions an element.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RECORD = Path(__file__).parent.parent / "bench" / "results" / "sass_counts.json"
TOLERANCE = 1.03
OCTET = 8
MAX_BF16_PERTURB = 45.0
# Kernels by what is in their mangled names: a name, the pattern.
KERNELS = {
    "perturb": r"SimpleProgramILi0ELi1ELNS_7PurposeE0E.*InlineTables",
    "perturb ±": r"SimpleProgramILi0ELi2ELNS_7PurposeE0E.*InlineTables",
    "update": r"SimpleProgramILi1ELi0ELNS_7PurposeE0E.*InlineTables",
    "visit": r"SimpleProgramILi1ELi2ELNS_7PurposeE0E.*InlineTables",
    "perturb, signs": r"SimpleProgramILi0ELi1ELNS_7PurposeE1E.*InlineTables",
    "visit, signs": r"SimpleProgramILi1ELi2ELNS_7PurposeE1E.*InlineTables",
}


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def operation(self) -> str:
        """The operation with its modifiers, without a predicate."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for anything else."""
        if self.operation.split(".")[0] != "BRA":
            return None
        return int(re.findall(r"0x([0-9a-f]+)", self.text)[-1], 16)

    @property
    def always(self) -> bool:
        """Whether a branch has no condition."""
        return not self.text.startswith("@") and len(self.text.split()) == 2


def cuobjdump() -> str:
    """The disassembler, as it comes inside the triton package."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.is_file():
        raise SystemExit(f"error: no cuobjdump at {path}")
    return str(path)


def functions(library: Path, arch: str, tool: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by mangled name."""
    text = subprocess.run([tool, "-sass", "-arch", arch, str(library)], capture_output=True, text=True, check=True)
    found = {}
    for part in re.split(r"\n\s*Function : ", text.stdout)[1:]:
        name, body = part.split("\n", 1)
        rows = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", body)
        found[name.strip()] = [Instruction(int(address, 16), line) for address, line in rows]
    return found


def resources(library: Path, arch: str, tool: str) -> dict[str, dict[str, int]]:
    """Registers and local memory (spills) of each kernel."""
    text = subprocess.run([tool, "-res-usage", "-arch", arch, str(library)], capture_output=True, text=True, check=True)
    rows = re.findall(r"Function (\S+):\s+REG:(\d+).*?LOCAL:(\d+)", text.stdout + text.stderr)
    return {name: {"registers": int(registers), "spilled": int(local)} for name, registers, local in rows}


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) positions of the loops that load or store 16 bytes; the outermost ones."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for last, instruction in enumerate(code):
        target = instruction.target
        if target is not None and target < instruction.address:
            first = position[target]
            if any(".128" in one.operation for one in code[first:last]):
                found.append((first, last))
    return [one for one in found if not any(o != one and o[0] <= one[0] and one[1] <= o[1] for o in found)]


def dtype_of(code: list[Instruction]) -> str:
    """The dtype that a loop works on: an octet of float32 is two loads of 16 bytes, and float16 needs conversions."""
    operations = [instruction.operation for instruction in code]
    if sum(operation.startswith("LDG.E.128") for operation in operations) == 2:
        return "float32"
    return "float16" if any(operation.startswith("HADD2.F32") for operation in operations) else "bfloat16"


def shortest(code: list[Instruction], first: int, last: int) -> int:
    """Instructions on the path described above; branches backward, of inner loops, are not taken."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    # At each position: what has been passed (16-byte accesses, square roots, wide products) -> fewest instructions.
    ways: dict[int, dict[tuple[int, int, int], int]] = {first: {(0, 0, 0): 0}}
    for at in range(first, last + 1):
        for (wide, roots, products), count in ways.pop(at, {}).items():
            instruction = code[at]
            operation = instruction.operation
            passed = (
                wide + (".128" in operation),
                roots + operation.startswith("MUFU.RSQ"),
                products + operation.startswith(("IMAD.WIDE.U32", "IMAD.HI.U32")),
            )
            following = []
            target = instruction.target
            if at == last or target is None or not instruction.always:
                following.append(at + 1)
            if target is not None and at != last and first < position[target] <= last and position[target] > at:
                following.append(position[target])
            if operation == "EXIT" and instruction.always:
                continue
            for to in following:
                best = ways.setdefault(to, {})
                best[passed] = min(best.get(passed, count + 1), count + 1)
    ends = ways[last + 1]
    return ends[max(ends)]


def count(library: Path, arch: str, tool: str) -> dict[str, dict[str, float]]:
    """For each kernel of KERNELS: instructions an element by dtype, registers, bytes spilled."""
    code, used = functions(library, arch, tool), resources(library, arch, tool)
    if not code:
        raise SystemExit(f"error: {library} has no machine code for {arch}")
    table: dict[str, dict[str, float]] = {}
    for kernel, pattern in KERNELS.items():
        names = [name for name in code if re.search(pattern, name)]
        if len(names) != 1:
            raise SystemExit(f"error: {library}, {arch}: expected one kernel like {pattern}, found {names}")
        body = code[names[0]]
        row: dict[str, float] = {}
        for first, last in loops(body):
            row[dtype_of(body[first:last])] = shortest(body, first, last) / OCTET
        if sorted(row) != ["bfloat16", "float16", "float32"]:
            raise SystemExit(f"error: {library}, {arch}, {kernel}: expected a loop for each dtype, found {sorted(row)}")
        table[kernel] = row | used[names[0]]
    return table


def failures(counts: dict, record: dict) -> list[str]:
    """What is over the record or its limits."""
    wrong = []
    for arch, table in counts.items():
        for kernel, row in table.items():
            if row["spilled"]:
                wrong.append(f"{arch}, {kernel}: {row['spilled']} bytes of registers are spilled")
            for dtype in ("float32", "bfloat16", "float16"):
                recorded = record["counts"].get(arch, {}).get(kernel, {}).get(dtype)
                if recorded is None:
                    wrong.append(f"{arch}, {kernel}, {dtype}: not in the record {RECORD.name}")
                elif row[dtype] > TOLERANCE * recorded:
                    wrong.append(f"{arch}, {kernel}, {dtype}: {row[dtype]} instructions, {recorded} on record")
        if table["perturb"]["bfloat16"] > MAX_BF16_PERTURB:
            wrong.append(f"{arch}, perturb, bfloat16: {table['perturb']['bfloat16']} instructions, at most 45")
    return wrong


def main() -> int:
    """Parse the options, count, and print, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="what nvcc made: an object, a library or a cubin")
    parser.add_argument("--archs", default="sm_80,sm_90,sm_100", help="comma-separated")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail where the record is exceeded")
    action.add_argument("--write", action="store_true", help="replace the record")
    options = parser.parse_args()
    tool = cuobjdump()
    counts = {arch: count(options.library, arch, tool) for arch in options.archs.split(",")}
    for arch, table in counts.items():
        for kernel, row in table.items():
            print(
                f"{arch:7} {kernel:14} fp32 {row['float32']:6.2f}  bf16 {row['bfloat16']:6.2f}  "
                f"fp16 {row['float16']:6.2f} instructions an element, {row['registers']} registers"
            )
    if options.write:
        RECORD.write_text(json.dumps({"what": __doc__.splitlines()[0], "counts": counts}, indent=1) + "\n")
    wrong = failures(counts, json.loads(RECORD.read_text())) if options.check else []
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
