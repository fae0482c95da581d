"""Define the kernels. Only the compiler imports this module; `compiled.kernels` runs what it made of it.

Arguments are addresses and numbers; strides count elements. There is no fastmath, so that sums keep their order.
"""

import math

import llvmlite.binding as llvm
import numpy as np
from numba import types

from phasegate.model.kernels.compiled import target
from phasegate.model.kernels.products import DOUBLE, ENTRIES, INT, INTS, LINE, entry, inner, matmul, matmul_ahead
from phasegate.model.kernels.sorting import count_strange
from phasegate.model.kernels.tile import FLOATS, at, bits_of, dot, float_of, floats_at, fma


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
    passes = llvm.create_new_module_pass_manager()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    passes.add_global_dead_code_eliminate_pass()
    passes.run(whole, builder)
    return functions, machine.emit_object(whole)


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
def lines_ahead(e, n_experts, size):
    """Count the lines of the next expert's weights to fetch ahead: none of few experts, which stay in the caches."""
    return size // LINE if e + 1 < n_experts and n_experts * size > 1 << 18 and size <= 1 << 14 else 0


@entry(*[FLOATS] * 4, *[INTS] * 3, *[FLOATS] * 6, *[INT] * 5)
def mixture(
    x, gates, w_in, w_out, slot, place, ends, rows, hidden, y, out, zeros, panel, n, top_k, n_experts, width, inside
):
    """Gather the tokens of each expert, run it on them, and sum what each token gets."""
    begin = 0
    for e in range(n_experts):
        m, some = ends[e] - begin, at(rows, begin * width)
        active, made = at(hidden, begin * inside), at(y, begin * width)
        for r in range(m):
            source, to = at(x, slot[begin + r] // top_k * width), at(some, r * width)
            for j in range(width):
                to[j] = source[j]
        size = width * inside
        first, second = at(w_in, e * size), at(w_out, e * size)
        third, fourth, lines = at(first, size), at(second, size), lines_ahead(e, n_experts, size)
        matmul_ahead(some, width, 1, first, inside, 1, active, inside, zeros, 0, m, inside, width, panel, third, lines)
        for j in range(m * inside):
            active[j] = active[j] if active[j] > 0 else np.float32(0)
        matmul_ahead(active, inside, 1, second, width, 1, made, width, zeros, 0, m, width, inside, panel, fourth, lines)
        begin = ends[e]
    mix(y, place, gates, 1, out, n, top_k, width)


@inner
def product_gradient(a, b, slope, d_a, d_b, zeros, m, k, n, panel, ahead, lines):
    """Take the gradient of a (m, k) @ b (k, n); ask for the weights that follow b, then for what follows `ahead`."""
    matmul_ahead(a, 1, k, slope, n, 1, d_b, n, zeros, 0, k, n, m, panel, at(b, k * n), lines)
    matmul_ahead(slope, n, 1, b, 1, n, d_a, k, zeros, 0, m, k, n, panel, at(ahead, k * n), lines)


@entry(*[FLOATS] * 7, *[INTS] * 3, *[FLOATS] * 10, *[INT] * 5)
def mixture_gradient(
    slope, gates, w_in, w_out, rows, hidden, y, slot, place, ends, d_x, d_gates, d_w_in, d_w_out,
    some, d_hidden, d_rows, one, zeros, panel, n, top_k, n_experts, width, inside,
):  # fmt: skip
    """Take the gradient of `mixture` to tokens, gates and weights; `some`, `d_hidden` and `d_rows` are scratch."""
    begin = 0
    for e in range(n_experts):
        m, size = ends[e] - begin, width * inside
        lines, first, second = lines_ahead(e, n_experts, size), at(w_in, e * size), at(w_out, e * size)
        d_first, d_second = at(d_w_in, e * size), at(d_w_out, e * size)
        for r in range(m):
            s = slot[begin + r]
            source, to = at(slope, s // top_k * width), at(some, r * width)
            d_gates[s] = dot(source, at(y, (begin + r) * width), width)
            gate = gates[s]
            for j in range(width):
                to[j] = gate * source[j]
        active, given, back = at(hidden, begin * inside), at(rows, begin * width), at(d_rows, begin * width)
        product_gradient(active, second, some, d_hidden, d_second, zeros, m, inside, width, panel, d_first, lines)
        for j in range(m * inside):
            d_hidden[j] = d_hidden[j] if active[j] > 0 else np.float32(0)
        product_gradient(given, first, d_hidden, back, d_first, zeros, m, width, inside, panel, d_second, lines)
        begin = ends[e]
    mix(d_rows, place, one, 0, d_x, n, top_k, width)


LOG2E, LN2_HIGH, LN2_LOW = np.float32(math.log2(math.e)), np.float32(0.693359375), np.float32(-2.12194440e-4)
SHIFT = np.float32(3 << 22)  # added and taken away again, it rounds to a whole number


@inner
def exp(x):
    """Return e**x (float32) for x <= 0, at least e**-87, by Cephes' polynomial: two units in the last place."""
    x = x if not x < np.float32(-87) else np.float32(-87)
    shifted = fma(x, LOG2E, SHIFT)
    n = shifted - SHIFT
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    p = np.float32(1.9875691500e-4)
    p = fma(p, r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    p = fma(p, r * r, r) + np.float32(1)
    power = np.int32((bits_of(shifted) << np.int32(23)) + np.int32(0x3F800000))
    return p * float_of(power)


@inner
def choose(logits, bias, families, n_families, top_k):
    """Choose the families with the greatest biased scores, by rank; of equal ones, the lower index."""
    for f in range(n_families):
        score, k = logits[f] + bias[f], min(f, top_k)
        while k and score > logits[families[k - 1]] + bias[families[k - 1]]:
            if k < top_k:
                families[k] = families[k - 1]
            k -= 1
        if k < top_k:
            families[k] = f


@inner
def weigh(logits, families, gates, n_families, top_k):
    """Give the chosen the softmax of their scores; a lone one keeps its probability among all families."""
    greatest = logits[families[0]]
    for f in range(n_families if top_k == 1 else top_k):
        score = logits[f if top_k == 1 else families[f]]
        greatest = score if score > greatest else greatest
    total = np.float32(0)
    for f in range(n_families if top_k == 1 else top_k):
        total += exp(logits[f if top_k == 1 else families[f]] - greatest)
    for k in range(top_k):
        gates[k] = exp(logits[families[k]] - greatest) / total


@entry(*[FLOATS] * 5, *[INTS] * 2, *[FLOATS] * 2, *[INTS] * 2, *[FLOATS] * 3, *[INT] * 6)
def route(
    x, router, bias, node_weight, node_offset, root, child, logits, gates, families, experts, margins, zeros, panel,
    n_gates, n, n_families, width, top_k, n_nodes,
):  # fmt: skip
    """Score the families, choose and weigh them, and descend to an expert of each."""
    for g in range(n_gates):
        left, right, scores = at(x, g * n * width), at(router, g * n_families * width), at(logits, g * n * n_families)
        matmul(left, width, 1, right, 1, width, scores, n_families, zeros, 0, n, n_families, width, panel)
    tokens = n_gates * n
    matmul(x, width, 1, node_weight, 1, width, margins, n_nodes, node_offset, 0, tokens, n_nodes, width, panel)
    for i in range(tokens):
        scores, chosen = at(logits, i * n_families), at(families, i * top_k)
        choose(scores, at(bias, i // n * n_families), chosen, n_families, top_k)
        weigh(scores, chosen, at(gates, i * top_k), n_families, top_k)
        for k in range(top_k):
            place_in_tree = root[chosen[k]]
            while place_in_tree < n_nodes:
                side = 1 if margins[i * n_nodes + place_in_tree] > 0 else 0
                place_in_tree = child[2 * place_in_tree + side]
            experts[i * top_k + k] = place_in_tree - n_nodes


@inner
def soften(slope, logits, families, gates, d_logits, n_families, top_k):
    """Add to d_logits what comes through a token's gates, given the gates' `slope`."""
    if top_k == 1:
        chosen, greatest = families[0], logits[0]
        for f in range(1, n_families):
            greatest = logits[f] if logits[f] > greatest else greatest
        total = exp(logits[chosen] - greatest) / gates[0]
        for f in range(n_families):
            d_logits[f] -= slope[0] * gates[0] * (exp(logits[f] - greatest) / total)
        d_logits[chosen] += slope[0] * gates[0]
    else:
        mean = np.float32(0)
        for k in range(top_k):
            mean = fma(gates[k], slope[k], mean)
        for k in range(top_k):
            d_logits[families[k]] += gates[k] * (slope[k] - mean)


@inner
def teach(slope, families, gates, margins, root, child, d_margins, n_nodes, top_k):
    """Add to d_margins the gradient of a factor of value one: r / stop_gradient(r) of each chosen expert.

    r is the product of sigmoid(signed margin) along the path to the expert.
    """
    for k in range(top_k):
        node = root[families[k]]
        while node < n_nodes:
            margin = margins[node]
            below = exp(-abs(margin))
            pull = slope[k] * gates[k] * (below / (np.float32(1) + below))
            if margin > 0:
                d_margins[node] += pull
            elif margin < 0:
                d_margins[node] -= pull
            node = child[2 * node + (1 if margin > 0 else 0)]


@entry(*[FLOATS] * 3, INTS, *[FLOATS] * 4, *[INTS] * 2, *[FLOATS] * 6, *[INT] * 6)
def route_gradient(
    x, router, logits, families, gates, d_gates, d_mixed, margins, root, child, d_logits, d_margins, d_x, d_router,
    zeros, panel, n_gates, n, n_families, width, top_k, n_nodes,
):  # fmt: skip
    """Take the gradients of logits, of gates and of the mixture's weights on to d_router, and add to d_x and d_margins.

    The mixture's weights are the gates, but they also teach the hyperplanes, unless `n_nodes` is zero.
    """
    for i in range(n_gates * n):
        s, m, scores = i * top_k, i * n_nodes, i * n_families
        chosen, gate, slope, mixed = at(families, s), at(gates, s), at(d_gates, s), at(d_mixed, s)
        if n_nodes:
            teach(mixed, chosen, gate, at(margins, m), root, child, at(d_margins, m), n_nodes, top_k)
        for k in range(top_k):
            slope[k] += mixed[k]
        soften(slope, at(logits, scores), chosen, gate, at(d_logits, scores), n_families, top_k)
    for g in range(n_gates):
        slopes, right = at(d_logits, g * n * n_families), at(router, g * n_families * width)
        left, to, back = at(x, g * n * width), at(d_router, g * n_families * width), at(d_x, g * n * width)
        matmul(slopes, 1, n_families, left, width, 1, to, width, zeros, 0, n_families, width, n, panel)
        matmul(slopes, n_families, 1, right, width, 1, back, width, back, width, n, width, n_families, panel)


@entry(*[FLOATS] * 2, INTS, *[FLOATS] * 2, INTS, *[INT] * 3)
def balance(logits, shares, families, value, d_logits, strange, n, n_families, top_k):
    """Compute Switch's balancing loss of one gate's tokens, and its gradient; nothing if families are `strange`."""
    strange[0] = count_strange(families, n * top_k, n_families)
    if strange[0]:
        return
    for f in range(n_families):
        shares[f] = 0
    for s in range(n * top_k):
        shares[families[s]] += np.float32(1)
    total, scale = np.float32(0), np.float32(n_families / (np.float64(n) * n * top_k))
    for i in range(n):
        scores, slopes = at(logits, i * n_families), at(d_logits, i * n_families)
        greatest, whole, mean = scores[0], np.float32(0), np.float32(0)
        for f in range(1, n_families):
            greatest = scores[f] if scores[f] > greatest else greatest
        for f in range(n_families):
            slopes[f] = exp(scores[f] - greatest)
            whole += slopes[f]
        for f in range(n_families):
            slopes[f] = slopes[f] / whole
            mean = fma(slopes[f], shares[f], mean)
        for f in range(n_families):
            slopes[f] *= scale * (shares[f] - mean)
        total += mean
    value[0] += total * scale


@entry(INTS, types.CPointer(DOUBLE), INT)
def adamw(table, rates, n_tensors):
    """Update tensors by AdamW. Per tensor: addresses of value, gradient, moments, step, and its size; five rates."""
    for t in range(n_tensors):
        value, slope = floats_at(table[6 * t]), floats_at(table[6 * t + 1])
        first, second, step = floats_at(table[6 * t + 2]), floats_at(table[6 * t + 3]), floats_at(table[6 * t + 4])
        step[0] += np.float32(1)
        r = 5 * t
        lr, beta1, beta2, eps, decay = rates[r], rates[r + 1], rates[r + 2], rates[r + 3], rates[r + 4]
        bias1, bias2 = 1 - power(beta1, np.int64(step[0])), 1 - power(beta2, np.int64(step[0]))
        shrink, rate, root = np.float32(1 - lr * decay), np.float32(lr / bias1), np.float32(1 / math.sqrt(bias2))
        kept1, kept2, new1, new2 = np.float32(beta1), np.float32(beta2), np.float32(1 - beta1), np.float32(1 - beta2)
        tiny = np.float32(eps)
        for j in range(table[6 * t + 5]):
            g = slope[j]
            m = kept1 * first[j] + new1 * g
            v = kept2 * second[j] + new2 * (g * g)
            first[j], second[j] = m, v
            value[j] = value[j] * shrink - rate * m / (np.sqrt(v) * root + tiny)


@inner
def power(base, exponent):
    """Return base**exponent (float64) by squaring: as exact everywhere as multiplication."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@entry(INTS, INTS, INT)
def find_not_finite(table, found, n_tensors):
    """Set `found` to the first tensor (address, size) that holds a number that is not finite; else leave it."""
    for t in range(n_tensors):
        value, bad = floats_at(table[2 * t]), False
        for j in range(table[2 * t + 1]):
            bad |= value[j] - value[j] != 0
        if bad:
            found[0] = t
            return
