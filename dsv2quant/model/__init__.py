"""The reference runtime: a DeepSeek-V2 forward pass in torch, for plain and quantized checkpoints."""
