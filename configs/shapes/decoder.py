"""The decoder on the shapes world, at 32 px.

    unclip train --config configs/shapes/decoder.py --workdir runs/shapes/decoder --config.clip=runs/shapes/clip

    unclip train --config configs/shapes/decoder.py:inpaint --workdir runs/shapes/inpaint \\
        --config.clip=runs/shapes/clip --config.init=runs/shapes/decoder

Variants: laptop, gpu (the bundled stack's, minutes of one large GPU), inpaint and gpu_inpaint (the same with channels
for a picture and its mask, to be fine-tuned), tiny (for tests). The caption enters as CLIP's text states, as in Karlo:
a caption Transformer of its own, after as few pictures as a laptop sees, said nothing that was read (docs/results.md).
"""

from configs import common, small

VARIANTS = {
    "laptop": dict(
        unet=dict(
            channels=96,
            multipliers=(1,),
            blocks=2,
            attention=(8,),
            head_channels=48,
            groups=8,
            patch=4,
            outer=32,
            positions=True,
        ),
        context_width=96,
        text=None,
        shift=0.5,
        weighting="clipped_snr",  # else what little noise hides, the outlines, hardly counts
        clip_drop=0.4,  # else so short a run never learns to read: z_img explains nearly all a caption says
        text_drop=0.1,
        batch_size=32,
        num_steps=12_000,
        steps=30,
        optim=dict(name="muon", lr=1e-3),
    ),
    "tiny": dict(
        unet=dict(channels=16, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=16, groups=4, patch=2),
        context_width=32,
        text=dict(layers=1, heads=2),
        batch_size=16,
        num_steps=50,
        steps=8,
    ),
}
VARIANTS["gpu"] = dict(
    VARIANTS["laptop"],
    unet=dict(
        channels=80,
        multipliers=(1, 2),
        blocks=1,
        attention=(16, 8),
        head_channels=40,
        groups=8,
        patch=2,
        outer=24,
        positions=True,
    ),
    clip_drop=0.2,
    batch_size=512,
    num_steps=8000,
    optim=dict(name="muon", lr=2e-3),
)
VARIANTS["inpaint"] = dict(VARIANTS["laptop"], inpaint=True, num_steps=3_000)
VARIANTS["gpu_inpaint"] = dict(VARIANTS["gpu"], inpaint=True, num_steps=2_000)


def get_config(variant: str = ""):
    return small.decoder(common.choose(variant, VARIANTS), data=dict(size=32))
