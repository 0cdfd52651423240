"""Full fine-tuning, LoRA and QLoRA side by side: runs, scores, statistics, verdict."""
