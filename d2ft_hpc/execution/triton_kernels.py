# mypy: ignore-errors
# ruff: noqa: N803, SIM108
"""The Triton side of `kernels`, which says what each does and calls them."""

import triton
import triton.language as tl


@triton.jit
def _wide(heads, of, UNITS: tl.constexpr):
    """Units of some heads' part, where shares are unequal."""
    return tl.cdiv(heads * tl.cdiv(UNITS, of), 8) * 8


@triton.jit
def _taken(row, heads, chosen, of, OUTER: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Where the row of a taken part comes from: the row of the parameter, and whether a head owns it."""
    if UNITS > 0:
        share, wide = tl.cdiv(UNITS, of), _wide(chosen, of, UNITS)
        outer, unit = row // wide, row % wide
        place = unit // share
        is_head = (outer < OUTER) & (place < chosen)
        head = tl.load(heads + place, mask=is_head, other=0).to(tl.int32)
        unit = head * UNITS // of + unit % share
        is_own = is_head & (unit < (head + 1) * UNITS // of)
        origin = outer * UNITS + unit
    else:
        is_own = row < chosen * OUTER
        if ROWS:
            outer, place = row % OUTER, row // OUTER
        else:
            outer, place = row // chosen, row % chosen
        origin = outer * of + tl.load(heads + place, mask=is_own, other=0).to(tl.int32)
    return origin, is_own


@triton.jit
def _spread(row, places, chosen, of, OUTER: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Where the row of a parameter comes from: the row of the part, and whether the part has it."""
    if UNITS > 0:
        outer, unit = row // UNITS, row % UNITS
        head = ((unit + 1) * of - 1) // UNITS
        inside = outer < OUTER
        place = tl.load(places + head, mask=inside, other=-1).to(tl.int32)
        unit = place * tl.cdiv(UNITS, of) + unit - head * UNITS // of
        origin = outer * _wide(chosen, of, UNITS) + unit
    else:
        outer, head = row // of, row % of
        inside = outer < OUTER
        place = tl.load(places + head, mask=inside, other=-1).to(tl.int32)
        if ROWS:
            origin = place * OUTER + outer
        else:
            origin = outer * chosen + place
    return origin, inside & (place >= 0)


@triton.jit
def _origin(row, index, chosen, of, OUTER: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
            SPREADS: tl.constexpr):  # fmt: skip
    if SPREADS:
        origin, is_own = _spread(row, index, chosen, of, OUTER, ROWS, UNITS)
    else:
        origin, is_own = _taken(row, index, chosen, of, OUTER, ROWS, UNITS)
    return origin, is_own


@triton.jit
def _rows(chosen, of, UNITS: tl.constexpr, IS_PART: tl.constexpr):
    """Heads or units of a part, or of the whole parameter."""
    if UNITS > 0:
        rows = _wide(chosen, of, UNITS) if IS_PART else UNITS
    else:
        rows = chosen if IS_PART else of
    return rows


def tile_of(outer: int, inner: int, rows: bool, block: int) -> tuple[int, int, bool]:
    """Rows and columns of a tile, and whether its rows are [outer] and its columns [head or unit, inner]; else its rows
    are [outer, head or unit] and its columns [inner]."""
    by_column = inner < 128 and outer >= 16 and not rows
    columns = 128 if by_column else min(128, triton.next_power_of_2(inner))
    return block // columns, columns, by_column


_tile = triton.constexpr_function(tile_of)


@triton.jit
def _copy(source, target, index, program, chosen, of, OUTER: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
          UNITS: tl.constexpr, WAY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A tile of the target. Where it comes from is looked up once for each of its rows, or of its columns.

    WAY: of `kernels.Way`."""
    if OUTER > 0:
        spreads: tl.constexpr = WAY > 0
        tile: tl.constexpr = _tile(OUTER, INNER, ROWS, BLOCK)
        width = _rows(chosen, of, UNITS, not spreads) * INNER if tile[2] else INNER
        chunks = tl.cdiv(width, tile[1])
        row = (program // chunks * tile[0] + tl.arange(0, tile[0]))[:, None]
        column = (program % chunks * tile[1] + tl.arange(0, tile[1]))[None, :]
        within = column < width
        if tile[2]:
            origin, is_own = _origin(column // INNER, index, chosen, of, 1, ROWS, UNITS, spreads)
            inside = (row < OUTER) & within
            place = origin * INNER + column % INNER
            if INNER % 8 == 0:  # the copies of 8 numbers lie side by side on both sides
                place = tl.max_contiguous(tl.multiple_of(place, [1, 8]), [1, 8])
                is_own = tl.max_constancy(is_own, [1, 8])
            place += row * _rows(chosen, of, UNITS, spreads) * INNER
        else:
            origin, is_own = _origin(row, index, chosen, of, OUTER, ROWS, UNITS, spreads)
            inside = (row < OUTER * _rows(chosen, of, UNITS, not spreads)) & within
            place = origin * INNER + column
        value = tl.load(source + place, mask=is_own & inside, other=0.0)
        at = target + row * width + column
        if WAY == 2:
            inside = inside & is_own
            value = value.to(target.dtype.element_ty) + tl.load(at, mask=inside, other=0.0)
        tl.store(at, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _programs(chosen, of, OUTER: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
              SPREADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Programs that copy one parameter."""
    if OUTER > 0:
        tile: tl.constexpr = _tile(OUTER, INNER, ROWS, BLOCK)
        rows = _rows(chosen, of, UNITS, not SPREADS)
        if tile[2]:
            programs = tl.cdiv(OUTER, tile[0]) * tl.cdiv(rows * INNER, tile[1])
        else:
            programs = tl.cdiv(OUTER * rows, tile[0]) * tl.cdiv(INNER, tile[1])
    else:
        programs = 0
    return programs


@triton.jit
def copy_heads(
    source0, target0, source1, target1, source2, target2, source3, target3,
    source4, target4, source5, target5, index, chosen, of,
    OUTER0: tl.constexpr, INNER0: tl.constexpr, ROWS0: tl.constexpr, UNITS0: tl.constexpr,
    OUTER1: tl.constexpr, INNER1: tl.constexpr, ROWS1: tl.constexpr, UNITS1: tl.constexpr,
    OUTER2: tl.constexpr, INNER2: tl.constexpr, ROWS2: tl.constexpr, UNITS2: tl.constexpr,
    OUTER3: tl.constexpr, INNER3: tl.constexpr, ROWS3: tl.constexpr, UNITS3: tl.constexpr,
    OUTER4: tl.constexpr, INNER4: tl.constexpr, ROWS4: tl.constexpr, UNITS4: tl.constexpr,
    OUTER5: tl.constexpr, INNER5: tl.constexpr, ROWS5: tl.constexpr, UNITS5: tl.constexpr,
    WAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spreads: tl.constexpr = WAY > 0
    program = tl.program_id(0)
    end0 = _programs(chosen, of, OUTER0, INNER0, ROWS0, UNITS0, spreads, BLOCK)
    end1 = end0 + _programs(chosen, of, OUTER1, INNER1, ROWS1, UNITS1, spreads, BLOCK)
    end2 = end1 + _programs(chosen, of, OUTER2, INNER2, ROWS2, UNITS2, spreads, BLOCK)
    end3 = end2 + _programs(chosen, of, OUTER3, INNER3, ROWS3, UNITS3, spreads, BLOCK)
    end4 = end3 + _programs(chosen, of, OUTER4, INNER4, ROWS4, UNITS4, spreads, BLOCK)
    if program < end0:
        _copy(source0, target0, index, program, chosen, of, OUTER0, INNER0, ROWS0, UNITS0, WAY, BLOCK)
    elif program < end1:
        _copy(source1, target1, index, program - end0, chosen, of, OUTER1, INNER1, ROWS1, UNITS1, WAY, BLOCK)
    elif program < end2:
        _copy(source2, target2, index, program - end1, chosen, of, OUTER2, INNER2, ROWS2, UNITS2, WAY, BLOCK)
    elif program < end3:
        _copy(source3, target3, index, program - end2, chosen, of, OUTER3, INNER3, ROWS3, UNITS3, WAY, BLOCK)
    elif program < end4:
        _copy(source4, target4, index, program - end3, chosen, of, OUTER4, INNER4, ROWS4, UNITS4, WAY, BLOCK)
    else:
        _copy(source5, target5, index, program - end4, chosen, of, OUTER5, INNER5, ROWS5, UNITS5, WAY, BLOCK)


@triton.jit
def add_norm(
    x, branch, bias, scale, total, normed, mean, rstd, weight, shift, tokens, channels, epsilon,
    ADDS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, NORMS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    is_channel = column < channels
    inside = (row < tokens)[:, None] & is_channel[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            added += tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        if HAS_SCALE:
            added *= tl.load(scale + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        value += added
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if NORMS:
        centre = tl.sum(value, 1) / channels
        off = tl.where(inside, value - centre[:, None], 0.0)
        inverse = 1 / tl.sqrt(tl.sum(off * off, 1) / channels + epsilon)
        tl.store(mean + row, centre, mask=row < tokens)
        tl.store(rstd + row, inverse, mask=row < tokens)
        result = (
            off
            * inverse[:, None]
            * tl.load(weight + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        )
        result += tl.load(shift + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    gradient, x, residual, result, mean, rstd, weight, partial, tokens, channels, rows,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    is_channel = column < channels
    weights = tl.load(weight + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((TILE, BLOCK), tl.float32)
    of_shift = tl.zeros((TILE, BLOCK), tl.float32)
    of_result = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(program * rows, tl.minimum((program + 1) * rows, tokens), TILE):
        row = start + tl.arange(0, TILE)
        is_row = row < tl.minimum((program + 1) * rows, tokens)
        inside = is_row[:, None] & is_channel[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=is_row, other=0.0)[:, None]
        centre = tl.load(mean + row, mask=is_row, other=0.0)[:, None]
        normal = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre) * inverse
        normal = tl.where(inside, normal, 0.0)
        of_weight += g * normal
        of_shift += g
        g *= weights
        along = tl.sum(g * normal, 1)[:, None] / channels
        middle = tl.sum(g, 1)[:, None] / channels
        total = (g - middle - normal * along) * inverse + tl.load(residual + at, mask=inside, other=0.0).to(
            tl.float32
        )
        rounded = total.to(result.dtype.element_ty)
        tl.store(result + at, rounded, mask=inside)
        of_result += tl.where(inside, rounded.to(tl.float32), 0.0)
    at = partial + program * 3 * channels + column
    tl.store(at, tl.sum(of_weight, 0), mask=is_channel)
    tl.store(at + channels, tl.sum(of_shift, 0), mask=is_channel)
    tl.store(at + 2 * channels, tl.sum(of_result, 0), mask=is_channel)


@triton.jit
def branch_backward(
    gradient, branch, bias, scale, result, partial, tokens, channels, rows,
    WRITES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(1)
    is_channel = column < channels
    of_bias = tl.zeros((TILE, BLOCK), tl.float32)
    of_scale = tl.zeros((TILE, BLOCK), tl.float32)
    scales = 1.0
    if HAS_SCALE:
        scales = tl.load(scale + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for start in range(program * rows, tl.minimum((program + 1) * rows, tokens), TILE):
        row = start + tl.arange(0, TILE)
        inside = (row < tl.minimum((program + 1) * rows, tokens))[:, None] & is_channel[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            value = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                value += tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            of_scale += g * value
            g *= scales
        of_bias += g
        if WRITES:
            tl.store(result + at, g.to(result.dtype.element_ty), mask=inside)
    at = partial + program * 2 * channels + column
    tl.store(at, tl.sum(of_bias, 0), mask=is_channel)
    tl.store(at + channels, tl.sum(of_scale, 0), mask=is_channel)


@triton.jit
def gelu_join(first, second, joined, tokens, width1, width2, TILE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at_row = row.to(tl.int64)[:, None]
    of_first = tl.cdiv(width1, BLOCK)
    if program < of_first:
        column = program * BLOCK + tl.arange(0, BLOCK)
        inside = (row < tokens)[:, None] & (column < width1)[None, :]
        value = tl.load(first + at_row * width1 + column[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        column = (program - of_first) * BLOCK + tl.arange(0, BLOCK)
        inside = (row < tokens)[:, None] & (column < width2)[None, :]
        value = tl.load(second + at_row * width2 + column[None, :], mask=inside, other=0.0).to(tl.float32)
        column += width1
    value *= 0.5 * (1 + tl.math.erf(value * 0.7071067811865476))
    at = joined + at_row * (width1 + width2) + column[None, :]
    tl.store(at, value.to(joined.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    gradient,
    hidden,
    of_hidden,
    activated,
    partial,
    tokens,
    width,
    rows,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(1)
    is_column = column < width
    of_bias = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(program * rows, tl.minimum((program + 1) * rows, tokens), TILE):
        row = start + tl.arange(0, TILE)
        inside = (row < tl.minimum((program + 1) * rows, tokens))[:, None] & is_column[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 * (1 + tl.math.erf(value * 0.7071067811865476))
        g *= below + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
        tl.store(of_hidden + at, g.to(of_hidden.dtype.element_ty), mask=inside)
        tl.store(activated + at, (value * below).to(activated.dtype.element_ty), mask=inside)
        of_bias += g
    tl.store(partial + program * width + column, tl.sum(of_bias, 0), mask=is_column)


@triton.jit
def join_heads(
    first, second, joined, tokens, samples_tokens, width1, width2,
    sample1, token1, sample2, token2,
    HEAD1: tl.constexpr, HEAD2: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    sample, token = (row // tokens).to(tl.int64), row % tokens
    is_row, is_first = row < samples_tokens, column < width1
    at = first + sample * sample1 + token * token1 + column // SIZE * HEAD1 + column % SIZE
    value = tl.load(at, mask=is_row & is_first, other=0.0)
    beyond = column - width1
    at = second + sample * sample2 + token * token2 + beyond // SIZE * HEAD2 + beyond % SIZE
    other = tl.load(at, mask=is_row & (beyond >= 0) & (beyond < width2), other=0.0)
    at = joined + row.to(tl.int64) * (width1 + width2) + column
    tl.store(at, tl.where(is_first, value, other), mask=is_row & (beyond < width2))


@triton.jit
def join_qkv(
    query, key, value, joined, partial, tokens, samples_tokens, width, rows,
    sample0, token0, sample1, token1, sample2, token2,
    HEAD0: tl.constexpr, HEAD1: tl.constexpr, HEAD2: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    program = tl.program_id(1)
    head, which, channel = column // (3 * SIZE), column // SIZE % 3, column % SIZE
    is_column = column < width
    of_bias = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(program * rows, tl.minimum((program + 1) * rows, samples_tokens), TILE):
        row = (start + tl.arange(0, TILE))[:, None]
        sample, token = (row // tokens).to(tl.int64), row % tokens
        inside = (row < tl.minimum((program + 1) * rows, samples_tokens)) & is_column
        at = sample * sample0 + head * HEAD0 + token * token0 + channel
        g = tl.load(query + at, mask=inside & (which == 0), other=0.0).to(tl.float32)
        at = sample * sample1 + head * HEAD1 + token * token1 + channel
        g += tl.load(key + at, mask=inside & (which == 1), other=0.0).to(tl.float32)
        at = sample * sample2 + head * HEAD2 + token * token2 + channel
        g += tl.load(value + at, mask=inside & (which == 2), other=0.0).to(tl.float32)
        tl.store(joined + row.to(tl.int64) * width + column, g.to(joined.dtype.element_ty), mask=inside)
        of_bias += g
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + program * width + column, tl.sum(of_bias, 0), mask=column < width)


@triton.jit
def _sum(partial, result, program, rows, width, TILE: tl.constexpr, BLOCK: tl.constexpr):
    column = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, rows, TILE):
        row = start + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(partial + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(result + column, tl.sum(total, 0).to(result.dtype.element_ty), mask=column < width)


@triton.jit
def sum_rows(
    partial0, result0, partial1, result1, partial2, result2, partial3, result3,
    rows0, width0, rows1, width1, rows2, width2, rows3, width3, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    end0 = tl.cdiv(width0, BLOCK)
    end1 = end0 + tl.cdiv(width1, BLOCK)
    end2 = end1 + tl.cdiv(width2, BLOCK)
    if program < end0:
        _sum(partial0, result0, program, rows0, width0, TILE, BLOCK)
    elif program < end1:
        _sum(partial1, result1, program - end0, rows1, width1, TILE, BLOCK)
    elif program < end2:
        _sum(partial2, result2, program - end1, rows2, width2, TILE, BLOCK)
    else:
        _sum(partial3, result3, program - end2, rows3, width3, TILE, BLOCK)
