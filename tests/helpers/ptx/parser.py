"""The text of PTX as kernels, basic blocks and instructions. What is not understood is a PtxError that quotes it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}  # bytes, by the number in a type's name


class PtxError(Exception):
    """The text, or what it does, is not what it may be."""


@dataclass(frozen=True)
class Instruction:
    text: str
    guard: str  # the predicate's name, or ""
    negated: bool  # it runs where the guard is false
    name: tuple[str, ...]  # the parts of the operation: fma.rn.f32 is (fma, rn, f32)
    operands: tuple[str, ...]


@dataclass
class Block:
    """Instructions that run in one go; `target` is the block that its last one, a branch, goes to."""

    instructions: list[Instruction] = field(default_factory=list)
    target: int | None = None


@dataclass(frozen=True)
class Kernel:
    name: str
    params: dict[str, tuple[int, int]]  # name: (bytes, alignment)
    registers: dict[str, str]  # name, or prefix of numbered ones: pred, b16, b32 or b64
    blocks: list[Block]
    max_threads: int  # of a block of the grid


def parse(text: str) -> dict[str, str]:
    """The text of each kernel of a module, by name."""
    parts = re.split(r"^(?:\.visible )?\.entry (\S+?)\(", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at the commas outside of brackets and braces."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text)) if text.strip() else ()


def parse_instruction(line: str) -> Instruction:
    """One instruction, without its semicolon."""
    found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line)
    if not found:
        raise PtxError(f"not an instruction: {line!r}")
    negated, guard, name, operands = found.groups()
    return Instruction(line, guard or "", negated == "!", tuple(name.split(".")), split_operands(operands))


def parse_params(text: str) -> dict[str, tuple[int, int]]:
    """Size and alignment of each parameter, in order."""
    params = {}
    for line in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"\.param (?:\.align (\d+) )?\.[usbf](\d+) (?:\.ptr (?:\S+ )*)?(\w+)(?:\[(\d+)\])?", line)
        if not found:
            raise PtxError(f"not a parameter: {line!r}")
        align, width, name, count = found.groups()
        size = WIDTHS[width] * int(count or 1)
        params[name] = (size, int(align or WIDTHS[width]))
    return params


def parse_registers(line: str) -> dict[str, str]:
    """A prefix or a name, and its class: `.reg .b32 %r<17>` or `.reg .pred p`. A register is bits of any type."""
    found = re.fullmatch(r"\.reg \.(pred|[bfus](?:16|32|64))\s+(%?\w+)(?:<\d+>)?", line)
    if not found:
        raise PtxError(f"not a declaration of registers: {line!r}")
    kind, name = found.groups()
    return {name: kind if kind == "pred" else f"b{kind[1:]}"}


def parse_kernel(name: str, text: str) -> Kernel:
    """One entry of `parse`."""
    head, body = text.split("\n{", 1)
    params, directives = head.split(")", 1)
    threads = re.search(r"\.(?:maxntid|reqntid) (\d+)", directives)
    registers: dict[str, str] = {}
    blocks, labels = [Block()], {}
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        if line == "}" and raw == "}":
            break  # the kernel's end: debugging information follows
        if line in ("", "{", "}") or line.startswith((".loc", ".pragma")):
            continue
        if line.endswith(":"):
            labels[line[:-1]] = len(blocks) - (not blocks[-1].instructions)
            if blocks[-1].instructions:
                blocks.append(Block())
            continue
        if line[-1] != ";" or line.count(";") != 1:
            raise PtxError(f"{name}: not one statement: {line!r}")
        line = line[:-1].rstrip()
        if line.startswith("."):
            for prefix, kind in parse_registers(line).items():
                if registers.setdefault(prefix, kind) != kind:
                    raise PtxError(f"{name}: registers {prefix} of two classes")
            continue
        instruction = parse_instruction(line)
        blocks[-1].instructions.append(instruction)
        if instruction.name[0] in ("bra", "ret", "exit"):
            blocks.append(Block())
    if not blocks[-1].instructions:
        blocks.pop()
    for block in blocks:
        last = block.instructions[-1]
        if last.name[0] == "bra":
            if labels.get(last.operands[0], len(blocks)) >= len(blocks):
                raise PtxError(f"{name}: no such label: {last.text!r}")
            block.target = labels[last.operands[0]]
    return Kernel(name, parse_params(params), registers, blocks, int(threads.group(1)) if threads else 1024)
