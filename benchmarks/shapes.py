"""The shapes that the kernel benchmark measures, by set. A shape is a plain dict and travels to the workers as JSON."""

OPS = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "swiglu",
    "geglu",
    "clamped_swiglu",
    "rope",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_logprobs",
)


def rows_by_cols(op: str, *sizes: tuple[int, int], dtype: str = "bfloat16") -> list[dict]:
    """Norms and activations: ``[rows, cols]``; cross-entropy: ``cols`` is the vocabulary."""
    return [{"op": op, "rows": rows, "cols": cols, "dtype": dtype} for rows, cols in sizes]


def rope(*sizes: tuple[int, int, int, int, int]) -> list[dict]:
    """Rotary embedding of ``[batch, heads, seq, head_dim]`` queries and keys."""
    names = ("batch", "seq", "q_heads", "kv_heads", "head_dim")
    return [{"op": "rope", **dict(zip(names, size, strict=True)), "dtype": "bfloat16"} for size in sizes]


def linear(op: str, *sizes: tuple[int, int, int], frozen: bool = False, ignored: float = 0.0) -> list[dict]:
    """Projection of ``[tokens, hidden]`` on ``vocab`` classes; ``frozen``: the weight needs no gradient."""
    extra = {"frozen": frozen, "ignored": ignored, "dtype": "bfloat16"}
    return [{"op": op, "tokens": t, "hidden": h, "vocab": v, **extra} for t, h, v in sizes]


ANCHORS = [
    *rows_by_cols("rms_norm", (16384, 4096), (4096, 16384)),
    *rows_by_cols("add_rms_norm", (16384, 4096)),
    *rows_by_cols("layer_norm", (16384, 4096)),
    *rows_by_cols("swiglu", (16384, 14336)),
    *rows_by_cols("geglu", (16384, 14336)),
    *rope((4, 2048, 32, 8, 128), (4, 2048, 64, 64, 128)),
    *rows_by_cols("cross_entropy", (8192, 32000), (8192, 128256)),
    *linear(
        "linear_cross_entropy",
        (8192, 4096, 128256),
        (16384, 2048, 128256),
        (16384, 1536, 151936),
        (8192, 3072, 256000),
        (32768, 4096, 128256),
    ),
    *linear("linear_cross_entropy", (8192, 4096, 128256), frozen=True),
    *linear("linear_cross_entropy", (8192, 4096, 128256), ignored=0.3),
    *linear("linear_logprobs", (8192, 4096, 128256)),
]

# Layers of models people train now: Llama-3.2-1B, Qwen2.5-1.5B, Llama-3-8B, Gemma-7B.
TODAY = [
    *rows_by_cols("rms_norm", (8192, 2048), (8192, 1536), (8192, 4096), (262144, 128)),
    *rows_by_cols("add_rms_norm", (8192, 2048), (8192, 1536)),
    *rows_by_cols("swiglu", (8192, 8192), (8192, 8960)),
    *rows_by_cols("geglu", (8192, 24576)),
    *rows_by_cols("clamped_swiglu", (32768, 2880)),  # GPT-OSS-20B, 8192 tokens with four experts each
    *rope((8, 1024, 32, 8, 64), (8, 1024, 12, 2, 128)),
    *rows_by_cols("cross_entropy", (8192, 151936)),
    *linear("linear_cross_entropy", (8192, 2048, 128256), (8192, 1536, 151936)),
    *linear("linear_logprobs", (8192, 1536, 151936)),
]

# Sizes of the plots in Hsu et al., arXiv 2410.10989, section 4, and of the authors' benchmark scripts.
PAPER = [
    *rows_by_cols("cross_entropy", (16384, 40960), (16384, 81920), (16384, 122880), (16384, 163840)),
    *rows_by_cols("rms_norm", (2048, 4096), (2048, 8192), (2048, 16384), (2048, 32768)),
    *rows_by_cols("layer_norm", (4096, 4096), (4096, 8192), (4096, 16384), dtype="float32"),
    *rows_by_cols("swiglu", (16384, 11008), (32768, 11008), (65536, 11008)),
    *rows_by_cols("geglu", (16384, 11008), (32768, 11008), (65536, 11008)),
    *rope((1, 2048, 32, 8, 256), (1, 16384, 32, 8, 256), (1, 2048, 32, 8, 512)),
    *linear("linear_cross_entropy", (4096, 4096, 128256), (8192, 4096, 128256), (16384, 4096, 128256)),
]

SMALL = [
    *rows_by_cols("rms_norm", (64, 2048), (64, 4096), (4097, 3001), (1, 4096)),
    *rows_by_cols("add_rms_norm", (64, 2048), (4097, 3001)),
    *rows_by_cols("layer_norm", (64, 2048), (4097, 3001)),
    *rows_by_cols("swiglu", (64, 8192), (1023, 5461)),
    *rows_by_cols("geglu", (64, 8192), (1023, 5461)),
    *rows_by_cols("clamped_swiglu", (64, 2880)),
    *rope((1, 64, 32, 8, 64), (2, 333, 32, 8, 128), (2, 333, 6, 2, 96)),
    *rows_by_cols("cross_entropy", (64, 32000), (1024, 32003)),
    *linear("linear_cross_entropy", (512, 2048, 32000), (64, 2048, 128256)),
]

SMOKE = [
    *rows_by_cols("rms_norm", (5, 48)),
    *rows_by_cols("add_rms_norm", (5, 48)),
    *rows_by_cols("layer_norm", (5, 48)),
    *rows_by_cols("swiglu", (5, 48)),
    *rows_by_cols("geglu", (5, 48)),
    *rows_by_cols("clamped_swiglu", (5, 48)),
    *rope((1, 6, 4, 2, 16)),
    *rows_by_cols("cross_entropy", (12, 33)),
    *linear("linear_cross_entropy", (12, 16, 33)),
    *linear("linear_cross_entropy", (12, 16, 33), frozen=True, ignored=0.3),
    *linear("linear_logprobs", (12, 16, 33), ignored=0.3),
]

HOST = [
    *rows_by_cols("rms_norm", (64, 2048)),
    *rows_by_cols("add_rms_norm", (64, 2048)),
    *rows_by_cols("layer_norm", (64, 2048)),
    *rows_by_cols("swiglu", (64, 2048)),
    *rope((1, 64, 8, 8, 64)),
    *rows_by_cols("cross_entropy", (64, 2048)),
]

SETS = {"anchors": ANCHORS, "today": TODAY, "paper": PAPER, "small": SMALL, "smoke": SMOKE, "host": HOST}


def select(sets: list[str], ops: list[str], ignored: float | None = None) -> list[dict]:
    """The shapes of ``sets`` (``all``: anchors, today, paper, small) for ``ops``, each once, in that order.

    ``ignored`` replaces the share of ignored labels of every shape that has labels.
    """
    for name, allowed in ((sets, ("all", *SETS)), (ops, OPS)):
        unknown = [n for n in name if n not in allowed]
        if unknown:
            raise ValueError(f"unknown name {unknown[0]!r}; allowed: {', '.join(allowed)}")
    names = ["anchors", "today", "paper", "small"] if "all" in sets else sets
    chosen: list[dict] = []
    for spec in (s for name in names for s in SETS[name]):
        if ignored is not None and spec["op"] in ("cross_entropy", "linear_cross_entropy", "linear_logprobs"):
            spec = spec | {"ignored": ignored}
        if spec["op"] in ops and spec not in chosen:
            chosen.append(spec)
    return chosen


def shape_name(spec: dict) -> str:
    """A short name: ``16384x4096``, ``B4 T2048 32q 8kv d128``, ``BT8192 H4096 V128256``."""
    if spec["op"] == "rope":
        name = "B{batch} T{seq} {q_heads}q {kv_heads}kv d{head_dim}".format(**spec)
    elif "tokens" in spec:
        name = "BT{tokens} H{hidden} V{vocab}".format(**spec)
    else:
        name = "{rows}x{cols}".format(**spec)
    if spec["dtype"] != "bfloat16":
        name += f" {spec['dtype']}"
    if spec.get("frozen"):
        name += " frozen weight"
    if spec.get("ignored"):
        name += f" {spec['ignored']:.0%} ignored"
    return name
