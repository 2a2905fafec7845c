"""Scripts that an engine's own Python runs: `PYTHON drivers/vllm_driver.py FOLDER`. They import the standard library,
numpy, the engine and what it brings; of this package only exchange.py, from their own folder."""
