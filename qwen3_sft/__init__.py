"""Supervised fine-tuning of Qwen3-MoE models: data, packing, training, checkpoints, export."""
