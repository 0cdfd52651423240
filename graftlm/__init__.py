"""Graft: fine-tune language models in full, with LoRA or with QLoRA, and know beforehand which of them fits."""

__version__ = "0.1.0"
