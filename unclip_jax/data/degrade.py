"""The degradation that the second upsampler's small pictures are made by (unCLIP, section 2.1): blind super-resolution.

After Zhang et al. 2021 (arXiv 2103.14006): a picture is blurred twice, resized, made noisy and JPEG-compressed, in an
order drawn anew for each, then brought to the small size and compressed once more. The ranges are our own, with blurs
in pixels of the small picture, and there is no model of a camera's sensor.
On the host, in numpy and Pillow, from a generator of one's own, so that a picture is decided by (seed, position).
"""

import dataclasses
import io

import numpy as np
from PIL import Image

from unclip_jax.errors import UserError, suggest

METHODS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST, Image.Resampling.BOX)
STEPS = ("isotropic", "anisotropic", "resize", "noise", "jpeg")


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What each step draws from, evenly: (low, high).

    Args:
      sigma: of the blurs, in pixels of the small picture; noise: standard deviation, of 255; quality: of JPEG.
      scale: of the resizing on the way, of what lies between the small picture's side (0) and the large one's (1).
    """

    sigma: tuple[float, float]
    noise: tuple[float, float]
    quality: tuple[int, int]
    scale: tuple[float, float] = (0.0, 1.0)


# "bsr" about as strong as Zhang et al.'s; "bsr_light" for what a drawn picture may lack.
SETTINGS = {
    "bsr": Ranges(sigma=(0.1, 2.4), noise=(1, 25), quality=(30, 95)),
    "bsr_light": Ranges(sigma=(0.1, 0.8), noise=(0, 5), quality=(75, 95), scale=(0.5, 1.0)),
}


def degrade(image: np.ndarray, factor: int, rng: np.random.Generator, name: str = "bsr") -> np.ndarray:
    """The small picture u8[H / factor, W / factor, 3] that a large one u8[H, W, 3] becomes.

    Args:
      name: of SETTINGS.
    """
    ranges, (height, width) = settings(name), image.shape[:2]
    if height % factor or width % factor:
        raise ValueError(f"images of {height} x {width} pixels must be divisible by factor={factor}")
    x, small = image.astype(np.float64), np.array([height // factor, width // factor])
    for step in order(rng):
        pixel = x.shape[0] / small[0]  # a pixel of the small picture in those of x
        if step == "noise":
            x = noisy(x, rng.uniform(*ranges.noise), rng)
        elif step == "jpeg":
            x = jpeg(x, int(rng.integers(ranges.quality[0], ranges.quality[1] + 1)))
        elif step == "resize":
            side = small + rng.uniform(*ranges.scale) * (np.array([height, width]) - small)
            x = resize(x, *np.round(side).astype(int), METHODS[rng.integers(len(METHODS))])
        else:
            sigma = pixel * rng.uniform(*ranges.sigma, 2)
            sigma = sigma[:1].repeat(2) if step == "isotropic" else sigma
            x = blur(x, gaussian(*sigma, rng.uniform(0, np.pi)))
    x = resize(x, *small, METHODS[rng.integers(len(METHODS))])
    return jpeg(x, int(rng.integers(ranges.quality[0], ranges.quality[1] + 1))).astype(np.uint8)


def settings(name: str) -> Ranges:
    """Those of a name; UserError for an unknown one."""
    if name not in SETTINGS:
        raise UserError(f"loader.degrade={name!r} is unknown", suggest(name, SETTINGS))
    return SETTINGS[name]


def order(rng: np.random.Generator) -> list[str]:
    """STEPS in an order drawn by chance."""
    return [STEPS[k] for k in rng.permutation(len(STEPS))]


def gaussian(sigma_x: float, sigma_y: float, angle: float) -> np.ndarray:
    """A Gaussian kernel f64[k, k] of sum 1 with these standard deviations along axes turned by `angle`; k odd."""
    radius = max(1, int(np.ceil(3 * max(sigma_x, sigma_y))))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    kernel = np.exp(-0.5 * ((u / sigma_x) ** 2 + (v / sigma_y) ** 2))
    return kernel / kernel.sum()


def blur(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """f64[H, W, 3] convolved with a kernel, by Fourier transform; edges reflected, edge pixel once."""
    radius = len(kernel) // 2
    padded = np.pad(x, [(radius, radius)] * 2 + [(0, 0)], mode="reflect")
    shape = [n + 2 * radius for n in padded.shape[:2]]
    both = np.fft.rfft2(padded, shape, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[..., None]
    return np.fft.irfft2(both, shape, axes=(0, 1))[2 * radius : padded.shape[0], 2 * radius : padded.shape[1]]


def resize(x: np.ndarray, height: int, width: int, method: Image.Resampling) -> np.ndarray:
    """f64[H, W, 3] at another size by Pillow's kernel, in floating point."""
    planes = [Image.fromarray(x[..., k].astype(np.float32)).resize((width, height), method) for k in range(3)]
    return np.stack([np.asarray(plane, np.float64) for plane in planes], -1)


def noisy(x: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    """With Gaussian noise, of each colour by itself or, as often, of all alike."""
    channels = 3 if rng.random() < 0.5 else 1
    return x + std * rng.standard_normal((*x.shape[:2], channels))


def jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    """After compression by JPEG, and back."""
    file = io.BytesIO()
    Image.fromarray(np.clip(np.round(x), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float64)
