"""The LLaMA model as plain math: config, modules, initial weights, operators. Imports nothing of torch.distributed."""
