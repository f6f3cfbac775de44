"""The formats in which others keep weights: Hugging Face, Megatron, AscendSpeed, Meta, torch.distributed.checkpoint."""
