"""Executes a kernel: all threads of the grid at once, one lane of NumPy arrays each.

Every basic block is translated to a Python function once, when it is first reached. The lanes with the lowest program
counter go on, so that branches which part meet again, and lanes that come to a barrier have waited for the others of
their block. A block function works on the active lanes only: it gathers the registers that live across blocks and
scatters those that it changes. A register is None until it is written, and then full of poison where it was not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from . import arithmetic
from .arithmetic import COMPARE, TYPES
from .memory import EVERYBODY, GAP, POISON, READ, UNSIGNED, Memory, SharedMemory
from .parser import Block, Instruction, Kernel, PtxError, parse, parse_kernel

PARAM_BASE = 0x4000
CLASSES = {"pred": np.dtype(bool), "b16": np.dtype("u2"), "b32": np.dtype("u4"), "b64": np.dtype("u8")}
SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
SPACES = ("param", "global", "shared")
ROUNDING = ("rn", "rz", "rm", "rp")
WARP = 32
MAX_STEPS = 200_000  # basic blocks of a run


class Lanes:
    """The active lanes during a basic block, and what the block's function reaches."""

    def __init__(self, grid: tuple[int, int, int], block: tuple[int, int, int], memory: Memory, params: Memory) -> None:
        self.block_size = int(np.prod(block))
        self.num = int(np.prod(grid)) * self.block_size
        self.memory, self.params = memory, params
        self.shared = SharedMemory(0, 0)
        self.registers: dict[str, np.ndarray] = {}
        self.rsqrt_ulps = 0
        thread, number = np.arange(self.num) % self.block_size, np.arange(self.num) // self.block_size
        self.block_of = number
        self.special = {"%laneid": thread % WARP}
        for i, axis in enumerate("xyz"):
            self.special[f"%tid.{axis}"] = thread // int(np.prod(block[:i])) % block[i]
            self.special[f"%ctaid.{axis}"] = number // int(np.prod(grid[:i])) % grid[i]
            self.special[f"%ntid.{axis}"] = np.array([block[i]])
            self.special[f"%nctaid.{axis}"] = np.array([grid[i]])
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.active = np.arange(self.num)

    def _pick(self, full: np.ndarray) -> np.ndarray:
        return full if full.size == 1 or self.active.size == self.num else full[self.active]

    def read(self, name: str, kind: np.dtype) -> np.ndarray:
        full = self.registers.get(name)
        if full is None:
            full = np.full(kind.itemsize, POISON, np.uint8).view(kind)
        return self._pick(full)

    def write(self, name: str, value: np.ndarray) -> None:
        if self.active.size == self.num:
            self.registers[name] = value
            return
        old = self.registers.get(name)
        full = np.full(value.itemsize, POISON, np.uint8).view(value.dtype) if old is None else old
        full = np.broadcast_to(full, self.num).copy()  # another register may be the same array
        full[self.active] = value
        self.registers[name] = full

    def sreg(self, name: str) -> np.ndarray:
        return self._pick(self.special[name])

    def _access(
        self, space: str, address: np.ndarray, guard: np.ndarray | None
    ) -> tuple[Memory, np.ndarray, np.ndarray]:
        """The memory, where it is accessed, and by which active lanes, as positions among them."""
        num = self.active.size
        lanes = np.arange(num) if guard is None else np.flatnonzero(np.broadcast_to(guard, num))
        address = np.broadcast_to(address, num)[lanes]
        if space == "shared":
            return self.shared.memory, self.shared.addresses(address, self.block_of[self.active[lanes]]), lanes
        return (self.params if space == "param" else self.memory), address, lanes

    def load(
        self, space: str, address: np.ndarray, kind: np.dtype, guard: np.ndarray | None, old: list[np.ndarray]
    ) -> list[np.ndarray]:
        """As many neighbours as there are `old` values, which stay where the guard is false."""
        if guard is None and address.size == 1 < self.active.size and space != "shared":
            memory = self.params if space == "param" else self.memory
            return memory.load(address, EVERYBODY, kind.itemsize, len(old))
        memory, address, lanes = self._access(space, address, guard)
        values = memory.load(address, self.active[lanes], kind.itemsize, len(old))
        if guard is None:
            return values
        merged = [np.broadcast_to(each, self.active.size).copy() for each in old]
        for each, value in zip(merged, values, strict=True):
            each[lanes] = value
        return merged

    def store(self, space: str, address: np.ndarray, values: list[np.ndarray], guard: np.ndarray | None) -> None:
        memory, address, lanes = self._access(space, address, guard)
        values = [np.broadcast_to(value, self.active.size)[lanes] for value in values]
        memory.store(address, self.active[lanes], values[0].itemsize, values)

    def barrier(self) -> None:
        met = np.bincount(self.block_of[self.active], minlength=self.num // self.block_size)
        if ((met != 0) & (met != self.block_size)).any():
            raise PtxError(f"a barrier meets {sorted(set(met) - {0})} of {self.block_size} threads of a block")
        self.shared.barrier(np.flatnonzero(met))

    def shuffle(self, value: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """shfl.sync.idx of whole warps: each lane gets the value of lane `source` of its warp."""
        met = np.bincount(self.active // WARP, minlength=self.num // WARP)
        if ((met != 0) & (met != WARP)).any() or (mask != 0xFFFFFFFF).any():
            raise PtxError(f"a shuffle meets {sorted(set(met) - {0})} of {WARP} lanes of a warp")
        full = np.zeros(self.num, value.dtype)
        full[self.active] = value
        return full[self.active // WARP * WARP + (source & np.uint32(WARP - 1))]


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
        if SPECIAL.fullmatch(operand):
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
        bits = UNSIGNED.get(kind.itemsize, kind) if kind != bool else kind
        bits = np.dtype(bits)

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
            case ("shfl", "sync", "idx", "b32") if inputs[2] == "31":
                a, source, _, mask = values()
                return f"x.shuffle({a}, {source}, {mask})", kind
            case ("cvt", "rn", "f16x2" | "bf16x2" as to, "f32"):
                high, low = (f"to_{'half' if to == 'f16x2' else 'bfloat'}({each})" for each in values())
                return f"{high} << U32(16) | {low}", bits
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
        if any(self.kind_of(each).itemsize < kind.itemsize for each in registers) or last[0] == "s":
            raise PtxError(f"{registers} cannot take {kind}")
        names = [self.local(each) for each in registers]
        old = ", ".join(names if guard else ["None"] * count)
        self.lines.append(f"{', '.join(names)}, = x.load({where}, np.dtype('{kind.name}'), {guard or None}, [{old}])")
        wider = [each for each in registers if self.kind_of(each) != kind]
        self.lines += [f"{self.local(each)} = {self.local(each)}.astype('{self.kind_of(each)}')" for each in wider]
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

    def function(self, block: Block) -> tuple[Callable[[Lanes], np.ndarray | None], list[str]]:
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


class Program:
    """A kernel made ready to run."""

    def __init__(self, name: str, text: str) -> None:
        self.kernel = parse_kernel(name, text)
        self.params = Memory(PARAM_BASE, sum(size + 2 * GAP for size, _ in self.kernel.params.values()))
        self.addresses = {each: self.params.place(size, READ) for each, (size, _) in self.kernel.params.items()}
        self.translator = Translator(self.kernel, self.addresses)
        self.functions: dict[int, tuple[Callable[[Lanes], np.ndarray | None], list[str]]] = {}
        self.executed = np.zeros(len(self.kernel.blocks), np.int64)  # lanes that came to each basic block
        self.lengths = np.array([len(block.instructions) for block in self.kernel.blocks])

    def run(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: list[bytes],
        memory: Memory,
        num_shared: int = 0,
        rsqrt_ulps: int = 0,
    ) -> int:
        """Runs a grid to its end. Returns the number of instructions of all of its threads.

        Raises:
            PtxError: what the kernel does is not allowed, or an instruction is unknown; the text quotes it.
        """
        if int(np.prod(block)) > self.kernel.max_threads:
            raise PtxError(f"{self.kernel.name}: {block} threads, and {self.kernel.max_threads} are the most")
        for (size, _), address, argument in zip(
            self.kernel.params.values(), self.addresses.values(), arguments, strict=True
        ):
            self.params.read(address, size)[:] = np.frombuffer(argument, np.uint8, size)
        lanes = Lanes(grid, block, memory, self.params)
        lanes.shared, lanes.rsqrt_ulps = SharedMemory(num_shared, int(np.prod(grid))), rsqrt_ulps
        memory.order()
        end = len(self.kernel.blocks)
        counter = np.zeros(lanes.num, np.int64)
        passed = np.zeros(end, np.int64)
        with np.errstate(all="ignore"):
            for _ in range(MAX_STEPS):
                at = int(counter.min())
                if at == end:
                    self.executed += passed
                    return int(passed @ self.lengths)
                lanes.active = np.flatnonzero(counter == at)
                passed[at] += lanes.active.size
                counter[lanes.active] = self._step(at, lanes)
        raise PtxError(f"{self.kernel.name} does not end")

    def _step(self, at: int, lanes: Lanes) -> np.ndarray | int:
        """Runs one basic block. Returns where its lanes go."""
        block, end = self.kernel.blocks[at], len(self.kernel.blocks)
        if at not in self.functions:
            self.functions[at] = self.translator.function(block)
        function, sources = self.functions[at]
        try:
            taken = function(lanes)
        except PtxError as error:
            frame = error.__traceback__.tb_next
            raise PtxError(f"{self.kernel.name}: {sources[frame.tb_lineno - 1]!r}: {error}") from error
        last = block.instructions[-1].name[0]
        if last not in ("bra", "ret"):
            return at + 1
        target = end if last == "ret" else block.target
        return target if taken is None else np.where(taken, target, at + 1)


@functools.cache
def program(name: str, text: str) -> Program:
    """The program of one kernel's text, which is decoded once."""
    return Program(name, text)


class Module:
    """The kernels of a PTX text."""

    def __init__(self, text: str) -> None:
        self.texts = parse(text)

    def __getitem__(self, name: str) -> Program:
        return program(name, self.texts[name])
