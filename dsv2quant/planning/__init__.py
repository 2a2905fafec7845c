"""From a checkpoint's headers to a plan: recipes, what consumers take, smoothing, and what each tensor becomes. No
weight is read; a plan fixes every output byte's place, for safetensors and for GGUF."""
