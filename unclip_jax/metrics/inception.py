"""Inception-v3 as FID wants it: the network of Szegedy et al. 2015 with the weights TensorFlow published that year.

It differs from later Inception-v3s: average pools leave the padding out, the last block takes a maximum instead, and
there are 1008 logits. Names are those of `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid, torch-fidelity).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.metrics.resample import resize

SIZE, FEATURES, LOGITS = 299, 2048, 1008
EPSILON = 1e-3  # of batch normalisation


class Conv(nn.Module):
    """Convolution, batch normalisation with stored statistics, relu."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x):
        padding = tuple((p, p) for p in self.padding)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros  # of what is always loaded
        options = {"use_bias": False, "precision": jax.lax.Precision.HIGHEST, "kernel_init": zeros}
        x = nn.Conv(self.features, self.kernel, self.stride, padding, **options, name="conv")(x)
        weights = lambda name, init: self.param(f"bn_{name}", init, (self.features,))  # noqa: E731
        scale = weights("weight", ones) / jnp.sqrt(weights("running_var", ones) + EPSILON)
        shift = weights("bias", zeros) - weights("running_mean", zeros) * scale
        return nn.relu(x * scale[None, None, None] + shift[None, None, None])


class Block(nn.Module):
    """Branches side by side, their outputs one after the other in the channels.

    Attributes:
      branches: each a sequence of steps, which are "average", "max", "shrink" (a pool), (name, arguments of Conv), or
        a fork: a tuple of such steps whose outputs are all kept.
    """

    branches: Sequence[Sequence]

    @nn.compact
    def __call__(self, x):
        return jnp.concatenate([_branch(branch, x) for branch in self.branches], -1)


def _branch(steps, x):
    for step in steps:
        if step == "average":
            x = nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)
        elif step == "max":
            x = nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
        elif step == "shrink":
            x = nn.max_pool(x, (3, 3), (2, 2))
        elif not isinstance(step[0], str):
            x = jnp.concatenate([_branch([each], x) for each in step], -1)
        else:
            name, *arguments = step
            x = Conv(*arguments, name=name)(x)
    return x


class Inception(nn.Module):
    """Pictures → features and logits.

    Attributes:
      width: share of the published numbers of channels; below 1 for tests.
    """

    width: float = 1.0

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images [B, H, W, 3] of values 0 … 255, any size → pool3 f32[B, 2048], logits without bias f32[B, 1008]."""
        return self.features((resize(images, SIZE) - 128) / 128)

    @nn.compact
    def features(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x f32[B, H, W, 3] in [-1, 1], at least 75 pixels across → the same."""
        for steps in stem(self.width):
            x = _branch(steps, x)
        for name, branches in blocks(self.width).items():
            x = Block(branches, name=name)(x)
        pooled = x.mean((1, 2))
        # The bias has no part in the score: Salimans et al. took the last matrix alone.
        fc = self.param("fc", nn.initializers.zeros, (pooled.shape[-1], LOGITS))
        return pooled, jnp.matmul(pooled, fc, precision=jax.lax.Precision.HIGHEST)


def stem(width: float) -> list[list]:
    """The steps before the first block."""
    c = lambda n: max(1, round(n * width))  # noqa: E731
    return [
        [("Conv2d_1a_3x3", c(32), (3, 3), 2), ("Conv2d_2a_3x3", c(32), (3, 3))],
        [("Conv2d_2b_3x3", c(64), (3, 3), 1, (1, 1)), "shrink"],
        [("Conv2d_3b_1x1", c(80)), ("Conv2d_4a_3x3", c(192), (3, 3)), "shrink"],
    ]


def blocks(width: float) -> dict[str, list]:
    """The branches of each block, as figures 5 to 7 of Szegedy et al. 2015 (arXiv 1512.00567) and their code have them.

    A is figure 5, C figure 6, E figure 7; B and D halve the picture.
    """
    c = lambda n: max(1, round(n * width))  # noqa: E731
    three, five = ((3, 3), 1, (1, 1)), ((5, 5), 1, (2, 2))
    across, down = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    left, up = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))

    def a(pool):
        return [
            [("branch1x1", c(64))],
            [("branch5x5_1", c(48)), ("branch5x5_2", c(64), *five)],
            [("branch3x3dbl_1", c(64)), ("branch3x3dbl_2", c(96), *three), ("branch3x3dbl_3", c(96), *three)],
            ["average", ("branch_pool", c(pool))],
        ]

    b = [
        [("branch3x3", c(384), (3, 3), 2)],
        [("branch3x3dbl_1", c(64)), ("branch3x3dbl_2", c(96), *three), ("branch3x3dbl_3", c(96), (3, 3), 2)],
        ["shrink"],
    ]

    def c7(n):
        return [
            [("branch1x1", c(192))],
            [("branch7x7_1", c(n)), ("branch7x7_2", c(n), *across), ("branch7x7_3", c(192), *down)],
            [
                ("branch7x7dbl_1", c(n)), ("branch7x7dbl_2", c(n), *down), ("branch7x7dbl_3", c(n), *across),
                ("branch7x7dbl_4", c(n), *down), ("branch7x7dbl_5", c(192), *across),
            ],
            ["average", ("branch_pool", c(192))],
        ]  # fmt: skip

    d = [
        [("branch3x3_1", c(192)), ("branch3x3_2", c(320), (3, 3), 2)],
        [
            ("branch7x7x3_1", c(192)), ("branch7x7x3_2", c(192), *across), ("branch7x7x3_3", c(192), *down),
            ("branch7x7x3_4", c(192), (3, 3), 2),
        ],
        ["shrink"],
    ]  # fmt: skip

    def e(pool):
        return [
            [("branch1x1", c(320))],
            [("branch3x3_1", c(384)), (("branch3x3_2a", c(384), *left), ("branch3x3_2b", c(384), *up))],
            [
                ("branch3x3dbl_1", c(448)), ("branch3x3dbl_2", c(384), *three),
                (("branch3x3dbl_3a", c(384), *left), ("branch3x3dbl_3b", c(384), *up)),
            ],
            [pool, ("branch_pool", c(192))],
        ]  # fmt: skip

    return {
        "Mixed_5b": a(32), "Mixed_5c": a(64), "Mixed_5d": a(64), "Mixed_6a": b, "Mixed_6b": c7(128),
        "Mixed_6c": c7(160), "Mixed_6d": c7(160), "Mixed_6e": c7(192), "Mixed_7a": d, "Mixed_7b": e("average"),
        "Mixed_7c": e("max"),
    }  # fmt: skip
