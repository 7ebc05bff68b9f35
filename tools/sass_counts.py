"""Counts the instructions that the CUDA kernels spend on an element, from their machine code.

    python tools/sass_counts.py build/core/libdistzo2_kernels.a                 # a table
    python tools/sass_counts.py build/core/libdistzo2_kernels.a --check         # against bench/results/sass_counts.json
    python tools/sass_counts.py build/core/libdistzo2_kernels.a --write         # the record, after a change on purpose

A thread works on octets, in one loop for each dtype. What is counted is the way through that loop without exceptions:
whole octets, moved in 16-byte accesses, all noise made, no NaN. Of the paths with the most 16-byte accesses, square
roots and wide products it is the shortest; a loop that calls or loops inside cannot be counted, and is an error.

--check fails where a count is more than 3% off the recorded one in either direction (fewer is a new record, or a loop
that is no longer what it was), the accesses, roots or products of the path have changed, any kernel uses a stack, which
is where registers are spilled to, or more registers than recorded, or a bf16 perturbation needs more than 45
instructions. Counts are those of one compiler: under another release than the record's only stacks are checked.
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
DTYPES = ("float32", "bfloat16", "float16")
MAX_BF16_PERTURB = 45.0
# Kernels by what is in their mangled names: a name, the pattern.
KERNELS = {  # every kernel's stack and registers are checked, these are counted too
    "perturb": r"visit_kernelINS_13SimpleProgramILi0ELi1ELNS_7PurposeE0E.*InlineTables",
    "perturb ±": r"visit_kernelINS_13SimpleProgramILi0ELi2ELNS_7PurposeE0E.*InlineTables",
    "update": r"visit_kernelINS_13SimpleProgramILi1ELi0ELNS_7PurposeE0E.*InlineTables",
    "visit": r"visit_kernelINS_13SimpleProgramILi1ELi2ELNS_7PurposeE0E.*InlineTables",
    "perturb, signs": r"visit_kernelINS_13SimpleProgramILi0ELi1ELNS_7PurposeE1E.*InlineTables",
    "visit, signs": r"visit_kernelINS_13SimpleProgramILi1ELi2ELNS_7PurposeE1E.*InlineTables",
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
        """Where a branch goes; None for anything else. On sm_80, leaving a loop is a call that never returns."""
        if self.operation.split(".")[0] != "BRA" and self.operation != "CALL.REL.NOINC":
            return None
        return int(re.findall(r"0x([0-9a-f]+)", self.text)[-1], 16)

    @property
    def always(self) -> bool:
        """Whether a branch has no condition."""
        return not self.text.startswith("@") and len(self.text.split()) == 2


def nvcc_release(build: Path) -> str:
    """The release of the compiler that a CMake build used; empty where `build` is none."""
    info = build / "build_info.json"
    return json.loads(info.read_text())["cuda_version"] if info.is_file() else ""


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
    """Registers and bytes of stack (spills and local arrays) of every kernel, by mangled name."""
    text = subprocess.run([tool, "-res-usage", "-arch", arch, str(library)], capture_output=True, text=True, check=True)
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text.stdout + text.stderr)
    return {
        short_name(name): {"registers": int(registers), "stack": int(stack) + int(local)}
        for name, registers, stack, local in rows
    }


def short_name(mangled: str) -> str:
    """A kernel's mangled name from its own part on: what comes before changes with the path of the file."""
    return re.sub(r"^.*?(?=(?:visit|generate|lookup|store_piece|decode)_kernel)", "", mangled)


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


def shortest(code: list[Instruction], first: int, last: int) -> dict[str, float]:
    """The path described above: instructions an element, and the (16-byte accesses, roots, products) that it passes."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    for instruction in code[first:last]:
        target = instruction.target
        if target is None and instruction.operation.startswith(("CALL", "BRX", "JMX", "RET")):
            raise SystemExit(f"error: a loop over octets calls, which is not counted: {instruction}")
        is_exit = instruction.operation == "CALL.REL.NOINC"
        if target is not None and (target < instruction.address or (is_exit and target > code[last].address + 16)):
            raise SystemExit(f"error: a loop over octets loops or calls inside, which is not counted: {instruction}")
    # At each position: what has been passed (16-byte accesses, square roots, wide products) -> fewest instructions.
    ways: dict[int, dict[tuple[int, int, int], int]] = {first: {(0, 0, 0): 0}}
    for at in range(first, last + 1):
        for (wide, roots, products), count in ways.pop(at, {}).items():
            instruction = code[at]
            operation, target = instruction.operation, instruction.target
            passed = (
                wide + (".128" in operation),
                roots + operation.startswith("MUFU.RSQ"),
                products + operation.startswith(("IMAD.WIDE.U32", "IMAD.HI.U32")),
            )
            following = []
            if at == last or target is None or not instruction.always:
                following.append(at + 1)
            if target is not None and at != last and position[target] <= last:
                following.append(position[target])
            if operation == "EXIT" and instruction.always:
                continue
            for to in following:
                best = ways.setdefault(to, {})
                best[passed] = min(best.get(passed, count + 1), count + 1)
    ends = ways[last + 1]
    most = max(ends)
    return {"instructions": ends[most] / OCTET, "passes": list(most)}


def count(library: Path, arch: str, tool: str) -> dict[str, dict]:
    """{"kernels": registers and stack of each, "loops": for each of KERNELS and dtype what `shortest` finds}."""
    code, used = functions(library, arch, tool), resources(library, arch, tool)
    if not code:
        raise SystemExit(f"error: {library} has no machine code for {arch}")
    table: dict[str, dict] = {}
    for kernel, pattern in KERNELS.items():
        names = [name for name in code if re.search(pattern, name)]
        if len(names) != 1:
            raise SystemExit(f"error: {library}, {arch}: expected one kernel like {pattern}, found {names}")
        body = code[names[0]]
        found = [(dtype_of(body[first:last]), shortest(body, first, last)) for first, last in loops(body)]
        if sorted(dtype for dtype, _ in found) != sorted(DTYPES):
            raise SystemExit(f"error: {library}, {arch}, {kernel}: expected a loop for each dtype, found {found}")
        table[kernel] = dict(found) | {"registers": used[short_name(names[0])]["registers"]}
    return {"kernels": used, "loops": table}


def failures(counts: dict, record: dict, same_compiler: bool) -> list[str]:
    """What is not as it should be, or not as it was."""
    wrong = []
    for arch, found in counts.items():
        known = record["counts"].get(arch, {"kernels": {}, "loops": {}})
        for name, used in found["kernels"].items():
            if used["stack"]:
                wrong.append(f"{arch}, {name}: {used['stack']} bytes of stack")
            if same_compiler and used["registers"] > known["kernels"].get(name, {"registers": 0})["registers"]:
                wrong.append(f"{arch}, {name}: {used['registers']} registers, on record {known['kernels'].get(name)}")
        for kernel, row in found["loops"].items():
            if row["bfloat16"]["instructions"] > MAX_BF16_PERTURB and kernel == "perturb":
                wrong.append(f"{arch}, {kernel}, bfloat16: more than {MAX_BF16_PERTURB} instructions an element")
            for dtype in DTYPES if same_compiler else ():
                now, then = row[dtype], known["loops"].get(kernel, {}).get(dtype)
                if then is None or now["passes"] != then["passes"]:
                    wrong.append(f"{arch}, {kernel}, {dtype}: the path is {now}, on record {then}")
                elif not 1 / TOLERANCE <= now["instructions"] / then["instructions"] <= TOLERANCE:
                    wrong.append(f"{arch}, {kernel}, {dtype}: {now['instructions']}, on record {then['instructions']}")
    return wrong


def main() -> int:
    """Parse the options, count, and print, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="what nvcc made for these architectures: an object or a library")
    parser.add_argument("--archs", help="comma-separated (default: those of the record that the library has)")
    parser.add_argument("--nvcc", help="release of the compiler (default: that of the build that the library lies in)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail where something is not as recorded")
    action.add_argument("--write", action="store_true", help="replace the record")
    options = parser.parse_args()
    tool = cuobjdump()
    listed = subprocess.run([tool, "-lelf", str(options.library)], capture_output=True, text=True).stdout
    present = sorted(set(re.findall(r"\.(sm_\d+)\.cubin", listed)), key=lambda arch: int(arch[3:]))
    archs = options.archs.split(",") if options.archs else present
    if not archs or not set(archs) <= set(present):
        raise SystemExit(f"error: {options.library} has machine code for {present}, asked for {archs}")
    release = options.nvcc or nvcc_release(options.library.parent)
    counts = {arch: count(options.library, arch, tool) for arch in archs}
    for arch, found in counts.items():
        for kernel, row in found["loops"].items():
            each = "  ".join(f"{dtype} {row[dtype]['instructions']:6.2f}" for dtype in DTYPES)
            print(f"{arch:7} {kernel:14} {each} instructions an element, {row['registers']} registers")
    if options.write:
        RECORD.write_text(json.dumps({"nvcc": release, "counts": counts}, indent=1) + "\n")
    wrong = []
    if options.check:
        record = json.loads(RECORD.read_text())
        same = record["nvcc"] == release
        if not same:
            print(f"nvcc is {release or 'unknown'}, the record's {record['nvcc']}: only stacks are compared")
        wrong = failures(counts, record, same)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
