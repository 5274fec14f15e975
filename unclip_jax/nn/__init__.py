"""The parts every network here is made of. None knows of CLIP or diffusion."""
