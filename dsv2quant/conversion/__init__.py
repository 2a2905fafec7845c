"""Running a plan: read, encode and write, in bounded memory, into safetensors shards or GGUF files. A run that was
killed continues with what is durable, and nothing looks finished before it is."""
