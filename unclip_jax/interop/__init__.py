"""Weights of the PyTorch world: CLIP (transformers) and Karlo (diffusers) in and out; OpenCLIP, GLIDE, Inception in."""
