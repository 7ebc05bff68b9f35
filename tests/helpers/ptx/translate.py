"""Python functions of basic blocks: NumPy expressions for instructions, the form of each known or refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import arithmetic
from .arithmetic import COMPARE, TYPES
from .memory import UNSIGNED
from .parser import Block, Instruction, Kernel, PtxError

CLASSES = {"pred": np.dtype(bool), "b16": np.dtype("u2"), "b32": np.dtype("u4"), "b64": np.dtype("u8")}
SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
SPACES = ("param", "global", "shared")
ROUNDING = ("rn", "rz", "rm", "rp")
# A block's function, of the `machine.Lanes` that it runs on; and the instruction that each of its lines is of.
Function = tuple[Callable[..., np.ndarray | None], list[str]]


class Translator:
    """Writes the Python function of a basic block."""

    def __init__(self, kernel: Kernel, param_addresses: dict[str, int]) -> None:
        self.kernel, self.params = kernel, param_addresses
        self.constants: dict[str, object] = {name: getattr(arithmetic, name) for name in dir(arithmetic)}
        self.constants |= {"np": np, "COMPARE": COMPARE}
        uses = [self._upward_exposed(block) for block in kernel.blocks]
        self.live = set().union(*uses)  # registers that carry a value from one block to another
        self.defined: list[str] = []
        self.lines: list[str] = []

    # What an instruction reads and writes.

    def kind_of(self, register: str) -> np.dtype:
        prefix = register.rstrip("0123456789")
        kind = self.kernel.registers.get(register) or self.kernel.registers.get(prefix)
        if kind is None:
            raise PtxError(f"no such register: {register}")
        return CLASSES[kind]

    def is_register(self, operand: str) -> bool:
        return operand in self.kernel.registers or (
            operand.startswith("%") and operand.rstrip("0123456789") in self.kernel.registers
        )

    def _registers(self, operand: str) -> list[str]:
        return [name for name in re.findall(r"%?[A-Za-z_$][\w$]*", operand) if self.is_register(name)]

    def _outputs(self, one: Instruction) -> list[str]:
        if one.name[0] in ("st", "bra", "bar", "ret", "exit"):
            return []
        return self._registers(one.operands[0])

    def _upward_exposed(self, block: Block) -> set[str]:
        """Registers that a block reads before it writes them."""
        written: set[str] = set()
        exposed: set[str] = set()
        for one in block.instructions:
            outputs = self._outputs(one)
            inputs = [name for operand in one.operands[bool(outputs) :] for name in self._registers(operand)]
            if one.guard:
                inputs += [one.guard, *outputs]
            exposed |= set(inputs) - written
            written |= set(outputs)
        return exposed

    # Operands as Python expressions.

    def constant(self, value: np.ndarray) -> str:
        name = f"k{value.dtype.name}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def local(self, register: str) -> str:
        return "v_" + register.lstrip("%").replace("$", "_")

    def value(self, operand: str, kind: np.dtype) -> str:
        """An operand read as a type of its width."""
        if SPECIAL.fullmatch(operand) and kind.itemsize == 4:
            return f"x.sreg({operand!r})"
        if self.is_register(operand):
            own = self.kind_of(operand)
            if own.itemsize != kind.itemsize:
                raise PtxError(f"{operand} has {own.itemsize} bytes, and {kind} was expected")
            return self.local(operand) if own == kind else f"{self.local(operand)}.view(np.{kind.name})"
        if operand in self.params:
            return self.constant(np.array([self.params[operand]], kind))
        if operand == "global_smem":
            return self.constant(np.array([0], kind))
        number = re.fullmatch(r"0f([0-9A-Fa-f]{8})|0d([0-9A-Fa-f]{16})|(-?(?:0x[0-9A-Fa-f]+|\d+))U?", operand)
        if not number:
            raise PtxError(f"not an operand: {operand!r}")
        if kind == TYPES["pred"]:
            return self.constant(np.array([int(operand, 0) != 0]))
        single, double, integer = number.groups()
        bits = int(integer, 0) if integer else int(single or double, 16)
        if (kind.kind == "f") == bool(integer) and not (single and kind.kind == "u"):
            raise PtxError(f"{operand!r} is no {kind}")
        unsigned = np.array([bits % 2 ** (8 * kind.itemsize)], UNSIGNED[kind.itemsize])
        return self.constant(unsigned.view(kind))

    def low_bits(self, operand: str, kind: np.dtype) -> str:
        """An operand of this type, or one of more bits, as st and cvt allow."""
        if self.is_register(operand) and self.kind_of(operand).itemsize > kind.itemsize:
            return f"{self.local(operand)}.astype(np.{np.dtype(UNSIGNED[kind.itemsize]).name}).view(np.{kind.name})"
        return self.value(operand, kind)

    def address(self, operand: str) -> str:
        """`[base]` or `[base+offset]`, as 64 bits."""
        found = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise PtxError(f"not an address: {operand!r}")
        base, offset = found.groups()
        kind = self.kind_of(base) if self.is_register(base) else CLASSES["b64"]
        total = self.value(base, kind)
        if int(offset or 0):
            total = f"({total} + {self.value(offset, kind)})"
        return total if kind.itemsize == 8 else f"{total}.astype(U64)"

    # Instructions.

    def expression(self, one: Instruction) -> tuple[str, np.dtype]:
        """The value that an instruction gives its first operand, and its type."""
        inputs = one.operands[1:]
        kind = TYPES.get(one.name[-1], TYPES["b32"])
        bits = kind if kind.kind == "b" else np.dtype(UNSIGNED[kind.itemsize])

        def values(each: np.dtype = kind) -> list[str]:
            return [self.value(operand, each) for operand in inputs]

        match one.name:
            case ("mov", _) | ("cvta", "to", "global", "u64"):
                return values(bits)[0], bits
            case ("add" | "sub" as name, _) if kind.kind in "iu":
                a, b = values(bits)
                return f"{a} {'+' if name == 'add' else '-'} {b}", bits
            case ("mul", "lo", _) if kind.kind in "iu":
                return " * ".join(values(bits)), bits
            case ("mad", "lo", _) if kind.kind in "iu":
                a, b, c = values(bits)
                return f"{a} * {b} + {c}", bits
            case ("mul" | "mad" as name, "wide", "u16" | "s16" | "u32" | "s32"):
                wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
                a, b = (f"{self.value(each, kind)}.astype(np.{wide.name})" for each in inputs[:2])
                return f"{a} * {b}" + (f" + {self.value(inputs[2], wide)}" if name == "mad" else ""), wide
            case ("mul", "hi", "u32"):
                a, b = (f"{each}.astype(U64)" for each in values())
                return f"({a} * {b} >> U64(32)).astype(U32)", kind
            case ("and" | "or" | "xor" as name, _) if kind.kind in "ub":
                return {"and": " & ", "or": " | ", "xor": " ^ "}[name].join(values()), kind
            case ("not", _) if kind.kind in "ub":
                return f"~{values()[0]}", kind
            case ("shl" | "shr" as name, _) if kind.kind in "iu":
                a, by = self.value(inputs[0], kind), inputs[1]
                if by.isdecimal() and int(by) < 8 * kind.itemsize:
                    return f"{a} {'<<' if name == 'shl' else '>>'} {self.value(by, kind)}", kind
                return f"{name}({a}, {self.value(by, TYPES['u32'])})", kind
            case ("min" | "max" as name, _) if kind.kind in "iu":
                return f"np.{name}imum({', '.join(values())})", kind
            case ("min" | "max" as name, "f32"):
                return f"canonical(np.f{name}({', '.join(values())}))", bits
            case ("neg", "f32"):
                return f"{values(bits)[0]} ^ U32(0x80000000)", bits
            case ("abs", "f32"):
                return f"{values(bits)[0]} & U32(0x7FFFFFFF)", bits
            case ("fma" | "add" | "mul" | "sqrt" as name, mode, "f32") if mode in ROUNDING:
                return f"{name}({', '.join(values())}, {mode!r})", bits
            case ("sub", mode, "f32") if mode in ROUNDING:
                a, b = values()
                return f"add({a}, -{b}, {mode!r})", bits
            case ("div", "rn", "f32"):
                return f"canonical({' / '.join(values())})", bits
            case ("div" | "rem" as name, "u32" | "s32" | "u64" | "s64"):
                return f"{'quotient' if name == 'div' else 'remainder'}({', '.join(values())})", kind
            case ("rsqrt", "approx", "ftz", "f32"):
                return f"rsqrt({values()[0]}, x.rsqrt_ulps)", bits
            case ("selp", _):
                a, b = (self.value(each, bits) for each in inputs[:2])
                return f"np.where({self.value(inputs[2], TYPES['pred'])}, {a}, {b})", bits
            case ("setp", compare, *combine, _) if compare in COMPARE and combine in ([], ["and"], ["or"]):
                a, b = (self.value(each, kind) for each in inputs[:2])
                text = f"COMPARE[{compare!r}]({a}, {b})"
                if combine:
                    text += f" {'&' if combine == ['and'] else '|'} {self.value(inputs[2], TYPES['pred'])}"
                return text, TYPES["pred"]
            case ("prmt", "b32"):
                return f"prmt({', '.join(values())})", kind
            case ("bfe", "u32" | "s32"):
                a, *place = (self.value(each, kind if i == 0 else TYPES["u32"]) for i, each in enumerate(inputs))
                return f"bfe({a}, {', '.join(place)})", bits
            case ("bfe", "u64" | "s64"):
                a, *place = (self.value(each, kind if i == 0 else TYPES["u32"]) for i, each in enumerate(inputs))
                return f"bfe64({a}, {', '.join(place)})", bits
            case ("bfi", "b32" | "b64"):
                operands = [self.value(each, kind if i < 2 else TYPES["u32"]) for i, each in enumerate(inputs)]
                return f"bfi({', '.join(operands)})", kind
            case ("shfl", "sync", "idx", "b32") if inputs[2] == "31":
                a, source, _, mask = values()
                return f"x.shuffle({a}, {source}, {mask})", kind
            case ("cvt", "rn", "f16x2" | "bf16x2" as to, "f32"):
                high, low = (f"to_{'half' if to == 'f16x2' else 'bfloat'}({each})" for each in values())
                return f"{high} << U32(16) | {low}", bits
            case ("cvt", "rmi" | "rzi" as mode, "f32", "f32"):
                return f"canonical(np.{'floor' if mode == 'rmi' else 'trunc'}({values()[0]}))", bits
            case ("cvt", "f32", "f16"):
                return f"canonical({values()[0]}.astype(F32))", TYPES["u32"]
            case ("cvt", mode, "f32", _) if mode in ROUNDING and kind.kind in "iu":
                a = values()[0]
                text = f"{a}.astype(F32)" if mode == "rn" else f"rounded({a}.astype(F64), {mode!r})"
                return text, TYPES["f32"]
            case ("cvt", "rzi", "u32" | "s32" as to, "f32"):
                return f"to_int({values()[0]}, np.dtype({TYPES[to].name!r}))", TYPES[to]
            case ("cvt", to, _) if TYPES[to].kind in "iu" and kind.kind in "iu":
                return f"{self.low_bits(inputs[0], kind)}.astype(np.{TYPES[to].name})", TYPES[to]
        raise PtxError("unknown form of instruction")

    def assign(self, register: str, text: str, kind: np.dtype, guard: str) -> None:
        own = self.kind_of(register)
        if own.itemsize != kind.itemsize:
            raise PtxError(f"{register} has {own.itemsize} bytes, and the value {kind.itemsize}")
        text = text if own == kind else f"({text}).view(np.{own.name})"
        name = self.local(register)
        self.lines.append(f"{name} = np.where({guard}, {text}, {name})" if guard else f"{name} = {text}")
        self.written.add(register)

    def vector(self, operand: str) -> list[str]:
        return [each.strip() for each in operand.strip("{} ").split(",")]

    def access(self, one: Instruction, guard: str) -> None:
        """ld and st of one value or of a vector."""
        name, *space, last = one.name
        count = int(space.pop()[1]) if space and space[-1] in ("v2", "v4") else 1
        place, data = one.operands if name == "st" else one.operands[::-1]
        registers = self.vector(data)
        if (space and (len(space) > 1 or space[0] not in SPACES)) or len(registers) != count or last not in TYPES:
            raise PtxError("unknown form of instruction")
        where = f"{(space or ['global'])[0]!r}, {self.address(place)}"
        kind = np.dtype(UNSIGNED[TYPES[last].itemsize])
        if name == "st":
            values = ", ".join(self.low_bits(each, kind) for each in registers)
            self.lines.append(f"x.store({where}, [{values}], {guard or None})")
            return
        if any(self.kind_of(each).itemsize < kind.itemsize for each in registers):
            raise PtxError(f"{registers} cannot take {kind}")
        names = [self.local(each) for each in registers]
        old = ", ".join(names if guard else ["None"] * count)
        self.lines.append(f"{', '.join(names)}, = x.load({where}, np.dtype('{kind.name}'), {guard or None}, [{old}])")
        wider = [each for each in registers if self.kind_of(each) != kind]
        extended = f".view('{kind.name[1:]}')" if last[0] == "s" else ""
        self.lines += [
            f"{self.local(each)} = {self.local(each)}{extended}.astype('{self.kind_of(each)}')" for each in wider
        ]
        self.written |= set(registers)

    def statement(self, one: Instruction, guard: str) -> None:
        match one.name:
            case ("ld" | "st", *_):
                self.access(one, guard)
            case ("bar", "sync") if one.operands == ("0",) and not guard:
                self.lines.append("x.barrier()")
            case ("mov", "b32" | "b64") if "{" in one.operands[1]:
                parts = self.vector(one.operands[1])
                kind = TYPES[one.name[1]]
                each = np.dtype(UNSIGNED[kind.itemsize // len(parts)])
                words = [f"{self.value(part, each)}.astype(np.{kind.name})" for part in parts]
                shifts = [f"{word} << np.{kind.name}({8 * each.itemsize * i})" for i, word in enumerate(words)]
                self.assign(one.operands[0], " | ".join(shifts), kind, guard)
            case ("mov", "b32" | "b64") if "{" in one.operands[0]:
                parts, kind = self.vector(one.operands[0]), TYPES[one.name[1]]
                each = np.dtype(UNSIGNED[kind.itemsize // len(parts)])
                whole = self.value(one.operands[1], kind)
                self.lines.append(f"whole = {whole}")
                for i, part in enumerate(parts):
                    if part != "_":
                        shifted = f"(whole >> np.{kind.name}({8 * each.itemsize * i})).astype(np.{each.name})"
                        self.assign(part, shifted, each, guard)
            case _:
                self.assign(one.operands[0], *self.expression(one), guard)

    def function(self, block: Block) -> Function:
        """Runs a block on its active lanes, and returns where its branch is taken (None: everywhere). And the source of
        each of its lines."""
        exposed = sorted(self._upward_exposed(block))
        self.written: set[str] = set()
        self.lines = [f"{self.local(name)} = x.read({name!r}, np.dtype('{self.kind_of(name)}'))" for name in exposed]
        sources = [""] * (1 + len(exposed))
        result = None
        for one in block.instructions:
            guard = ""
            if one.guard:
                guard = ("~" if one.negated else "") + self.local(one.guard)
            try:
                match one.name:
                    case ("bra",) | ("bra", "uni") | ("ret",):
                        result = guard or None
                    case _:
                        self.statement(one, guard)
            except (PtxError, KeyError, ValueError, IndexError) as error:
                raise PtxError(f"{self.kernel.name}: {one.text!r}: {error}") from error
            sources += [one.text] * (len(self.lines) + 1 - len(sources))
        self.lines += [f"x.write({name!r}, {self.local(name)})" for name in sorted(self.written & self.live)]
        text = "\n    ".join(["def run(x):", *self.lines, f"return {result}"])
        exec(compile(text, "<ptx>", "exec"), self.constants)
        return self.constants["run"], sources  # type: ignore[return-value]
