"""Define how slots are sorted by their expert. Only the compiler imports this module; see `source.py`."""

from phasegate.model.kernels.products import INT, INTS, entry, inner


@inner
def count_strange(indices, n, count):
    """Count the indices that are not below `count`, or below zero: one would reach foreign memory."""
    strange = 0
    for i in range(n):
        strange += 1 if indices[i] < 0 or indices[i] >= count else 0
    return strange


@entry(*[INTS] * 6, INT, INT)
def sort_slots(experts, slot, place, ends, counts, strange, n_slots, n_experts):
    """Sort slots by their expert, stably: `slot` of each row, `place` (row) of each slot, `ends` of experts' rows.

    If `strange` experts are found, nothing is done.
    """
    strange[0] = count_strange(experts, n_slots, n_experts)
    if strange[0]:
        return
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
