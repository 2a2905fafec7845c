"""Serving engines, run beside the runtime on the same artifact. Nothing of an engine is imported into this process."""
