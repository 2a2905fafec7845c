"""Quantize DeepSeek-V2 checkpoints for vLLM, SGLang and transformers, and measure what it cost."""

__version__ = "0.1.0"
