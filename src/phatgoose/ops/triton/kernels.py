"""The Triton kernels of routing at one module: score, finish, plan, shrink, expand.

Few tokens:  score → shrink_few → expand_few. A program computes for one token; nothing is sorted.
Many tokens: score → finish → plan → shrink_grouped → expand_grouped for each of the K choices. A program
computes for a tile, which is up to BM tokens of one expert, so an expert's rows are read once for all of them.
If the choice was made elsewhere, `score` is left out.

Every grid is as large as the worst case needs, and programs that find nothing to do end at once. So no size is
ever asked of the GPU, and a CUDA graph may hold any of these. Matrices are row-major without gaps; n tokens, K
choices, K2 ≥ K a power of two.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

_EPS = tl.constexpr(1e-5)
_LOWEST = tl.constexpr(-(2**63))
_MOST = tl.constexpr(0x7FFFFFFF)
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def _key(score, expert):
    """Score and expert in one int64. A greater key is a better choice: of equal scores the lower expert's; NaN
    is above all scores.

    The upper half holds the score's bits, the lower half the expert with all bits flipped. No key is `_LOWEST`.
    """
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # −0 is 0
    # As integers, the bits of positive floats are ordered as the floats; those of negative ones in reverse,
    # so they are flipped.
    bits = tl.where(bits < 0, bits ^ _MOST, bits)
    bits = tl.where(score == score, bits, _NAN)
    return (bits.to(tl.int64) << 32) | (expert ^ _MOST).to(tl.int64)


INTERPRETED = tl.constexpr(not isinstance(_key, triton.JITFunction))


@triton.jit
def _dot(a, b, acc):
    """acc + a b, summed in float32. float32 factors are multiplied as they are, not rounded to TF32."""
    if INTERPRETED:  # the interpreter has no products of bfloat16; they are exact in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _leaders(keys, K: tl.constexpr, K2: tl.constexpr):
    """The K greatest keys of each row, in order: [M, W] → [M, K2]. Columns beyond K hold `_LOWEST`."""
    column = tl.arange(0, K2)[None, :]
    best = tl.full([keys.shape[0], K2], _LOWEST, tl.int64)
    for j in range(K):
        top = tl.max(keys, axis=1)[:, None]
        best = tl.where(column == j, top, best)
        keys = tl.where(keys == top, _LOWEST, keys)
    return best


@triton.jit
def _leaders_of_both(known, keys, K: tl.constexpr, K2: tl.constexpr):
    """The K greatest keys of each row of two matrices, in order: [M, K2], [M, W] → [M, K2]."""
    column = tl.arange(0, K2)[None, :]
    best = tl.full([keys.shape[0], K2], _LOWEST, tl.int64)
    for j in range(K):
        top = tl.maximum(tl.max(known, axis=1), tl.max(keys, axis=1))[:, None]
        best = tl.where(column == j, top, best)
        known = tl.where(known == top, _LOWEST, known)
        keys = tl.where(keys == top, _LOWEST, keys)
    return best


@triton.jit
def _choice(best, K: tl.constexpr, K2: tl.constexpr):
    """Experts and the softmax over their scores: keys [M, K2] → int32, float32 [M, K2]."""
    expert = (best & _MOST).to(tl.int32) ^ _MOST
    bits = (best >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ _MOST, bits).to(tl.float32, bitcast=True)
    score = tl.where((tl.arange(0, K2)[None, :] < K) & (best != _LOWEST), score, float("-inf"))
    weight = tl.exp(score - tl.max(score, axis=1)[:, None])
    return expert, weight / tl.sum(weight, axis=1)[:, None]


@triton.jit
def _statistics(u, rows, there, d, BN: tl.constexpr, BD: tl.constexpr):
    """Mean and 1/√(variance + 1e-5) of each row, block by block (Chan et al.): a mean far from zero costs no digits."""
    mean, squares = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for i in range(0, d, BD):
        columns = i + tl.arange(0, BD)[None, :]
        inside = there[:, None] & (columns < d)
        x = tl.load(u + rows[:, None] * d + columns, mask=inside, other=0).to(tl.float32)
        seen, new = i * 1.0, tl.minimum(BD, d - i) * 1.0
        block = tl.sum(x, axis=1) / new
        apart = tl.where(inside, x - block[:, None], 0)
        step = block - mean
        squares += tl.sum(apart * apart, axis=1) + step * step * (seen * new / (seen + new))
        mean += step * (new / (seen + new))
    return mean, tl.rsqrt(squares / d + _EPS)


@triton.jit
def _score_products(
    u, gates, rows, there, experts, known, mean, d, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr
):
    """v̄ᵀu in float32's precision: [BN, BE].

    v̄ᵀ(u − mean) is the same, since v̄'s mean is zero, and more precise if u's is far from it. That is
    computed for a single token and for float32 inputs. u − mean isn't bfloat16 any more, so bfloat16 inputs go
    to tensor cores as they are, and each gate as the sum of three bfloat16 terms, which hold all of its bits.
    The small terms are added first.
    """
    if BN == 1:
        wide = tl.zeros([BE, BD], tl.float32)
    acc = tl.zeros([BN, BE], tl.float32)
    for i in range(0, d, BD):
        columns = i + tl.arange(0, BD)[None, :]
        x = tl.load(u + rows[:, None] * d + columns, mask=there[:, None] & (columns < d), other=0)
        v = tl.load(gates + experts[:, None] * d + columns, mask=known[:, None] & (columns < d), other=0)
        if BN == 1:  # products are kept apart and summed once, after the loop
            wide += v * (x.to(tl.float32) - mean[:, None])
        elif x.dtype == tl.bfloat16:
            high = v.to(tl.bfloat16)
            rest = v - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = _dot(x, tl.trans(low), acc)
            acc = _dot(x, tl.trans(middle), acc)
            acc = _dot(x, tl.trans(high), acc)
        else:
            acc = _dot(x.to(tl.float32) - mean[:, None], tl.trans(v), acc)
    if BN == 1:
        acc = tl.sum(wide, axis=1)[None, :]
    return acc


@triton.jit(do_not_specialize=["n"])
def score(
    u, gates, leaders, n, experts, d, each,
    K: tl.constexpr, K2: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The K best of one split of the experts (`each` of them) for BN tokens, as keys: leaders [n, splits, K2].

    A program keeps a running top-k, so scores stay in registers and [n, experts] is never written. u [n, d];
    gates float32 [experts, d], standardised, so that their mean is zero. score_e = v̄_eᵀ u / (std √d). Grid:
    (blocks of tokens, splits).
    """
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    there = rows < n
    mean, scale = _statistics(u, rows, there, d, BN, BD)
    scale = scale * tl.rsqrt(d * 1.0)
    best = tl.full([BN, K2], _LOWEST, tl.int64)
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, experts)
    for start in range(first, last, BE):
        expert = start + tl.arange(0, BE)
        known = expert < last
        acc = _score_products(u, gates, rows, there, expert.to(tl.int64), known, mean, d, BN, BE, BD)
        keys = _key(acc * scale[:, None], expert[None, :])
        best = _leaders_of_both(best, tl.where(known[None, :], keys, _LOWEST), K, K2)
    place = (rows * tl.num_programs(1) + tl.program_id(1))[:, None] * K2 + tl.arange(0, K2)[None, :]
    tl.store(leaders + place, best, mask=there[:, None])


@triton.jit(do_not_specialize=["n", "splits"])
def shrink_few(
    u, a, starts, ranks, scales, leaders, chosen, weights, h, d, widest, n, splits,
    K: tl.constexpr, K2: tl.constexpr, W: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """w · s · A u of one (token, choice) pair and BR of its expert's rows: h float32 [n · K, widest]. Grid: (n
    · K, blocks of rows).

    If SCORED, each program first makes the token's choice itself, from the leaders of all splits (W ≥ splits ·
    K2 of them): that costs less than another launch. The first block of rows keeps the choice.
    """
    pair = tl.program_id(0).to(tl.int64)
    token = pair // K
    if SCORED:
        at = tl.arange(0, W)[None, :]
        keys = tl.load(leaders + token * splits * K2 + at, mask=at < splits * K2, other=_LOWEST)
        experts, shares = _choice(_leaders(keys, K, K2), K, K2)
        mine = tl.arange(0, K2)[None, :] == pair % K
        expert = tl.sum(tl.sum(tl.where(mine, experts, 0), axis=1), axis=0)
        weight = tl.sum(tl.sum(tl.where(mine, shares, 0), axis=1), axis=0)
        if tl.program_id(1) == 0:
            tl.store(chosen + pair, expert.to(tl.int64))
            tl.store(weights + pair, weight)
    else:
        expert = tl.load(chosen + pair).to(tl.int32)
        weight = tl.load(weights + pair)
    rank = tl.load(ranks + expert, mask=expert >= 0, other=0)
    row = tl.program_id(1) * BR + tl.arange(0, BR)
    if tl.program_id(1) * BR < rank:
        weight = weight * tl.load(scales + expert)
        own = (tl.load(starts + expert) + row).to(tl.int64)
        acc = tl.zeros([BR, BD], tl.float32)
        for i in range(0, d, BD):
            column = i + tl.arange(0, BD)
            x = tl.load(u + token * d + column, mask=column < d, other=0).to(tl.float32)
            inside = (row < rank)[:, None] & (column < d)[None, :]
            acc += (
                tl.load(a + own[:, None] * d + column[None, :], mask=inside, other=0).to(tl.float32)
                * x[None, :]
            )
        tl.store(h + pair * widest + row, tl.sum(acc, axis=1) * weight, mask=row < rank)


@triton.jit
def expand_few(
    y, b, starts, ranks, chosen, h, out, d, widest, K: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr
):
    """y + Σ_j B_{e_j} h_j of one token and BO columns. It is summed in registers and rounded once. Grid: (n,
    blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BO + tl.arange(0, BO)
    acc = tl.zeros([BO], tl.float32)
    for j in range(K):
        pair = token * K + j
        expert = tl.load(chosen + pair)
        rank = tl.load(ranks + expert, mask=expert >= 0, other=0)
        start = tl.load(starts + expert, mask=expert >= 0, other=0).to(tl.int64)
        for r in range(0, rank, BR):
            row = r + tl.arange(0, BR)
            part = tl.load(h + pair * widest + row, mask=row < rank, other=0)
            inside = (row < rank)[:, None] & (column < d)[None, :]
            rows = tl.load(b + (start + row)[:, None] * d + column[None, :], mask=inside, other=0)
            acc += tl.sum(part[:, None] * rows.to(tl.float32), axis=0)
    at = token * d + column
    acc += tl.load(y + at, mask=column < d, other=0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=column < d)


@triton.jit(do_not_specialize=["n", "splits"])
def finish(
    leaders, chosen, weights, owners, counts, n, experts, splits,
    K: tl.constexpr, K2: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """The choice of BN tokens, from all splits' leaders if SCORED, and how many tokens each expert has. Grid:
    (blocks of tokens,).

    owners int32 [K, n]: the choice again, with `experts` in place of −1 (nothing). counts int32 [K, experts +
    1] must be zero before.
    """
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    column = tl.arange(0, K2)[None, :]
    there = (rows < n) & (column < K)
    if SCORED:
        at = tl.arange(0, W)[None, :]
        inside = (rows < n) & (at < splits * K2)
        keys = tl.load(leaders + rows * splits * K2 + at, mask=inside, other=_LOWEST)
        found, shares = _choice(_leaders(tl.where(rows < n, keys, 0), K, K2), K, K2)
        tl.store(chosen + rows * K + column, found.to(tl.int64), mask=there)
        tl.store(weights + rows * K + column, shares, mask=there)
    else:
        found = tl.load(chosen + rows * K + column, mask=there, other=0).to(tl.int32)
    owner = tl.where(found < 0, experts, found)
    tl.store(owners + column * n + rows, owner, mask=there)
    tl.atomic_add(counts + column * (experts + 1) + owner, 1, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["n", "tiles"])
def plan(
    owners, counts, slots, tables, n, experts, tiles, E2: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr
):
    """Sorts tokens by the expert that is their j-th choice, and cuts each expert's tokens into tiles of at most BM.

    Grid: (K, experts + 1); a program writes one expert's part. slots int32 [K, n]: tokens sorted by owner.
    tables int32 [K, 3, tiles]: each tile's owner, first slot and size. Sizes that no program writes stay zero:
    those tiles are empty.
    """
    j, owner = tl.program_id(0), tl.program_id(1)
    counts += j * (experts + 1)
    mine = tl.load(counts + owner)
    if mine > 0:
        # Where this expert's slots and tiles begin follows from the counts of the experts before it.
        e = tl.arange(0, E2)
        before = tl.load(counts + e, mask=e < owner, other=0)
        first = tl.sum(before, axis=0)
        table = tables + j * 3 * tiles + tl.sum((before + BM - 1) // BM, axis=0)
        for start in range(0, mine, BM):
            tl.store(table, owner)
            tl.store(table + tiles, first + start)
            tl.store(table + 2 * tiles, tl.minimum(mine - start, BM))
            table += 1
        at = slots + j.to(tl.int64) * n + first
        # Tokens keep their order, without atomics: each one's place is the number of own tokens before it.
        for start in range(0, n, BP):
            token = start + tl.arange(0, BP)
            own = tl.load(owners + j.to(tl.int64) * n + token, mask=token < n, other=-1) == owner
            place = tl.cumsum(own.to(tl.int32), axis=0) - 1
            tl.store(at + place, token, mask=own)
            at += tl.sum(own.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["n", "tiles"])
def shrink_grouped(
    u, a, starts, ranks, scales, weights, slots, tables, h, d, widest, n, experts, tiles,
    K: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """w · s · A u of a tile's tokens and BR of its expert's rows, which are read once for the tile.

    Grid: (K · tiles, blocks of rows). Tiles of `experts`, which stands for "nothing chosen", are skipped.
    """
    j = tl.program_id(0) // tiles
    table = tables + j * 3 * tiles + tl.program_id(0) % tiles
    expert, size = tl.load(table), tl.load(table + 2 * tiles)
    if (size > 0) & (expert < experts):
        rank = tl.load(ranks + expert)
        first = tl.program_id(1) * BR
        if first < rank:
            m = tl.arange(0, BM)
            token = tl.load(
                slots + j.to(tl.int64) * n + tl.load(table + tiles) + m, mask=m < size, other=0
            ).to(tl.int64)
            row = first + tl.arange(0, BR)
            own = (tl.load(starts + expert) + row).to(tl.int64)
            acc = tl.zeros([BM, BR], tl.float32)
            for i in range(0, d, BD):
                column = i + tl.arange(0, BD)[None, :]
                x = tl.load(u + token[:, None] * d + column, mask=(m < size)[:, None] & (column < d), other=0)
                rows = tl.load(
                    a + own[:, None] * d + column, mask=(row < rank)[:, None] & (column < d), other=0
                )
                if (x.dtype != rows.dtype) or (x.dtype == tl.float32):
                    x, rows = x.to(tl.float32), rows.to(tl.float32)
                acc = _dot(x, tl.trans(rows), acc)
            pair = token * K + j
            weight = tl.load(weights + pair, mask=m < size, other=0) * tl.load(scales + expert)
            place = h + pair[:, None] * widest + row[None, :]
            tl.store(place, acc * weight[:, None], mask=(m < size)[:, None] & (row < rank)[None, :])


@triton.jit(do_not_specialize=["n", "tiles", "j"])
def expand_grouped(
    y, b, starts, ranks, slots, tables, h, partial, out, d, widest, n, experts, tiles, j,
    K: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """B h of a tile's tokens and BO columns, for j-th choices. Grid: (tiles, blocks of columns); one launch per choice.

    A launch meets every token once, so nothing is added atomically and results are the same in every run. All
    launches but the last leave their sum in `partial` [n, d]; the last adds it and y, and rounds once.
    """
    table = tables + j * 3 * tiles + tl.program_id(0)
    expert, size = tl.load(table), tl.load(table + 2 * tiles)
    if size > 0:
        m = tl.arange(0, BM)
        token = tl.load(slots + j.to(tl.int64) * n + tl.load(table + tiles) + m, mask=m < size, other=0).to(
            tl.int64
        )
        column = tl.program_id(1) * BO + tl.arange(0, BO)
        rank = tl.load(ranks + expert, mask=expert < experts, other=0)
        start = tl.load(starts + expert, mask=expert < experts, other=0).to(tl.int64)
        acc = tl.zeros([BM, BO], tl.float32)
        for r in range(0, rank, BR):
            row = r + tl.arange(0, BR)
            inside = (m < size)[:, None] & (row < rank)[None, :]
            part = tl.load(h + (token * K + j)[:, None] * widest + row[None, :], mask=inside, other=0)
            inside = (row < rank)[:, None] & (column < d)[None, :]
            rows = tl.load(b + (start + row)[:, None] * d + column[None, :], mask=inside, other=0)
            acc = _dot(part.to(rows.dtype), rows, acc)
        at = token[:, None] * d + column[None, :]
        inside = (m < size)[:, None] & (column < d)[None, :]
        if not FIRST:
            acc += tl.load(partial + at, mask=inside, other=0).to(tl.float32)
        if LAST:
            acc += tl.load(y + at, mask=inside, other=0).to(tl.float32)
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(partial + at, acc.to(partial.dtype.element_ty), mask=inside)
