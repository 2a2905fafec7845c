"""Files and how they are read and written: safetensors, GGUF and the hub, durable writes, work that can be resumed,
manifests. Nothing here knows what a model is."""
