"""Running a plan: reading, encoding and writing, resumable, into safetensors shards or GGUF files."""
