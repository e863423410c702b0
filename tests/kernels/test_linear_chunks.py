"""The parts of the vocabulary projection by themselves: sizes of chunks, and the weight's fp32 sum.

Whatever the budget, all tokens are one chunk if that takes no more memory than several chunks and their sum.
"""

import pytest
import torch
from linear_inputs import DEVICE, budget, make_inputs, run
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import reference
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear_logprobs import Speculation, linear_logprobs
from liger_trainer.kernels.linear_loss import chunk_sizes, token_chunks
from liger_trainer.kernels.linear_loss.chunk_sizes import (
    columns_per_chunk,
    head_bytes,
    lent_chunks,
    rows_per_chunk,
)
from liger_trainer.kernels.linear_loss.gradients import WeightSum
from liger_trainer.kernels.linear_loss.options import (
    MEMORY_FIELDS,
    NO_STATS,
    HeadOptions,
    LogitTransform,
    MemoryKeywords,
    MemoryOptions,
)
from liger_trainer.kernels.linear_loss.token_chunks import TokenChunks, ValidRows
from liger_trainer.kernels.linear_loss.vocab_chunks import VocabChunks


def test_memory_options_and_their_keywords_agree():
    assert MemoryKeywords.__annotations__ == MemoryOptions.__annotations__
    assert tuple(MemoryKeywords.__annotations__) == MEMORY_FIELDS
    for options in (MemoryOptions(), MemoryOptions(64, True)):
        assert MemoryOptions.from_numbers(*options.as_numbers) == options


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
def test_token_chunks_are_whole_gemm_tiles_of_equal_size(rows, vocab_size, mib, expected):
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
def test_vocab_chunks_are_whole_gemm_tiles_of_equal_size(rows, vocab_size, mib, expected):
    assert columns_per_chunk(rows, vocab_size, 2, mib) == expected


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


def test_low_memory_takes_64_to_256_mib_for_some_8192_columns():
    low = MemoryOptions(low_memory=True)
    assert [low.vocab_chunk_mib(rows, 2) for rows in (0, 4096, 8192, 16384, 32768)] == [64, 64, 128, 256, 256]
    assert MemoryOptions(100, True).vocab_chunk_mib(16384, 2) == 100
    assert MemoryOptions().vocab_chunk_mib(16384, 2) == 512


@pytest.mark.parametrize(
    ("count", "gathered", "dtype", "expected"),
    [
        (6144, False, torch.bfloat16, 6144),
        (6145, False, torch.bfloat16, 1664),
        (6080, True, torch.bfloat16, 6080),
        (6081, True, torch.bfloat16, 2048),
        (6017, False, torch.float32, 6017),  # under autocast
        (6018, False, torch.float32, 2048),
        (6143, True, torch.float32, 6143),
        (6145, True, torch.float32, 1664),
        (8192, False, torch.bfloat16, 2048),
    ],
)
def test_sizes_at_the_head_of_llama_3_8b(count, gathered, dtype, expected):
    """The sum takes what the logits of 4096 tokens take, beside a chunk of 2048; gathered or cast rows are copies."""
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    hidden = torch.empty(8192, 4096, dtype=dtype, device="meta")
    labels = torch.empty(count, dtype=torch.int64, device="meta")
    rows = ValidRows(labels, labels if gathered else None, 8192)
    wanted = (True, True, False)
    options = HeadOptions(LogitTransform(1.0, 1.0, False), -100, torch.bfloat16, wanted, MemoryOptions(), NO_STATS)
    assert TokenChunks((hidden, weight, None), rows, options, wanted).size == expected


GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """A made-up CUDA device; its numbers, in GiB, can be changed."""
    gib = {"total": 80.0, "free": 70.0, "reserved": 8.0, "active": 5.0, "inactive_split": 1.0, "fraction": 1.0}
    stats = ("reserved", "active", "inactive_split")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib["free"] * GIB), int(gib["total"] * GIB)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: gib["fraction"])
    monkeypatch.setattr(
        torch.cuda,
        "memory_stats_as_nested_dict",
        lambda device: {f"{name}_bytes": {"all": {"current": int(gib[name] * GIB)}} for name in stats},
    )
    torch.use_deterministic_algorithms(False)
    yield gib
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in all tests


def test_free_memory_is_what_the_device_and_whole_blocks_of_the_allocator_have(card):
    cuda = torch.device("cuda", 0)
    assert chunk_sizes.free_bytes(cuda) == 72 * GIB
    card["fraction"] = 0.5  # of 80 GiB, 8 of which are reserved
    assert chunk_sizes.free_bytes(cuda) == 34 * GIB


class OnCuda:
    """A parameter's size, dtype and device, of a device that is not there."""

    device = torch.device("cuda", 0)

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype = torch.Size(shape), dtype

    def numel(self):
        return self.shape.numel()

    def to(self, dtype):
        return OnCuda(*self.shape, dtype=dtype)


def size_on_cuda(monkeypatch, tokens=16384, vocab=128256, width=2048, trained=True, low_memory=False, budget="auto"):
    """Tokens per chunk on the made-up device; all at once would be 3.91 GiB of logits, the sum takes 0.49."""
    monkeypatch.setattr(token_chunks, "halved_on_cpu", lambda *_: False)
    rows = ValidRows(torch.empty(tokens, dtype=torch.int64, device="meta"), None, tokens)
    wanted = (True, trained, False)
    memory = MemoryOptions(budget, low_memory)
    options = HeadOptions(LogitTransform(1.0, 1.0, False), -100, torch.bfloat16, wanted, memory, NO_STATS)
    return TokenChunks((OnCuda(tokens, width), OnCuda(vocab, width), None), rows, options, wanted).size


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (70, 16384),
        (6.5, 16384),  # and 2 GiB of whole blocks, less 0.55 of gradients: half is 3.97
        (6.3, 8192),
        (3.6, 8192),  # half of 5.05, less the sum: 2.03
        (2.0, 4096),
        (0.1, 2048),  # never less than 512 MiB
        (0.0, 2048),
    ],
)
def test_auto_takes_half_of_what_is_free(card, monkeypatch, free, expected):
    card["free"] = free
    assert size_on_cuda(monkeypatch) == expected


def test_auto_is_fixed_where_chunks_need_not_grow_or_must_not(card, monkeypatch):
    assert size_on_cuda(monkeypatch) == 16384
    assert size_on_cuda(monkeypatch, budget=512) == 2048
    assert size_on_cuda(monkeypatch, trained=False) == 2048
    assert size_on_cuda(monkeypatch, low_memory=True) == 256
    torch.use_deterministic_algorithms(True)
    assert size_on_cuda(monkeypatch) == 2048


@pytest.mark.parametrize(
    ("tokens", "memory", "trained", "mib"),
    [  # the head of Llama 3 8B: 1002 MiB of weight; 8 KiB of hidden state and 250.5 KiB of logits per token
        (8192, MemoryOptions(), True, 1002 + 64 + 501 + 1002),  # a chunk of 2048, and the sum
        (8192, MemoryOptions(4096), True, 1002 + 64 + 2004),
        (4096, MemoryOptions(), True, 1002 + 32 + 1002),  # all at once takes no more than a chunk and the sum
        (8192, MemoryOptions(), False, 64 + 501),
        (8192, MemoryOptions(low_memory=True), True, 1002 + 8192 * 8192 * 2 / 2**20 + 128),
    ],
)
def test_bytes_of_a_head(tokens, memory, trained, mib):
    assert head_bytes(tokens, 128256, 4096, torch.bfloat16, memory, trained) == mib * 2**20


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 16])
@pytest.mark.parametrize(("logits", "gradient"), [(64, 16), (64, 64), (64, 100), (16, 640), (640, 16)])
def test_lent_logits_are_read_before_they_are_overwritten(num_chunks, logits, gradient):
    total = num_chunks * gradient
    lent, start = lent_chunks(num_chunks, logits, gradient, total)
    assert start + lent * logits <= total
    for chunk in range(lent):
        assert (chunk + 1) * gradient <= start + chunk * logits  # what is written lies before what is still needed
    assert lent >= min(num_chunks - 1, (total - gradient) // logits if logits >= gradient else 0)


@pytest.mark.parametrize(
    ("hidden_size", "dtype", "weight_dtype", "computed"),
    [
        (12, torch.bfloat16, torch.bfloat16, 12),  # seven chunks; the last is still in the buffer
        (64, torch.bfloat16, torch.bfloat16, 8),
        (64, torch.float16, torch.float16, 7),  # the gradient is fp32 until the end, which is twice the place
        (64, torch.float32, torch.float32, 8),
        (64, torch.bfloat16, torch.float32, 7),
        (200, torch.bfloat16, torch.bfloat16, 7),
    ],
    ids=str,
)
def test_logits_that_fit_in_the_gradient_are_computed_once(
    without_triton, monkeypatch, hidden_size, dtype, weight_dtype, computed
):
    params, labels = make_inputs(hidden_size=hidden_size, ignored=0.05)
    same = as_dtype([p * 0.3 for p in params], weight_dtype)
    exact = run(reference.linear_cross_entropy, as_dtype(same, torch.float64), labels)[1]
    options = {"low_memory": True, "logits_budget_mib": 37 * 16 * dtype.itemsize / 2**20}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype != weight_dtype):
        ours = run(linear_cross_entropy, same, labels, **options)[1]
        theirs = run(reference.linear_cross_entropy, same, labels)[1]
        for name, *grads in zip(("hidden", "weight", "bias"), ours, theirs, exact, strict=True):
            assert_no_worse_than_torch(*grads, name)
        spans, original = [], VocabChunks.weight
        monkeypatch.setattr(VocabChunks, "weight", lambda self, span: spans.append(span) or original(self, span))
        only_weight = [same[0].detach(), same[1], None]
        run(linear_cross_entropy, only_weight, labels, **options)
    assert len(spans) == computed


@pytest.fixture
def chunks(monkeypatch):
    """The numbers of tokens in the chunks computed, in a list that grows."""
    sizes = []
    original = token_chunks.loss_rows

    def counted(logits, *args, **kwargs):
        sizes.append(logits.shape[0])
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(token_chunks, "loss_rows", counted)
    return sizes


@pytest.mark.parametrize(
    ("dtype", "trained", "tokens", "ignored", "options", "one"),
    [
        (torch.bfloat16, (0, 1), 60, 0.0, {}, True),
        (torch.bfloat16, (0, 1), 80, 0.0, {}, True),
        (torch.bfloat16, (0, 1), 80, 0.1, {}, False),  # gathered: hidden states are copies
        (torch.bfloat16, (0, 1), 66, 0.1, {}, True),
        (torch.bfloat16, (1,), 66, 0.1, {}, False),  # chunks would not have a copy of their gradient
        (torch.bfloat16, (0,), 60, 0.0, {}, False),
        (torch.bfloat16, (), 60, 0.0, {}, False),
        (torch.bfloat16, (0, 1), 60, 0.0, {"reduction": "none"}, False),
        (torch.float16, (0, 1), 60, 0.0, {}, False),  # the sum is the gradient itself
        (torch.float32, (0, 1), 60, 0.0, {}, False),
    ],
    ids=[
        "bf16",
        "more",
        "more, ignored",
        "ignored",
        "ignored, frozen hidden",
        "frozen weight",
        "no gradients",
        "none",
        "fp16",
        "fp32",
    ],
)
def test_one_chunk_only_where_a_sum_would_take_more(chunks, dtype, trained, tokens, ignored, options, one):
    params, labels = make_inputs(tokens, hidden_size=64, ignored=ignored)
    hidden, weight = (p.detach().requires_grad_(i in trained) for i, p in enumerate(as_dtype(params[:2], dtype)))
    linear_cross_entropy(hidden, weight, labels, logits_budget_mib=budget(20, dtype), **options)
    assert sum(chunks) == (labels != -100).sum()
    assert (len(chunks) == 1) == one


@pytest.mark.parametrize("speculate", [True, False])
def test_log_probs_in_one_chunk_only_with_gradients_ahead(chunks, speculate):
    params, labels = make_inputs(tokens=60, hidden_size=64, ignored=0.0)
    hidden, weight = as_dtype(params[:2], torch.bfloat16)
    speculation = Speculation() if speculate else None
    linear_logprobs(hidden, weight, labels, speculation=speculation, logits_budget_mib=budget(20, torch.bfloat16))
    assert (len(chunks) == 1) == speculate


def test_autocast_sums_in_the_gradient_itself(chunks):
    params, labels = make_inputs(tokens=60, hidden_size=64, ignored=0.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        linear_cross_entropy(*params[:2], labels, logits_budget_mib=budget(20, torch.bfloat16))
    assert len(chunks) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("ignored", [0.0, 0.01])
@pytest.mark.parametrize("tokens", [1400, 2047, 2560, 2944, 3072])
def test_one_chunk_never_takes_more_memory(monkeypatch, tokens, ignored):
    params, labels = make_inputs(tokens, 2048, 32000, ignored)
    params = [*as_dtype([p * 0.1 for p in params[:2]], torch.bfloat16), None]

    def peak():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(linear_cross_entropy, params, labels, logits_budget_mib=64)
        return torch.cuda.max_memory_allocated() - before

    peak()  # cuBLAS takes its workspace
    ours = peak()
    monkeypatch.setattr(token_chunks, "bytes_over_gradient", lambda *_: 0)
    several = peak()
    slack = 8 * 2**20  # blocks that the allocator did not split
    assert ours <= several + slack
    if tokens <= 2047:
        assert ours < several - slack


@pytest.mark.gpu
def test_auto_stays_within_the_memory_of_the_process(chunks):
    """All rows at once where memory is free, chunks where it is not, and the same gradients."""
    params, labels = make_inputs(16384, 512, 64000, ignored=0.0)
    params = [*as_dtype([p * 0.1 for p in params[:2]], torch.bfloat16), None]
    torch.use_deterministic_algorithms(False)
    fixed = run(linear_cross_entropy, params, labels, logits_budget_mib=512)[1]
    assert chunks == [4096] * 4
    chunks.clear()
    whole = run(linear_cross_entropy, params, labels)[1]
    assert chunks == [16384]
    chunks.clear()
    torch.cuda.empty_cache()
    total, limit = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved() + 2 * GIB  # the logits take 1.95 GiB
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        several = run(linear_cross_entropy, params, labels)[1]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert len(chunks) > 1
    for one, *others in zip(fixed, whole, several, strict=True):
        for other in others:
            torch.testing.assert_close(other, one)
