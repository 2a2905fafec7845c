"""GPTQ's inner loop on a CPU, compiled (numba): some columns of a batch of matrices rounded one after the other, the
error of each passed on to those behind it; kernels/reference_gptq.py has the same in torch.

Rows are independent. A tile of them is held column by column, so that the innermost loops are over rows and vectorize,
the two divisions of a column included. Every operation is rounded by itself, so that the codes are those of torch's
loop.
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.compiled import compiled

ROWS = 64  # of a tile. On an AMD EPYC with AVX-512, 16 took 2.5 times as long and 32 up to 6, 128 as long


def tiles(batch: int, rows: int) -> int:
    """How many tiles a batch of matrices has."""
    return batch * -(-rows // ROWS)


@compiled
def quantize_block(w, scales, group, u, codes, errors, begin, low, high, first, last):  # type: ignore[no-untyped-def]
    """Fill codes (int8 [batch, R, K]) of n columns from `begin`, and their errors [batch, R, n], in the tiles first …
    last − 1.

    w [batch, R, K], scales [batch, R, groups] and u [batch, n, n], upper triangular, are of one dtype, as are low and
    high, the least and the largest code; group [batch, K] is that of each column.
    """
    width = u.shape[1]
    per_matrix = (w.shape[1] + ROWS - 1) // ROWS
    tile, step = np.zeros((width, ROWS), w.dtype), np.ones((width, ROWS), w.dtype)
    code, error = np.zeros((width, ROWS), w.dtype), np.zeros((width, ROWS), w.dtype)
    for number in range(first, last):
        matrix, top = number // per_matrix, number % per_matrix * ROWS
        rows = min(ROWS, w.shape[1] - top)
        for row in range(rows):
            for j in range(width):
                tile[j, row] = w[matrix, top + row, begin + j]
                step[j, row] = scales[matrix, top + row, group[matrix, begin + j]]
        for j in range(width):
            _round(tile[j], step[j], u[matrix, j, j], code[j], error[j], low, high)
            for k in range(j + 1, width):
                _pass_on(error[j], u[matrix, j, k], tile[k])
        for row in range(rows):
            for j in range(width):
                codes[matrix, top + row, begin + j] = np.int8(code[j, row])
                errors[matrix, top + row, j] = error[j, row]


@compiled
def _round(column, step, divisor, code, error, low, high):  # type: ignore[no-untyped-def]
    for row in range(ROWS):
        code[row] = min(max(np.rint(column[row] / step[row]), low), high)
        error[row] = (column[row] - code[row] * step[row]) / divisor


@compiled
def _pass_on(error, factor, column):  # type: ignore[no-untyped-def]
    for row in range(ROWS):
        column[row] -= error[row] * factor
