"""Write the innermost loops in the compiler's own language, since its vectoriser reaches only half of their speed.

Vectors of `WIDTH` floats are as wide as the processor's. Every fused multiply-add is written out, and nothing else may
be fused or put in another order: so no bit depends on the width. Only the compiler imports this module.
"""

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from phasegate.model.kernels.compiled import target

FEATURES = target()[1].split(",")
WIDTH, ROWS = (16, 14) if "+avx512f" in FEATURES else (8, 6) if "+avx2" in FEATURES else (4, 6)
LANES = 16  # of sums whose order is fixed: the compiler makes of such a vector as many as the processor needs
FLOAT, INT, INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS = types.CPointer(types.float32)


def number(value: int) -> ir.Constant:
    """Return a whole number of the compiler."""
    return ir.Constant(INDEX, value)


def offset(builder: Any, row: int, stride: Any) -> Any:
    """Return where a row begins."""
    return builder.mul(number(row), stride)


class Row:
    """Load and store `width` floats at an address, all of them or the first `columns`."""

    def __init__(self, builder: Any, width: int, columns: Any = None) -> None:
        self.builder, self.type = builder, ir.VectorType(FLOAT, width)
        self.mask = None
        if columns is not None:
            lanes = ir.Constant(ir.VectorType(INDEX, width), list(range(width)))
            self.mask = builder.icmp_signed("<", lanes, self.spread(columns, INDEX))

    def spread(self, scalar: Any, kind: Any = FLOAT) -> Any:
        vector, zeros = ir.VectorType(kind, self.type.count), ir.VectorType(INT, self.type.count)
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(zeros, None))

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def load(self, address: Any) -> Any:
        address = self.builder.bitcast(address, self.type.as_pointer())
        if self.mask is None:
            return self.builder.load(address, align=4)
        blank = ir.Constant(self.type, None)
        name = f"llvm.masked.load.v{self.type.count}f32.p0"
        return self._call(name, self.type, address, ir.Constant(INT, 4), self.mask, blank)

    def store(self, value: Any, address: Any) -> None:
        address = self.builder.bitcast(address, self.type.as_pointer())
        if self.mask is None:
            self.builder.store(value, address, align=4)
        else:
            name = f"llvm.masked.store.v{self.type.count}f32.p0"
            self._call(name, ir.VoidType(), value, address, ir.Constant(INT, 4), self.mask)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self._call(f"llvm.fma.v{self.type.count}f32", self.type, x, y, z)


def tile(vectors: int, masked: bool) -> Any:
    """Make c[rows, columns] = start + a @ b over k terms in order, for `rows` up to `ROWS`, kept in registers.

    a[i, p] lies at a + i lda + p ka, b[p, j] at b + p ldb + j, c[i, j] at c + i ldc + j and start[i, j] at
    start + i lds + j. There are `vectors` times `WIDTH` columns, or up to `WIDTH` if it is `masked`.
    """

    def product(
        typing: Any, rows: Any, columns: Any, a: Any, lda: Any, ka: Any, b: Any, ldb: Any, c: Any, ldc: Any,
        start: Any, lds: Any, k: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, columns, *operands = arguments
            row, done = Row(builder, WIDTH, columns if masked else None), builder.append_basic_block("done")
            none = builder.append_basic_block("none")
            switch = builder.switch(rows, none)
            builder.position_at_end(none)
            builder.unreachable()
            for count in range(1, ROWS + 1):
                block = builder.append_basic_block(f"rows{count}")
                switch.add_case(number(count), block)
                builder.position_at_end(block)
                _chain(builder, row, count, vectors, *operands)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        index = types.int64
        kinds = (index, index, FLOATS, index, index, FLOATS, index, FLOATS, index, FLOATS, index, index)
        return types.void(*kinds), generate

    return intrinsic(product)


def _hidden(builder: Any, address: Any) -> Any:
    """Return an address of which the compiler knows nothing.

    Otherwise it reaches all rows by one chain of additions, which takes longer than the multiply-adds.
    """
    return builder.asm(ir.FunctionType(address.type, [address.type]), "", "=r,0", [address], side_effect=False)


def _chain(
    builder: Any, row: Row, rows: int, vectors: int, a: Any, lda: Any, ka: Any, b: Any, ldb: Any, c: Any, ldc: Any,
    start: Any, lds: Any, k: Any,
) -> None:  # fmt: skip
    def places(base: Any, stride: Any) -> list[list[Any]]:
        corners = [builder.gep(base, [offset(builder, r, stride)]) for r in range(rows)]
        return [[builder.gep(corner, [number(v * WIDTH)]) for v in range(vectors)] for corner in corners]

    before = builder.basic_block
    first = [[row.load(place) for place in line] for line in places(start, lds)]
    bases = [_hidden(builder, builder.gep(a, [offset(builder, r, lda)])) for r in range(0, rows, 4)]
    lines = [builder.gep(bases[r // 4], [offset(builder, r % 4, lda)]) for r in range(rows)]
    test, loop, after = (builder.append_basic_block(name) for name in ("test", "terms", "after"))
    builder.branch(test)
    builder.position_at_end(test)
    p = builder.phi(INDEX)
    sums = [[builder.phi(row.type) for _ in range(vectors)] for _ in range(rows)]
    builder.cbranch(builder.icmp_signed("<", p, k), loop, after)
    builder.position_at_end(loop)
    b_row, a_place = builder.gep(b, [builder.mul(p, ldb)]), builder.mul(p, ka)
    right = [row.load(builder.gep(b_row, [number(v * WIDTH)])) for v in range(vectors)]
    following = []
    for line, line_sums in zip(lines, sums, strict=True):
        left = row.spread(builder.load(builder.gep(line, [a_place])))
        following.append([row.fma(left, factor, part) for factor, part in zip(right, line_sums, strict=True)])
    p.add_incoming(number(0), before)
    p.add_incoming(builder.add(p, number(1)), loop)
    for phis, starts, values in zip(sums, first, following, strict=True):
        for phi, begin, value in zip(phis, starts, values, strict=True):
            phi.add_incoming(begin, before)
            phi.add_incoming(value, loop)
    builder.branch(test)
    builder.position_at_end(after)
    for line_places, values in zip(places(c, ldc), sums, strict=True):
        for place, value in zip(line_places, values, strict=True):
            row.store(value, place)


wide_tile, narrow_tile = tile(2, masked=False), tile(1, masked=True)


@intrinsic
def at(typing: Any, base: Any, place: Any) -> Any:
    """Return the address of an element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return base(base, types.int64), generate


@intrinsic
def fetch(typing: Any, base: Any, place: Any) -> Any:
    """Ask the caches for the line that an element lies on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.gep(arguments[0], [arguments[1]])
        kind = ir.FunctionType(ir.VoidType(), [address.type, INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, ir.Constant(INT, 0), ir.Constant(INT, 2), ir.Constant(INT, 1)])
        return context.get_dummy_value()

    return types.void(base, types.int64), generate


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """Compute x y + z, rounded once (float32 or float64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return x(x, x, x), generate


@intrinsic
def dot(typing: Any, x: Any, y: Any, n: Any) -> Any:
    """Return the inner product of n floats: `LANES` chains of fused multiply-adds, joined in halves."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, y, n = arguments
        before, test, loop, after = builder.basic_block, *(builder.append_basic_block() for _ in range(3))
        builder.branch(test)
        builder.position_at_end(test)
        p, total = builder.phi(INDEX), builder.phi(ir.VectorType(FLOAT, LANES))
        builder.cbranch(builder.icmp_signed("<", p, n), loop, after)
        builder.position_at_end(loop)
        row = Row(builder, LANES, builder.sub(n, p))
        added = row.fma(row.load(builder.gep(x, [p])), row.load(builder.gep(y, [p])), total)
        p.add_incoming(number(0), before)
        p.add_incoming(builder.add(p, number(LANES)), loop)
        total.add_incoming(ir.Constant(total.type, None), before)
        total.add_incoming(added, loop)
        builder.branch(test)
        builder.position_at_end(after)
        result, width = total, LANES
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(
                    result, ir.Constant(result.type, ir.Undefined),
                    ir.Constant(ir.VectorType(INT, width), list(range(begin, begin + width))),
                )
                for begin in (0, width)
            ]  # fmt: skip
            result = builder.fadd(*halves)
        return builder.extract_element(result, ir.Constant(INT, 0))

    return types.float32(FLOATS, FLOATS, types.int64), generate


@intrinsic
def transpose(typing: Any, source: Any, stride: Any, to: Any, step: Any) -> Any:
    """Copy 8 rows of 8 floats, `stride` apart, to columns: to[j, i] = source[i, j], rows of `to` being `step` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, to, step = arguments
        row = Row(builder, 8)
        rows = [row.load(builder.gep(source, [offset(builder, i, stride)])) for i in range(8)]
        for distance in (1, 2, 4):  # swap the blocks of this size that lie off the diagonal
            low = [j if not j & distance else 8 + j - distance for j in range(8)]
            high = [j + distance if not j & distance else 8 + j for j in range(8)]
            for i in (i for i in range(8) if not i & distance):
                pair = rows[i], rows[i + distance]
                for place, lanes in ((i, low), (i + distance, high)):
                    mask = ir.Constant(ir.VectorType(INT, 8), lanes)
                    rows[place] = builder.shuffle_vector(*pair, mask)
        for j, column in enumerate(rows):
            row.store(column, builder.gep(to, [offset(builder, j, step)]))
        return context.get_dummy_value()

    return types.void(FLOATS, types.int64, FLOATS, types.int64), generate


def reinterpret(source: Any, result: Any) -> Any:
    """Return an intrinsic that reads the bits of a number or an address as another type."""

    @intrinsic
    def read(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = context.get_value_type(result)
            convert = builder.inttoptr if isinstance(kind, ir.PointerType) else builder.bitcast
            return convert(arguments[0], kind)

        return result(source), generate

    return read


floats_at = reinterpret(types.int64, FLOATS)
bits_of, float_of = reinterpret(types.float32, types.int32), reinterpret(types.int32, types.float32)
