"""Reading and writing model weights: Hugging Face and neighbours, slice by slice."""
