"""Define the kernels of the optimizer and of the search for numbers that are not finite."""

import math

import numpy as np
from numba import types

from phasegate.model.kernels.source import DOUBLE, INT, INTS, entry, inner
from phasegate.model.kernels.tile import floats_at


@entry(INTS, types.CPointer(DOUBLE), INT)
def adamw(table, rates, n_tensors):
    """Update tensors by AdamW. Per tensor: addresses of value, gradient, moments, step, and its size; five rates."""
    for t in range(n_tensors):
        value, slope = floats_at(table[6 * t]), floats_at(table[6 * t + 1])
        first, second, step = floats_at(table[6 * t + 2]), floats_at(table[6 * t + 3]), floats_at(table[6 * t + 4])
        step[0] += np.float32(1)
        lr, beta1, beta2, eps, decay = (
            rates[5 * t],
            rates[5 * t + 1],
            rates[5 * t + 2],
            rates[5 * t + 3],
            rates[5 * t + 4],
        )
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
