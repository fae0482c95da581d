"""Define the kernels of products and of the mixture; `routing` and `steps` have the others.

Only the compiler imports these modules: `compiled.kernels` runs what it made of them.

Arguments are addresses of float32 (`f`), int64 (`i`), and numbers. Strides count elements. There is no fastmath, so
that sums keep their order.
"""

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types

from phasegate.model.kernels.compiled import target
from phasegate.model.kernels.tile import (
    FLOATS,
    ROWS,
    WIDTH,
    at,
    dot,
    fetch,
    fma,
    narrow_tile,
    transpose,
    wide_tile,
)

OPTIONS: dict[str, Any] = {"nopython": True, "error_model": "numpy"}
INTS, INT, DOUBLE = types.CPointer(types.int64), types.int64, types.float64
inner = numba.jit(**OPTIONS)
DEEP, TALL = 256, 512  # rows of b and of a that a pass holds in the caches
SPAN = 2 * WIDTH
ENTRIES: dict[str, tuple[Any, Any]] = {}


def entry(*kinds: Any) -> Any:
    """Register a kernel of these arguments."""

    def register(function: Any) -> Any:
        ENTRIES[function.__name__] = numba.jit(**OPTIONS)(function), types.void(*kinds)
        return ENTRIES[function.__name__][0]

    return register


def compile_all() -> tuple[dict[str, tuple[str, list[str]]], bytes]:
    """Compile all kernels to one object file; return each one's symbol and types of arguments, and the file."""
    functions, whole = dict[str, tuple[str, list[str]]](), llvm.parse_assembly("")
    for name, (dispatcher, signature) in ENTRIES.items():
        dispatcher.compile(signature)
        compiled = dispatcher.overloads[signature.args]
        functions[name] = compiled.fndesc.llvm_func_name, [str(kind) for kind in signature.args]
        whole.link_in(llvm.parse_assembly(dispatcher.inspect_llvm(signature.args)))
    processor, features = target()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=processor, features=features, opt=3, reloc="pic", codemodel="default", jit=True
    )
    wanted = {symbol for symbol, _ in functions.values()}
    for function in whole.functions:
        if function.name not in wanted and not function.is_declaration:
            function.linkage = "internal"  # numba's wrappers for Python, which call what is not there without numba
    passes, builder = (
        llvm.create_new_module_pass_manager(),
        llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()),
    )
    passes.add_global_dead_code_eliminate_pass()
    passes.run(whole, builder)
    return functions, machine.emit_object(whole)


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
def matmul(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel):
    """Compute c (m, n) = start + a (m, k) @ b (k, n), each element a chain of fused multiply-adds in the order of k.

    One stride of b is 1. `panel` holds DEEP * SPAN floats.
    """
    for p0 in range(0, max(k, 1), DEEP):
        depth = min(DEEP, k - p0)
        if p0:
            start, lds = c, ldc
        for i0 in range(0, m, TALL):
            height = min(TALL, m - i0)
            tiles = (height + ROWS - 1) // ROWS
            packs = kb != 1 or (ldb > SPAN and height >= 64)
            for j0 in range(0, n, SPAN):
                columns = min(SPAN, n - j0)
                right, step = at(b, p0 * ldb + j0 * kb), ldb
                if packs:
                    pack(right, ldb, kb, panel, depth, columns)
                    right, step = panel, SPAN
                for t in range(tiles):
                    top = height * t // tiles
                    rows, i = height * (t + 1) // tiles - top, i0 + top
                    left, to, begin = at(a, i * lda + p0 * ka), at(c, i * ldc + j0), at(start, i * lds + j0)
                    if columns == SPAN:
                        wide_tile(rows, SPAN, left, lda, ka, right, step, to, ldc, begin, lds, depth)
                    else:
                        narrow_tile(rows, columns, left, lda, ka, right, step, to, ldc, begin, lds, depth)
                        if columns > WIDTH:
                            narrow_tile(
                                rows, columns - WIDTH, left, lda, ka, at(right, WIDTH), step,
                                at(to, WIDTH), ldc, at(begin, WIDTH), lds, depth,
                            )  # fmt: skip


@entry(FLOATS, INT, INT, FLOATS, INT, INT, FLOATS, INT, FLOATS, INT, INT, INT, INT, FLOATS)
def product(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel):
    """See `matmul`."""
    matmul(a, lda, ka, b, ldb, kb, c, ldc, start, lds, m, n, k, panel)


@entry(*[INTS] * 5, INT, INT)
def sort_slots(experts, slot, place, ends, counts, n_slots, n_experts):
    """Sort slots by their expert, stably: `slot` of each row, `place` (row) of each slot, `ends` of experts' rows."""
    for e in range(n_experts):
        counts[e] = 0
    for s in range(n_slots):
        counts[experts[s]] += 1
    total = 0
    for e in range(n_experts):  # for now the beginnings, which become the ends as rows are counted off
        ends[e] = total
        total += counts[e]
    for s in range(n_slots):
        row = ends[experts[s]]
        ends[experts[s]] = row + 1
        slot[row], place[s] = s, row


@inner
def mix(y, place, gates, step, out, n, top_k, width):
    """Sum rows of y (n top_k, width) over the slots of each token, in order, weighted by gates (`step` apart)."""
    for i in range(n):
        to = at(out, i * width)
        for k in range(top_k):
            row, gate = at(y, place[i * top_k + k] * width), gates[(i * top_k + k) * step]
            if k == 0:
                for j in range(width):
                    to[j] = gate * row[j]
            else:
                for j in range(width):
                    to[j] = fma(gate, row[j], to[j])


@inner
def prefetch(w_in, w_out, e, n_experts, size):
    """Ask the caches for an expert's weights, unless there are few experts, which stay there, or large ones."""
    if e < n_experts and n_experts * size > 1 << 18 and size <= 1 << 14:
        for j in range(e * size, (e + 1) * size, 16):
            fetch(w_in, j)
            fetch(w_out, j)


@entry(*[FLOATS] * 4, *[INTS] * 3, *[FLOATS] * 6, *[INT] * 5)
def mixture(
    x, gates, w_in, w_out, slot, place, ends, rows, hidden, y, out, zeros, panel, n, top_k, n_experts, width, inside
):
    """Gather the tokens of each expert, run it on them, and sum what each token gets."""
    begin = 0
    for e in range(n_experts):
        m, some, active, made = (
            ends[e] - begin,
            at(rows, begin * width),
            at(hidden, begin * inside),
            at(y, begin * width),
        )
        for r in range(m):
            source, to = at(x, slot[begin + r] // top_k * width), at(some, r * width)
            for j in range(width):
                to[j] = source[j]
        first, second = at(w_in, e * width * inside), at(w_out, e * width * inside)
        prefetch(w_in, w_out, e + 1, n_experts, width * inside)
        matmul(some, width, 1, first, inside, 1, active, inside, zeros, 0, m, inside, width, panel)
        for j in range(m * inside):
            active[j] = active[j] if active[j] > 0 else np.float32(0)
        matmul(active, inside, 1, second, width, 1, made, width, zeros, 0, m, width, inside, panel)
        begin = ends[e]
    mix(y, place, gates, 1, out, n, top_k, width)


@entry(*[FLOATS] * 7, *[INTS] * 3, *[FLOATS] * 10, *[INT] * 5)
def mixture_gradient(
    slope, gates, w_in, w_out, rows, hidden, y, slot, place, ends, d_x, d_gates, d_w_in, d_w_out,
    some, d_hidden, d_rows, one, zeros, panel, n, top_k, n_experts, width, inside,
):  # fmt: skip
    """Take the gradient of `mixture` to tokens, gates and weights; `some`, `d_hidden` and `d_rows` are scratch."""
    begin = 0
    for e in range(n_experts):
        m, size = ends[e] - begin, width * inside
        prefetch(w_in, w_out, e + 1, n_experts, size)
        prefetch(d_w_in, d_w_out, e + 1, n_experts, size)
        for r in range(m):
            s = slot[begin + r]
            source, to = at(slope, s // top_k * width), at(some, r * width)
            d_gates[s] = dot(source, at(y, (begin + r) * width), width)
            gate = gates[s]
            for j in range(width):
                to[j] = gate * source[j]
        active = at(hidden, begin * inside)
        matmul(active, 1, inside, some, width, 1, at(d_w_out, e * size), width, zeros, 0, inside, width, m, panel)
        matmul(some, width, 1, at(w_out, e * size), 1, width, d_hidden, inside, zeros, 0, m, inside, width, panel)
        for j in range(m * inside):
            d_hidden[j] = d_hidden[j] if active[j] > 0 else np.float32(0)
        given, back = at(rows, begin * width), at(d_rows, begin * width)
        matmul(given, 1, width, d_hidden, inside, 1, at(d_w_in, e * size), inside, zeros, 0, width, inside, m, panel)
        matmul(d_hidden, inside, 1, at(w_in, e * size), 1, inside, back, width, zeros, 0, m, width, inside, panel)
        begin = ends[e]
    mix(d_rows, place, one, 0, d_x, n, top_k, width)
