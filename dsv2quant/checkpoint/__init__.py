"""A checkpoint opened from its headers: every tensor of the model with the stored parts that hold it, from a folder,
the hub or a GGUF file."""
