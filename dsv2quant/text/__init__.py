"""Text and what becomes of it: files for calibration and evaluation, tokenizers, chat templates, windows of tokens. A
folder and the GGUF file made from it give a text the same tokens."""
