"""How large the chunks of logits are, the rule behind ``logits_budget_mib="auto"``, and what a head takes in memory.

Several chunks of tokens sum the weight's gradient in fp32: 8 V H bytes of memory traffic per chunk, and a slower GEMM.
Larger chunks save some of that, and a single one all of it. So where the weight gets a gradient, "auto" gives logits
and sum up to half of the memory that is free when the head runs, and never less than 512 MiB for the logits. Where the
weight gets none, larger chunks would not be faster, and 512 MiB stay.

Free is what the device can still give to this process, plus what the caching allocator could give back to the device.
Free parts of blocks in use do not count, because a large block needs a whole one. The gradients that the head is about
to make are taken off. Backward of the layers needs nothing more at that time: the logits are freed before it starts,
and it finds their memory in the allocator. The other half of the free memory is the margin, for other processes and
libraries, and for blocks that the allocator cannot use again for other sizes.
"""

from typing import NamedTuple

import torch

from ..runtime.launch import cdiv
from .gradients import bytes_over_gradient
from .options import MemoryOptions, sum_dtype

ROW_ALIGNMENT = 16  # elements: rows of the logits buffer are 32-byte aligned for every vocabulary
CHUNK_ALIGNMENT = 128  # tokens: a GEMM tile
# Many large chunks are multiples of this: GEMMs of 1408 or 1664 tokens take 5 to 10 % longer per token than those of
# 1536 (benchmarks/NOTES.md), which costs more than a last chunk of another size.
LARGE_CHUNK_ALIGNMENT, MANY_CHUNKS = 512, 4
COLUMN_ALIGNMENT = 256  # columns: a GEMM tile
FREE_SHARE = 0.5  # of the free memory


def logits_width(columns: int) -> int:
    """Columns of a buffer for ``columns`` logits per row."""
    return cdiv(columns, ROW_ALIGNMENT) * ROW_ALIGNMENT


def equal_parts(total: int, limit: int, unit: int) -> int:
    """The size of as few equal parts of ``total`` as possible, each a multiple of ``unit`` and at most ``limit``."""
    if limit >= total:
        return total
    limit -= limit % unit
    return min(limit, cdiv(cdiv(total, cdiv(total, limit)), unit) * unit)


def rows_per_chunk(num_rows: int, vocab_size: int, itemsize: int, budget_mib: float) -> int:
    """Tokens whose logits fit in ``budget_mib``, in about equal chunks of sizes at which GEMMs are fast."""
    limit = max(1, int(budget_mib * 2**20) // (logits_width(vocab_size) * itemsize))
    if limit >= 2 * LARGE_CHUNK_ALIGNMENT and num_rows > MANY_CHUNKS * limit:
        return equal_parts(num_rows, limit, LARGE_CHUNK_ALIGNMENT)
    return equal_parts(num_rows, limit, CHUNK_ALIGNMENT if limit >= CHUNK_ALIGNMENT else 1)


def columns_per_chunk(num_rows: int, vocab_size: int, itemsize: int, budget_mib: float) -> int:
    """Columns whose logits fit in ``budget_mib``, in equal chunks of whole GEMM tiles where the budget holds one."""
    limit = int(budget_mib * 2**20) // (max(num_rows, 1) * itemsize)
    unit = COLUMN_ALIGNMENT if limit >= COLUMN_ALIGNMENT else ROW_ALIGNMENT
    return equal_parts(vocab_size, max(limit, unit), unit)


def lent_chunks(num_chunks: int, logits: int, gradient: int, total: int) -> tuple[int, int]:
    """How many vocabulary chunks' logits fit in the weight's gradient until it is written, and their first byte.

    The gradient is written chunk by chunk, each from its logits. Logits of chunk j lie ``j * logits`` bytes after the
    start, so that what is written for chunk j lies before them. The last chunk needs no place: it stays in the buffer.

    Args:
        num_chunks: chunks in all.
        logits: bytes of a chunk's logits.
        gradient: bytes of a chunk's part of the gradient.
        total: bytes of the gradient.
    """
    for lent in range(num_chunks - 1, 0, -1):
        start = max(gradient, lent * gradient - (lent - 1) * logits)
        if start + lent * logits <= total:
            return lent, start
    return 0, 0


class ChunkBytes(NamedTuple):
    """Bytes that token chunks take where the weight gets a gradient.

    Args:
        row: logits of a token, and its hidden state where that is a copy.
        row_copy: the gradient of that hidden state where it is a copy, which is freed before the weight's is made.
        weight_sum: the fp32 sum of the weight's gradient, over the gradient itself; a single chunk needs none.
        gradients: the gradients of hidden and weight.
    """

    row: int
    row_copy: int
    weight_sum: int
    gradients: int


def rows_with_weight(
    num_rows: int, vocab_size: int, itemsize: int, taken: ChunkBytes, memory: MemoryOptions, device: torch.device
) -> int:
    """Tokens per chunk where the weight gets a gradient.

    All tokens are one chunk if that takes no more memory than a chunk of the budget plus the sum. With "auto", chunks
    grow further while memory is free.
    """
    size = rows_per_chunk(num_rows, vocab_size, itemsize, memory.buffer_mib)
    at_once = num_rows * taken.row
    if at_once <= size * (taken.row + taken.row_copy) + taken.weight_sum:
        return num_rows
    if not uses_free_memory(memory, device):
        return size
    spare = int((free_bytes(device) - taken.gradients) * FREE_SHARE)
    if at_once <= spare:
        return num_rows
    return max(size, rows_per_chunk(num_rows, vocab_size, itemsize, (spare - taken.weight_sum) / 2**20))


def uses_free_memory(memory: MemoryOptions, device: torch.device) -> bool:
    """Whether chunks may grow with the free memory: with "auto" on CUDA, unless results must be bit-reproducible."""
    adapts = memory.logits_budget_mib == "auto" and not memory.low_memory
    return adapts and device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def free_bytes(device: torch.device) -> int:
    """Bytes that the caching allocator of a CUDA device can still hand out in large blocks. Waits for no kernel."""
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, active, split = (
        stats[f"{name}_bytes"]["all"]["current"] for name in ("reserved", "active", "inactive_split")
    )
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free, allowed - reserved) + reserved - active - split


def head_bytes(
    num_tokens: int, vocab_size: int, width: int, dtype: torch.dtype, memory: MemoryOptions, trained: bool = True
) -> int:
    """Bytes that a fused loss takes at its peak over its inputs, the gradients of hidden and weight included.

    With "auto" this is the least: more is taken only from memory that is free then.

    Args:
        num_tokens: tokens with a label.
        vocab_size: V.
        width: H.
        dtype: of hidden, weight and GEMMs.
        memory: the op's options.
        trained: whether the weight gets a gradient.
    """
    hidden, weight = num_tokens * width * dtype.itemsize, vocab_size * width * dtype.itemsize
    if trained and memory.low_memory:
        mib = memory.vocab_chunk_mib(num_tokens, dtype.itemsize)
        columns = columns_per_chunk(num_tokens, vocab_size, dtype.itemsize, mib)
        return weight + num_tokens * (columns * dtype.itemsize + width * sum_dtype(dtype).itemsize)
    row = logits_width(vocab_size) * dtype.itemsize
    if not trained:
        return hidden + row * rows_per_chunk(num_tokens, vocab_size, dtype.itemsize, memory.buffer_mib)
    taken = ChunkBytes(row, 0, bytes_over_gradient(vocab_size, width, dtype), hidden + weight)
    size = rows_with_weight(num_tokens, vocab_size, dtype.itemsize, taken, memory, torch.device("cpu"))
    return taken.gradients + size * row + (taken.weight_sum if size < num_tokens else 0)
