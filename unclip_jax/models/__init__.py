"""The networks of unCLIP as Linen modules. None knows what a diffusion schedule is."""
