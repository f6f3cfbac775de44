"""Tensors in files: read slice by slice, copied, converted, without a pickle being run."""
