"""The parts of the vocabulary projection by themselves: sizes of chunks and slabs, and the weight's fp32 sum."""

import pytest
import torch
from liger_trainer.kernels.linear_loss.token_chunks import rows_per_chunk
from liger_trainer.kernels.linear_loss.vocab_chunks import columns_per_slab
from liger_trainer.kernels.linear_loss.weight_sum import WeightSum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("rows", "vocab_size", "mib", "expected"),
    [
        (8192, 128256, 256, 1024),
        (8192, 128256, 512, 2048),
        (8184, 128256, 512, 2048),
        (8192, 256000, 512, 1024),
        (1500, 128256, 256, 768),
        (16384, 151936, 512, 1536),
        (100, 128256, 256, 100),
    ],
)
def test_chunks_are_whole_gemm_tiles_of_equal_size(rows, vocab_size, mib, expected):
    assert rows_per_chunk(rows, vocab_size, 2, mib) == expected


@pytest.mark.parametrize(
    ("rows", "vocab_size", "mib", "expected"),
    [
        (8192, 128256, 64, 4096),
        (8192, 128256, 512, 32256),
        (32768, 128256, 64, 1024),
        (8192, 128256, 4096, 128256),
        (2**20, 128256, 64, 32),
        (2**24, 128256, 64, 16),
        (0, 128256, 64, 128256),
    ],
)
def test_slabs_are_whole_gemm_tiles_of_equal_size(rows, vocab_size, mib, expected):
    assert columns_per_slab(rows, vocab_size, 2, mib) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab_size", [5, 37, 9001])
def test_weight_sum_is_the_fp32_sum_rounded_once(vocab_size, dtype):
    gen = torch.Generator().manual_seed(0)
    chunks = [
        (torch.randn(n, vocab_size, generator=gen).to(DEVICE), torch.randn(n, 6, generator=gen).to(DEVICE))
        for n in (7, 7, 3)
    ]
    total = WeightSum(torch.empty(vocab_size, 6, device=DEVICE), dtype)
    for dlogits, x in chunks:
        total.add(dlogits, x)
    out = total.finish()
    expected = sum(dlogits.double().t() @ x.double() for dlogits, x in chunks)
    assert out.dtype == dtype
    assert out.untyped_storage().nbytes() == out.numel() * dtype.itemsize
    # half a unit in the last place of the result, and the roundings of an fp32 sum
    limit = expected.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-5
    assert ((out.double() - expected).abs() <= limit).all()
