"""What a quantization cost: perplexity, and divergence from a reference, with errors and noise floor; and whether an
artifact is whole, by its manifest and against its source."""
