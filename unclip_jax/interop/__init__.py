"""Weights of the PyTorch world in and out: CLIP (transformers, OpenCLIP), Karlo (diffusers), GLIDE."""
