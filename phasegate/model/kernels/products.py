"""Define the compiled product of matrices, and how kernels are registered. Only the compiler imports this module.

Arguments are addresses and numbers; strides count elements. There is no fastmath, so that sums keep their order.
"""

from typing import Any

import numba
from numba import types

from phasegate.model.kernels.tile import FLOATS, ROWS, WIDTH, at, fetch, narrow_tile, transpose, wide_tile

OPTIONS: dict[str, Any] = {"nopython": True, "error_model": "numpy"}
INTS, INT, DOUBLE = types.CPointer(types.int64), types.int64, types.float64
inner = numba.jit(**OPTIONS)
DEEP, TALL = 384, 384  # rows of b and of a that a pass holds in the caches
SPAN = 2 * WIDTH
LINE = 16  # floats
ENTRIES: dict[str, tuple[Any, Any]] = {}


def entry(*kinds: Any) -> Any:
    """Register a kernel of these arguments."""

    def register(function: Any) -> Any:
        ENTRIES[function.__name__] = numba.jit(**OPTIONS)(function), types.void(*kinds)
        return ENTRIES[function.__name__][0]

    return register


@inner
def pack(b, ldb, kb, panel, k, columns):
    """Copy b (k, columns), of which one stride is 1, to rows of `SPAN` floats."""
    if kb == 1:
        for p in range(k):
            source, to = at(b, p * ldb), at(panel, p * SPAN)
            for j in range(columns):
                to[j] = source[j]
    else:
        for j in range(0, columns - 7, 8):
            for p in range(0, k - 7, 8):
                transpose(at(b, j * kb + p), kb, at(panel, p * SPAN + j), SPAN)
        for j in range(columns):
            for p in range(k & ~7 if j < columns & ~7 else 0, k):
                panel[p * SPAN + j] = b[j * kb + p]


@inner
def pack_left(a, ka, block, height, tiles, k):
    """Copy a (height, k), whose columns are contiguous, so that what a step of a tile needs lies together."""
    for t in range(tiles):
        top = height * t // tiles
        rows, to = height * (t + 1) // tiles - top, at(block, top * k)
        for p in range(k):
            source = at(a, top + p * ka)
            for r in range(rows):
                to[p * rows + r] = source[r]


@numba.jit(types.void(INT, INT, FLOATS, INT, INT, FLOATS, INT, FLOATS, INT, FLOATS, INT, INT), **OPTIONS)
def run_tile(rows, columns, a, lda, ka, b, ldb, c, ldc, start, lds, k):
    """Compute up to ROWS x SPAN elements of a product; compiled once for all products."""
    if columns == SPAN:
        wide_tile(rows, columns, a, lda, ka, b, ldb, c, ldc, start, lds, k)
    else:
        narrow_tile(rows, columns, a, lda, ka, b, ldb, c, ldc, start, lds, k)
        if columns > WIDTH:
            b, c, start = at(b, WIDTH), at(c, WIDTH), at(start, WIDTH)
            narrow_tile(rows, columns - WIDTH, a, lda, ka, b, ldb, c, ldc, start, lds, k)


@inner
def matmul(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel):
    """Compute a product; see `matmul_ahead`."""
    matmul_ahead(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel, panel, 0)


@inner
def matmul_ahead(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel, ahead, lines):
    """Compute c (m, n) = start + a (m, k) @ b (k, n), each element a chain of fused multiply-adds in the order of k.

    One stride of b is 1. `panel` holds DEEP * (SPAN + TALL) floats. Meanwhile the caches are asked for so many lines
    that are needed next, a few with each tile: they can look for few at a time.
    """
    asked = 0
    for p0 in range(0, max(k, 1), DEEP):
        depth = min(DEEP, k - p0)
        if p0:
            start, lds = c, ldc
        for i0 in range(0, m, TALL):
            height = min(TALL, m - i0)
            tiles = (height + ROWS - 1) // ROWS
            packs = kb != 1 or (ldb > SPAN and height >= 64)
            share = lines // (tiles * (1 + (n - 1) // SPAN)) + 1 if lines else 0
            turns = lda == 1 and height * depth * ka > 1 << 20
            if turns:
                pack_left(at(a, i0 * lda + p0 * ka), ka, at(panel, DEEP * SPAN), height, tiles, depth)
            for j0 in range(0, n, SPAN):
                columns = min(SPAN, n - j0)
                right, step = at(b, p0 * ldb + j0 * kb), ldb
                if packs:
                    pack(right, ldb, kb, panel, depth, columns)
                    right, step = panel, SPAN
                for t in range(tiles):
                    until = min(lines, asked + share)
                    for line in range(asked, until):
                        fetch(ahead, line * LINE)
                    asked = until
                    top = height * t // tiles
                    rows, i = height * (t + 1) // tiles - top, i0 + top
                    left, down, along = at(a, i * lda + p0 * ka), lda, ka
                    if turns:
                        left, down, along = at(panel, DEEP * SPAN + top * depth), 1, rows
                    to, begin = at(c, i * ldc + j0), at(start, i * lds + j0)
                    run_tile(rows, columns, left, down, along, right, step, to, ldc, begin, lds, depth)


@entry(FLOATS, INT, INT, FLOATS, INT, INT, FLOATS, INT, FLOATS, INT, INT, INT, INT, FLOATS)
def product(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel):
    """See `matmul`."""
    matmul(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel)
