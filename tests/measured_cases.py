"""Measurements to show: of an artifact scored and run in an engine."""

from __future__ import annotations

from dsv2quant.report.measured import EngineRun, Estimate, Measured, Scores, Stretch, TaskScore, TaskScores

SCORES = Scores(
    reference="base", perplexity=Estimate(15.0848, 0.5573), reference_perplexity=Estimate(15.0023, 0.5545),
    ln_ratio=Estimate(0.00548, 0.00121), kld=Estimate(0.01309, 0.00026), kld_p99=0.106, top1=Estimate(0.9408, 0.0015),
    by_position=tuple(Stretch(32 * i, 32 * i + 31, Estimate(0.012 + 0.0002 * i, 0.0004)) for i in range(16)),
    tokens=30660, windows=60, ctx=512, protocol="default", text="a text", text_sha256="71f2ff5d99bd" + 52 * "0",
    dtype="float32", weight_only=False,
)  # fmt: skip
ENGINE = EngineRun(
    "vllm", {"vllm": "0.26.0", "torch": "2.11.0"}, "NVIDIA H200", 2, Estimate(1.2e-4, 1e-5), 3e-4,
    Estimate(0.998, 0.001), (),
)  # fmt: skip
MEASURED = Measured(SCORES, (ENGINE,))
TASKS = TaskScores(
    "base", "0.4.13", "bfloat16", False, ("python -m dsv2quant.lm_eval --tasks arc,gsm8k,wikitext",),
    (
        TaskScore("arc", "1.0", "acc", "none", True, 25, 200, 2376, "allenai/ai2_arc", "ARC-Easy", "test",
                  0.80, 0.028, 0.82, 0.027),
        TaskScore("arc", "1.0", "acc_norm", "none", True, 25, 200, 2376, "allenai/ai2_arc", "ARC-Easy", "test",
                  0.76, 0.030, 0.80, 0.028),
        TaskScore("gsm8k", "3.0", "exact_match", "strict-match", True, 5, 150, 1319, "json", None, "test",
                  0.38, 0.034, 0.40, 0.035),
        TaskScore("gsm8k", "3.0", "exact_match", "flexible-extract", True, 5, 150, 1319, "json", None, "test",
                  0.44, 0.035, 0.40, 0.035),
        TaskScore("wikitext", "2.0", "word_perplexity", "none", False, 0, 62, 62, None, None, None,
                  11.5, None, 11.0, None),
    ),
)  # fmt: skip
