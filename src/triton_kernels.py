"""The GPU kernels of packed attention in Triton: one forward, three backward.

A tile of scores lives in registers (online softmax: arXiv 2205.14135, algorithm 1; backward: arXiv 2307.08691, algorithm 2), the mask
comes from segment ids, and keys of other segments are skipped. The gradient of the bias has a kernel of its own that sums over a share of
the batch before it writes: the price is one more computation of the scores, where atomic additions would wait for each other.

`src.triton_attention` calls them, with grids of (blocks, rows x heads), or (blocks, blocks, heads x shares) for the bias.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e), which the hardware has an instruction for
NOWHERE: tl.constexpr = tl.constexpr(1 << 30)


@triton.jit
def _start(row, head, length, width, d_kv: tl.constexpr):
    """Where a head of a row begins in (rows, length, heads x d_kv): 64 bits, for large batches."""
    return tl.cast(row, tl.int64) * length * width + head * d_kv


@triton.jit
def _place(query_length, key_length, heads, d_kv: tl.constexpr):
    """The row and head of a program of the grid (blocks, rows x heads): both as one number and alone, width of a token, starts."""
    row_head, width = tl.program_id(1), heads * d_kv
    row, head = row_head // heads, row_head % heads
    return row_head, row, head, width, _start(row, head, query_length, width, d_kv), _start(row, head, key_length, width, d_kv)


@triton.jit
def _rows(pointer, positions, length, width, d_kv: tl.constexpr):
    """(block, d_kv) of one head at the given positions, zeros beyond the end."""
    columns = tl.arange(0, d_kv)
    return tl.load(pointer + positions[:, None] * width + columns[None, :], mask=positions[:, None] < length, other=0.0)


@triton.jit
def _store_rows(pointer, values, positions, length, width, d_kv: tl.constexpr):
    columns = tl.arange(0, d_kv)
    where = pointer + positions[:, None] * width + columns[None, :]
    tl.store(where, values.to(pointer.dtype.element_ty), mask=positions[:, None] < length)


@triton.jit
def _visible(segments, others_pointer, length, power_of_two: tl.constexpr):
    """Where, on the other side, the positions begin and end whose segment lies between the lowest and the highest of `segments`."""
    lowest = tl.min(tl.where(segments >= 0, segments, NOWHERE), 0)
    highest = tl.max(segments, 0)
    positions = tl.arange(0, power_of_two)
    others = tl.load(others_pointer + positions, mask=positions < length, other=-1)
    inside = (others >= lowest) & (others <= highest)
    return tl.min(tl.where(inside, positions, length), 0), tl.max(tl.where(inside, positions + 1, 0), 0)


@triton.jit
def _scores(
    q, k, bias, queries, keys, query_segments, key_segments, query_length, key_length,
    biased: tl.constexpr, causal: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """Q K^T + bias, -inf where query and key may not meet: float32 (queries, keys). `even`: no tile reaches beyond the end."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if biased:
        places = bias + queries[:, None] * key_length + keys[None, :]
        if even:
            added = tl.load(places)
        else:
            added = tl.load(places, mask=(queries[:, None] < query_length) & (keys[None, :] < key_length), other=0.0)
        scores += added.to(tl.float32)
    meet = query_segments[:, None] == key_segments[None, :]  # beyond the end stand -1 and -2, which differ
    if causal:
        meet = meet & (queries[:, None] >= keys[None, :])
    return tl.where(meet, scores, -float("inf"))


@triton.jit
def _kept(seed, rate, row_head, queries, keys, query_length, key_length):
    """Which attention weights dropout keeps: a function of the seed and the place, so that the backward pass draws the same."""
    place = (row_head * query_length + queries[:, None]) * key_length + keys[None, :]
    return tl.rand(tl.load(seed), place) >= rate


@triton.jit
def _softmax_state(normaliser, delta, row_head, queries, query_length):
    """What the backward pass knows of each query's softmax: log2 of its sum, and the sum of output x its gradient."""
    inside, places = queries < query_length, row_head * query_length + queries
    return tl.load(normaliser + places, mask=inside, other=float("inf")), tl.load(delta + places, mask=inside, other=0.0)


@triton.jit
def _score_gradients(
    scores, log_total, d_output, v, delta, seed, rate, row_head, queries, keys, query_length, key_length, dropout: tl.constexpr
):
    """Gradients of the scores, and the weights that multiplied V: float32 (queries, keys) both."""
    p = tl.exp2(scores * LOG2_E - log_total[:, None])
    d_weights, weights = tl.dot(d_output, tl.trans(v), input_precision="ieee"), p
    if dropout:
        scale = tl.where(_kept(seed, rate, row_head, queries, keys, query_length, key_length), 1 / (1 - rate), 0.0)
        d_weights, weights = d_weights * scale, p * scale
    return p * (d_weights - delta[:, None]), weights


@triton.jit
def forward(
    query, key, value, bias, query_segments, key_segments, output, normaliser, query_length, key_length, heads, seed, rate,
    d_kv: tl.constexpr, biased: tl.constexpr, causal: tl.constexpr, dropout: tl.constexpr, even: tl.constexpr, block: tl.constexpr,
    power_of_two: tl.constexpr,
):  # fmt: skip
    row_head, row, head, width, of_queries, of_keys = _place(query_length, key_length, heads, d_kv)
    query, output, key, value = query + of_queries, output + of_queries, key + of_keys, value + of_keys
    key_segments += row * key_length
    bias += head * query_length * key_length
    queries = tl.program_id(0) * block + tl.arange(0, block)
    own = tl.load(query_segments + row * query_length + queries, mask=queries < query_length, other=-1)
    q = _rows(query, queries, query_length, width, d_kv)
    begin, end = _visible(own, key_segments, key_length, power_of_two)
    if causal:
        end = tl.minimum(end, (tl.program_id(0) + 1) * block)
    highest = tl.full((block,), -float("inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    context = tl.zeros((block, d_kv), tl.float32)
    for first in tl.range(begin // block * block, end, block):
        keys = first + tl.arange(0, block)
        theirs = tl.load(key_segments + keys, mask=keys < key_length, other=-2)
        k = _rows(key, keys, key_length, width, d_kv)
        scores = _scores(q, k, bias, queries, keys, own, theirs, query_length, key_length, biased, causal, even)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)  # a query that has met no key yet
        weights, rescale = tl.exp2(scores * LOG2_E - (shift * LOG2_E)[:, None]), tl.exp2((highest - shift) * LOG2_E)
        total = total * rescale + tl.sum(weights, 1)
        if dropout:
            kept = _kept(seed, rate, row_head, queries, keys, query_length, key_length)
            weights = tl.where(kept, weights / (1 - rate), 0.0)
        v = _rows(value, keys, key_length, width, d_kv)
        context = tl.dot(weights.to(v.dtype), v, context * rescale[:, None], input_precision="ieee")
        highest = new_highest
    met = total > 0
    total = tl.where(met, total, 1.0)
    _store_rows(output, context / total[:, None], queries, query_length, width, d_kv)
    log_total = tl.where(met, highest * LOG2_E + tl.log2(total), float("inf"))  # infinite: every weight comes out as 0
    tl.store(normaliser + row_head * query_length + queries, log_total, mask=queries < query_length)


@triton.jit
def backward_keys(
    query, key, value, bias, query_segments, key_segments, d_output, normaliser, delta, d_key, d_value, query_length, key_length, heads,
    seed, rate, d_kv: tl.constexpr, biased: tl.constexpr, causal: tl.constexpr, dropout: tl.constexpr, even: tl.constexpr,
    block: tl.constexpr, power_of_two: tl.constexpr,
):  # fmt: skip
    row_head, row, head, width, of_queries, of_keys = _place(query_length, key_length, heads, d_kv)
    query, d_output, key, value = query + of_queries, d_output + of_queries, key + of_keys, value + of_keys
    query_segments += row * query_length
    bias += head * query_length * key_length
    keys = tl.program_id(0) * block + tl.arange(0, block)
    own = tl.load(key_segments + row * key_length + keys, mask=keys < key_length, other=-2)
    k, v = _rows(key, keys, key_length, width, d_kv), _rows(value, keys, key_length, width, d_kv)
    begin, end = _visible(own, query_segments, query_length, power_of_two)
    if causal:
        begin = tl.maximum(begin, tl.program_id(0) * block)
    key_gradient, value_gradient = tl.zeros((block, d_kv), tl.float32), tl.zeros((block, d_kv), tl.float32)
    for first in tl.range(begin // block * block, end, block):
        queries = first + tl.arange(0, block)
        theirs = tl.load(query_segments + queries, mask=queries < query_length, other=-1)
        q, d_o = _rows(query, queries, query_length, width, d_kv), _rows(d_output, queries, query_length, width, d_kv)
        scores = _scores(q, k, bias, queries, keys, theirs, own, query_length, key_length, biased, causal, even)
        log_total, d = _softmax_state(normaliser, delta, row_head, queries, query_length)
        d_scores, weights = _score_gradients(
            scores, log_total, d_o, v, d, seed, rate, row_head, queries, keys, query_length, key_length, dropout
        )
        value_gradient = tl.dot(tl.trans(weights.to(d_o.dtype)), d_o, value_gradient, input_precision="ieee")
        key_gradient = tl.dot(tl.trans(d_scores.to(q.dtype)), q, key_gradient, input_precision="ieee")
    _store_rows(d_key + of_keys, key_gradient, keys, key_length, width, d_kv)
    _store_rows(d_value + of_keys, value_gradient, keys, key_length, width, d_kv)


@triton.jit
def backward_queries(
    query, key, value, bias, query_segments, key_segments, d_output, normaliser, delta, output, d_query, query_length, key_length,
    heads, seed, rate, d_kv: tl.constexpr, biased: tl.constexpr, causal: tl.constexpr, dropout: tl.constexpr, even: tl.constexpr,
    block: tl.constexpr, power_of_two: tl.constexpr,
):  # fmt: skip
    row_head, row, head, width, of_queries, of_keys = _place(query_length, key_length, heads, d_kv)
    key, value = key + of_keys, value + of_keys
    key_segments += row * key_length
    bias += head * query_length * key_length
    queries = tl.program_id(0) * block + tl.arange(0, block)
    own = tl.load(query_segments + row * query_length + queries, mask=queries < query_length, other=-1)
    q = _rows(query + of_queries, queries, query_length, width, d_kv)
    d_o = _rows(d_output + of_queries, queries, query_length, width, d_kv)
    output = _rows(output + of_queries, queries, query_length, width, d_kv)
    d = tl.sum(d_o.to(tl.float32) * output.to(tl.float32), 1)
    inside, places = queries < query_length, row_head * query_length + queries
    tl.store(delta + places, d, mask=inside)  # for the kernels that follow
    log_total = tl.load(normaliser + places, mask=inside, other=float("inf"))
    begin, end = _visible(own, key_segments, key_length, power_of_two)
    if causal:
        end = tl.minimum(end, (tl.program_id(0) + 1) * block)
    gradient = tl.zeros((block, d_kv), tl.float32)
    for first in tl.range(begin // block * block, end, block):
        keys = first + tl.arange(0, block)
        theirs = tl.load(key_segments + keys, mask=keys < key_length, other=-2)
        k, v = _rows(key, keys, key_length, width, d_kv), _rows(value, keys, key_length, width, d_kv)
        scores = _scores(q, k, bias, queries, keys, own, theirs, query_length, key_length, biased, causal, even)
        d_scores, _ = _score_gradients(scores, log_total, d_o, v, d, seed, rate, row_head, queries, keys, query_length, key_length, dropout)
        gradient = tl.dot(d_scores.to(k.dtype), k, gradient, input_precision="ieee")
    _store_rows(d_query + of_queries, gradient, queries, query_length, width, d_kv)


@triton.jit
def backward_bias(
    query, key, value, bias, query_segments, key_segments, d_output, normaliser, delta, d_bias, rows, shares, query_length, key_length,
    heads, seed, rate, d_kv: tl.constexpr, causal: tl.constexpr, dropout: tl.constexpr, even: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    head, share, width = tl.program_id(2) // shares, tl.program_id(2) % shares, heads * d_kv
    bias += head * query_length * key_length
    queries = tl.program_id(0) * block + tl.arange(0, block)
    keys = tl.program_id(1) * block + tl.arange(0, block)
    inside, key_inside = queries < query_length, keys < key_length
    gradient = tl.zeros((block, block), tl.float32)
    first_row, last_row = rows * share // shares, rows * (share + 1) // shares
    if causal:
        last_row = tl.where(tl.program_id(1) > tl.program_id(0), 0, last_row)  # no key of this tile comes before a query of it
    for row in tl.range(first_row, last_row):
        own = tl.load(query_segments + row * query_length + queries, mask=inside, other=-1)
        theirs = tl.load(key_segments + row * key_length + keys, mask=key_inside, other=-2)
        apart = (tl.min(tl.where(own >= 0, own, NOWHERE), 0) > tl.max(theirs, 0)) | (
            tl.max(own, 0) < tl.min(tl.where(theirs >= 0, theirs, NOWHERE), 0)
        )
        if not apart:
            of_queries, of_keys = _start(row, head, query_length, width, d_kv), _start(row, head, key_length, width, d_kv)
            row_head = row * heads + head
            q, k = _rows(query + of_queries, queries, query_length, width, d_kv), _rows(key + of_keys, keys, key_length, width, d_kv)
            v, d_o = _rows(value + of_keys, keys, key_length, width, d_kv), _rows(d_output + of_queries, queries, query_length, width, d_kv)
            scores = _scores(q, k, bias, queries, keys, own, theirs, query_length, key_length, True, causal, even)
            log_total, d = _softmax_state(normaliser, delta, row_head, queries, query_length)
            d_scores, _ = _score_gradients(
                scores, log_total, d_o, v, d, seed, rate, row_head, queries, keys, query_length, key_length, dropout
            )
            gradient += d_scores
    where = d_bias + ((share * heads + head) * query_length + queries[:, None]) * key_length + keys[None, :]
    tl.store(where, gradient, mask=inside[:, None] & key_inside[None, :])
