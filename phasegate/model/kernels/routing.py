"""Define the kernels of routing: scores, choice, gates, the descent to an expert, and their gradients."""

import math

import numpy as np

from phasegate.model.kernels.source import INT, INTS, entry, inner, matmul, sort_slots
from phasegate.model.kernels.tile import FLOATS, at, bits_of, float_of, fma

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


@entry(*[FLOATS] * 5, *[INTS] * 2, *[FLOATS] * 2, *[INTS] * 2, *[FLOATS] * 3, *[INTS] * 4, *[INT] * 7)
def route(
    x, router, bias, node_weight, node_offset, root, child, logits, gates, families, experts, margins, zeros, panel,
    slot, place, ends, counts, n_gates, n, n_families, width, top_k, n_nodes, n_experts,
):  # fmt: skip
    """Score the families, choose and weigh them, descend to an expert of each, and sort the slots by expert."""
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
    sort_slots(experts, slot, place, ends, counts, tokens * top_k, n_experts)


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


@entry(*[FLOATS] * 2, INTS, *[FLOATS] * 2, *[INT] * 3)
def balance(logits, shares, families, value, d_logits, n, n_families, top_k):
    """Compute Switch's balancing loss of one gate's tokens, and its gradient."""
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
