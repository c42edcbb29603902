"""Triton kernels that pass over memory once where PyTorch's operations pass several times. `performance.fused` calls them.

All compute in float32 and round once. Sizes are arguments, not constants, and few of them are specialised: a kernel is compiled
once per dtype, not per shape, and kept in Triton's cache (~/.triton/cache). With TRITON_INTERPRET=1 they run on the CPU.
"""

import triton
import triton.language as tl

of_any_size = triton.jit(do_not_specialize=["pixels", "size", "chunks", "width", "rows", "splits"])

# The gated feed-forward: hg [rows, 2·width] -> h · gelu(g), with the exact gelu(g) = g · Φ(g).


@triton.jit
def gate_forward(hg, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(hg + row * 2 * width + column, inside, 0).to(tl.float32)
    g = tl.load(hg + row * 2 * width + width + column, inside, 0).to(tl.float32)
    tl.store(out + row * width + column, h * g * 0.5 * (1 + tl.erf(g * 0.7071067811865476)), inside)


@triton.jit
def gate_backward(grad, hg, grad_hg, out, width, WITH_OUT: tl.constexpr, BLOCK: tl.constexpr):
    """`out`, what the forward pass made, is written again if WITH_OUT."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    d = tl.load(grad + row * width + column, inside, 0).to(tl.float32)
    h = tl.load(hg + row * 2 * width + column, inside, 0).to(tl.float32)
    g = tl.load(hg + row * 2 * width + width + column, inside, 0).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(grad_hg + row * 2 * width + column, d * g * cdf, inside)
    tl.store(grad_hg + row * 2 * width + width + column, d * h * (cdf + g * density), inside)
    if WITH_OUT:
        tl.store(out + row * width + column, h * g * cdf, inside)


# Layer norm: y = w · x̂ + b with x̂ = (x - mean) / deviation of each row. Mean and deviation are computed again where needed.


@triton.jit
def normalised(x, inside, width, eps):
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * rstd, rstd


@triton.jit
def layer_norm_forward(x, w, b, y, width, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0).to(tl.int64) * width + column, column < width
    x_hat, _ = normalised(tl.load(x + at, inside, 0).to(tl.float32), inside, width, eps)
    w_row, b_row = tl.load(w + column, inside, 0).to(tl.float32), tl.load(b + column, inside, 0).to(tl.float32)
    tl.store(y + at, x_hat * w_row + b_row, inside)


@triton.jit
def layer_norm_backward(grad_y, grad_x, x, w, b, y, result, width, eps, WITH_Y: tl.constexpr, BLOCK: tl.constexpr):
    """`result` = the gradient of x by the norm + `grad_x`, what it got elsewhere. `y`, made again, is written if WITH_Y."""
    column = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0).to(tl.int64) * width + column, column < width
    x_hat, rstd = normalised(tl.load(x + at, inside, 0).to(tl.float32), inside, width, eps)
    w_row = tl.load(w + column, inside, 0).to(tl.float32)
    if WITH_Y:
        tl.store(y + at, x_hat * w_row + tl.load(b + column, inside, 0).to(tl.float32), inside)
    d = tl.load(grad_y + at, inside, 0).to(tl.float32) * w_row
    along = tl.sum(d * x_hat, 0) / width
    d = (d - tl.sum(d, 0) / width - x_hat * along) * rstd
    tl.store(result + at, d + tl.load(grad_x + at, inside, 0).to(tl.float32), inside)


# Group norm, with SiLU if SILU, of NHWC: x [batch, pixels, channels]. Its statistics are of pixels × channels / groups values.
# A program sums over a chunk of `size` pixels of one image for BLOCK channels; then one per image and group adds these up.


@triton.jit
def silu(z):
    return z / (1 + tl.exp(-z))


@of_any_size
def channel_statistics(x, means, squares, pixels, channels, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and sum of squared differences from it, of each channel in each chunk: [batch, chunks, channels] float32."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row, wide = tl.arange(0, ROWS), channel < channels
    first, count = chunk * size, tl.minimum(size, pixels - chunk * size)
    start = x + (image * pixels + first) * channels + channel[None, :]
    shift = tl.load(start, wide[None, :], 0).to(tl.float32)  # of the first pixel: so that large means cost no precision
    total, square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, ROWS):
        inside = (begin + row < count)[:, None] & wide[None, :]
        value = tl.load(start + (begin + row)[:, None] * channels, inside, 0).to(tl.float32)
        value = tl.where(inside, value - shift, 0)
        total += tl.sum(value, 0)
        square += tl.sum(value * value, 0)
    at = (image * tl.num_programs(1) + chunk) * channels + channel
    tl.store(means + at, tl.sum(shift, 0) + total / count, wide)
    tl.store(squares + at, square - total * total / count, wide)


@of_any_size
def group_statistics(
    means, squares, statistics, pixels, channels, chunks, width, eps, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each group of `width` channels: mean and 1 / deviation, [batch, groups, 2] float32 (Chan et al. 1979 for the sums)."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    start = image * chunks * channels + group * width + column[None, :]
    total, values = 0.0, pixels * width
    for begin in range(0, chunks, ROWS):
        chunk = begin + row
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        count = tl.minimum(size, pixels - chunk * size).to(tl.float32)[:, None]
        total += tl.sum(
            tl.sum(tl.load(means + start + chunk[:, None] * channels, inside, 0) * tl.where(inside, count, 0), 1), 0
        )
    mean, variance = total / values, 0.0
    for begin in range(0, chunks, ROWS):
        chunk = begin + row
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        count = tl.minimum(size, pixels - chunk * size).to(tl.float32)[:, None]
        away = tl.load(means + start + chunk[:, None] * channels, inside, 0) - mean
        within = tl.load(squares + start + chunk[:, None] * channels, inside, 0)
        variance += tl.sum(tl.sum(tl.where(inside, within + away * away * count, 0), 1), 0)
    at = (image * tl.num_programs(1) + group) * 2
    tl.store(statistics + at, mean)
    tl.store(statistics + at + 1, 1 / tl.sqrt(variance / values + eps))


@of_any_size
def group_norm_forward(
    x, w, b, statistics, y, pixels, channels, width, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    image, channel = tl.program_id(0).to(tl.int64), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row, wide = tl.program_id(1) * ROWS + tl.arange(0, ROWS), channel < channels
    of_group = statistics + (image * (channels // width) + channel // width) * 2
    rstd = tl.load(of_group + 1, wide, 0)
    scale = rstd * tl.load(w + channel, wide, 0).to(tl.float32)
    offset = tl.load(b + channel, wide, 0).to(tl.float32) - tl.load(of_group, wide, 0) * scale
    at, inside = (image * pixels + row[:, None]) * channels + channel[None, :], (row < pixels)[:, None] & wide[None, :]
    z = tl.load(x + at, inside, 0).to(tl.float32) * scale[None, :] + offset[None, :]
    tl.store(y + at, silu(z) if SILU else z, inside)


@triton.jit
def through_silu(grad, x_hat, w, b, SILU: tl.constexpr):
    """The gradient of y = silu(w·x̂ + b), times w."""
    if SILU:
        z = x_hat * w + b
        sigmoid = 1 / (1 + tl.exp(-z))
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    return grad * w


@of_any_size
def channel_gradients(
    grad, x, w, b, statistics, sums, alongs, pixels, channels, width, size, SILU: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels of a chunk, [batch, chunks, channels] float32: of d, the gradient of x̂, and of d·x̂."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    wide = channel < channels
    of_group = statistics + (image * (channels // width) + channel // width) * 2
    mean, rstd = tl.load(of_group, wide, 0)[None, :], tl.load(of_group + 1, wide, 0)[None, :]
    w_row, b_row = tl.load(w + channel, wide, 0).to(tl.float32)[None, :], tl.load(b + channel, wide, 0).to(tl.float32)[None, :]
    total, along = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, ROWS):
        row = chunk * size + begin + tl.arange(0, ROWS)
        inside = (row < pixels)[:, None] & wide[None, :]
        at = (image * pixels + row[:, None]) * channels + channel[None, :]
        x_hat = (tl.load(x + at, inside, 0).to(tl.float32) - mean) * rstd
        d = through_silu(tl.load(grad + at, inside, 0).to(tl.float32), x_hat, w_row, b_row, SILU)
        total += tl.sum(d, 0)
        along += tl.sum(d * x_hat, 0)
    at = (image * tl.num_programs(1) + chunk) * channels + channel
    tl.store(sums + at, total, wide)
    tl.store(alongs + at, along, wide)


@of_any_size
def group_gradients(sums, alongs, means, pixels, channels, chunks, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The means over each group of d and d·x̂: [batch, groups, 2] float32."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    start = image * chunks * channels + group * width + column[None, :]
    total, along = 0.0, 0.0
    for begin in range(0, chunks, ROWS):
        inside = (begin + row < chunks)[:, None] & (column < width)[None, :]
        at = start + (begin + row)[:, None] * channels
        total += tl.sum(tl.sum(tl.load(sums + at, inside, 0), 1), 0)
        along += tl.sum(tl.sum(tl.load(alongs + at, inside, 0), 1), 0)
    at = (image * tl.num_programs(1) + group) * 2
    tl.store(means + at, total / (pixels * width))
    tl.store(means + at + 1, along / (pixels * width))


@of_any_size
def group_norm_backward(
    grad, x, w, b, statistics, means, grad_x, result, pixels, channels, width, SILU: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`result` = the gradient of x by the norm, + `grad_x`, what it got elsewhere, if ADD."""
    image, channel = tl.program_id(0).to(tl.int64), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row, wide = tl.program_id(1) * ROWS + tl.arange(0, ROWS), channel < channels
    group = (image * (channels // width) + channel // width) * 2
    mean, rstd = tl.load(statistics + group, wide, 0)[None, :], tl.load(statistics + group + 1, wide, 0)[None, :]
    average, along = tl.load(means + group, wide, 0)[None, :], tl.load(means + group + 1, wide, 0)[None, :]
    w_row, b_row = tl.load(w + channel, wide, 0).to(tl.float32)[None, :], tl.load(b + channel, wide, 0).to(tl.float32)[None, :]
    at, inside = (image * pixels + row[:, None]) * channels + channel[None, :], (row < pixels)[:, None] & wide[None, :]
    x_hat = (tl.load(x + at, inside, 0).to(tl.float32) - mean) * rstd
    d = through_silu(tl.load(grad + at, inside, 0).to(tl.float32), x_hat, w_row, b_row, SILU)
    d = (d - average - x_hat * along) * rstd
    if ADD:
        d += tl.load(grad_x + at, inside, 0).to(tl.float32)
    tl.store(result + at, d, inside)


# The gradient of a low-rank factor: leftᵀ·right, summed over thousands of rows into a few thousand numbers. cuBLAS has too few
# blocks for that shape. Here SPLITS programs sum a part of the rows each, and a second kernel adds these up in a fixed order.


@of_any_size
def tall_product(
    left, right, parts, rows, rank, width, left_stride, right_stride, left_band, right_band, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [splits, bands, rank, width] float32. left [rows, rank], right [rows, width] of each band."""
    column, split, band = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, RANK)
    splits, wide, low = tl.num_programs(1), column < width, r < rank
    per_split = tl.cdiv(tl.cdiv(rows, ROWS), splits) * ROWS
    total = tl.zeros((RANK, BLOCK), tl.float32)
    for begin in range(split * per_split, tl.minimum(rows, (split + 1) * per_split), ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        thin = tl.load(
            left + band * left_band + row[None, :] * left_stride + r[:, None], (row < rows)[None, :] & low[:, None], 0
        )
        at = right + band * right_band + row[:, None] * right_stride + column[None, :]
        total += tl.dot(thin, tl.load(at, (row < rows)[:, None] & wide[None, :], 0), input_precision="ieee")
    at = ((split * tl.num_programs(2) + band) * rank + r[:, None]) * width + column[None, :]
    tl.store(parts + at, total, low[:, None] & wide[None, :])


@of_any_size
def add_parts(
    parts,
    result,
    splits,
    rank,
    width,
    scale,
    band_stride,
    rank_stride,
    column_stride,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result [bands, rank, width] float32, of any strides, += scale · the sum of parts [splits, bands, rank, width]."""
    at, band = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    split = tl.arange(0, SPLITS).to(tl.int64)
    inside = at < rank * width
    start = parts + (split[:, None] * tl.num_programs(1) + band) * rank * width
    values = tl.load(start + at[None, :], (split < splits)[:, None] & inside[None, :], 0)
    to = result + band * band_stride + (at // width) * rank_stride + (at % width) * column_stride
    tl.store(to, tl.load(to, inside, 0) + scale * tl.sum(values, 0), inside)
