"""What a compiled program moves, between chips and through memory, read from its text.

XLA's cost_analysis counts the body of a loop once; here every instruction counts as often as its loop runs.
The grammar of the text is XLA's HLO, of one device: `%name = type opcode(operands), attributes`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "token": 0}  # others end in their width: bf16, f8e4m3fn, s32
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
# They pass on what is there already, or hand it to instructions that are counted themselves.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    hbm: bool  # False: in a memory on the chip, S(n) of a TPU's layouts

    @functools.cached_property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    code: str
    arrays: tuple[Array, ...]  # the results
    operands: tuple[str, ...]
    rest: str  # attributes; of a parameter or a constant its number
    root: bool


@dataclasses.dataclass(frozen=True)
class Program:
    entry: str
    computations: dict[str, dict[str, Op]]

    def walk(self, inside: bool = False) -> Iterator[tuple[Op, dict[str, Op], int]]:
        """Every instruction with its computation and how often it runs; `inside`: also those of fusions."""
        yield from self._walk(self.entry, 1, inside)

    def _walk(self, name: str, times: int, inside: bool):
        body = self.computations[name]
        for op in body.values():
            yield op, body, times
            if op.code == "while":
                for called in _called(op):
                    yield from self._walk(called, times * (self.trips(op) or 1), inside)
            elif op.code in ("call", "conditional", "async-start") or (inside and op.code == "fusion"):
                for called in _called(op):
                    yield from self._walk(called, times, inside)

    def trips(self, loop: Op) -> int | None:
        """How often a loop runs: as XLA notes it, or the constant in its condition. None: unknown."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
        constants = [op for op in self.computations[condition].values() if op.code == "constant"]
        numbers = [int(op.rest) for op in constants if re.fullmatch(r"\d+", op.rest)]
        return numbers[0] if len(numbers) == 1 else None


def _called(op: Op) -> list[str]:
    return [name for group in _CALLS.findall(op.rest) for name in re.findall(r"[\w.\-]+", group)]


def parse(text: str) -> Program:
    """The computations of `compiled.as_text()`."""
    computations, entry, body = {}, "", None
    for line in text.splitlines():
        if body is None:
            if header := _HEADER.match(line):
                body = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            body = None
        elif named := _NAME.match(line):
            op = _op(named[2], line[named.end() :], bool(named[1]))
            body[op.name] = op
    return Program(entry, computations)


def _op(name: str, text: str, root: bool) -> Op:
    end = _close(text, 0) if text.startswith("(") else text.index(" ")
    open_ = text.index("(", end)
    close = _close(text, open_)
    code, between = text[end:open_].strip(), text[open_ + 1 : close - 1]
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), not re.search(r"S\([1-9]", layout))
        for dtype, dims, layout in _ARRAY.findall(text[:end])
    )
    if code in ("parameter", "constant"):
        return Op(name, code, arrays, (), between, root)
    return Op(name, code, arrays, tuple(re.findall(r"%([\w.\-]+)", between)), text[close:], root)


def _close(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    arrays: tuple[Array, ...]  # what each chip ends up with
    times: int  # a step
    group: int  # chips that take part
    where: str  # in the source program

    @property
    def bytes(self) -> int:
        """Of the arrays, each time."""
        return sum(a.bytes for a in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in a step, by a ring: each chip passes on (n - 1) / n of the whole."""
        ring = (self.group - 1) / self.group
        whole = {"all-reduce": 2 * ring, "reduce-scatter": self.group * ring, "collective-permute": 1}
        return self.times * self.bytes * whole.get(self.kind, ring)


def collectives(program: Program, chips: int) -> list[Collective]:
    found = []
    for op, _, times in program.walk(inside=True):
        kind = op.code.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        arrays = op.arrays
        if op.code != kind and kind in ("all-gather", "collective-permute"):  # (operands, results, contexts)
            n = len(op.operands)
            arrays = arrays[n : 2 * n]
        where = re.search(r'op_name="([^"]*)"', op.rest)
        found.append(Collective(kind, arrays, times, _group(op.rest, chips), where[1] if where else ""))
    return found


def _group(rest: str, chips: int) -> int:
    """Size of the replica groups, in any of the forms that XLA writes."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=(?:@?\w+)?mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return chips


def hbm_bytes(program: Program) -> int:
    """Bytes that a chip's memory reads and writes in a step, if nothing that leaves an instruction is cached.

    Of arrays that are only sliced, or updated in place, the slice counts.
    """
    total = 0
    for op, body, times in program.walk():
        if op.code in _FREE or op.code.endswith("-done"):
            continue
        fused = {}
        if op.code == "fusion":
            fused = program.computations[_called(op)[0]]
        inputs = [body[name].arrays for name in op.operands if name in body]
        total += times * (_read(op, inputs, fused) + _written(op, body, fused))
    return total


def _read(op: Op, inputs: list[tuple[Array, ...]], fused: dict[str, Op]) -> int:
    if op.code in _SLICES:
        return sum(a.bytes for a in op.arrays if inputs and inputs[0][0].hbm)
    if op.code == "dynamic-update-slice":
        return sum(a.bytes for a in inputs[1] if a.hbm)
    total = 0
    parameters = {int(p.rest): p for p in fused.values() if p.code == "parameter"}
    for i, arrays in enumerate(inputs):
        size = sum(a.bytes for a in arrays if a.hbm)
        if size and i in parameters:
            uses = [use for use in fused.values() if parameters[i].name in use.operands]
            parts = [_touched(use, parameters[i].name, fused) for use in uses]
            if all(part is not None for part in parts):
                size = min(size, sum(parts))
        total += size
    return total


def _touched(use: Op, name: str, fused: dict[str, Op]) -> int | None:
    """Bytes that an instruction reads of an array of which it needs a part only; None: all of it."""
    if use.code in _SLICES and use.operands[0] == name:
        return sum(a.bytes for a in use.arrays)
    if use.code == "dynamic-update-slice" and use.operands[0] == name:
        return 0
    return None


def _written(op: Op, body: dict[str, Op], fused: dict[str, Op]) -> int:
    arrays = op.arrays
    if op.code.endswith("-start"):  # the copy goes to the first of them; the others are the source and flags
        arrays = arrays[:1]
    if not any(a.hbm for a in arrays):
        return 0
    updates = [op] if op.code == "dynamic-update-slice" else []
    updates += [inner for inner in fused.values() if inner.code == "dynamic-update-slice" and inner.root]
    if updates:
        inside = fused or body
        return sum(a.bytes for a in inside[updates[0].operands[1]].arrays)
    return sum(a.bytes for a in arrays if a.hbm)
