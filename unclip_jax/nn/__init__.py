"""The parts every network here is made of. None knows of captions, CLIP or diffusion."""
