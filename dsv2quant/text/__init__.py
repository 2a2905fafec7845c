"""Text for calibration and evaluation, tokenizers, chat templates."""
