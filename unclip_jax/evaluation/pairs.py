"""People choose between the pictures of two folders, blind: a page, its key, and what the votes say.

As Ramesh et al. 2022, section 5.2: which is more photorealistic, which fits the caption better, and which set is more
diverse. The page shows left and right in an order that chance decides and that only the key tells. Judges get the page
alone; it works without a network, and gives its votes as a file.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from unclip_jax import gallery
from unclip_jax.data.images import open_image
from unclip_jax.errors import UserError
from unclip_jax.evaluation.pictures import PictureFolder
from unclip_jax.evaluation.report import Report, Table, html, read
from unclip_jax.metrics.intervals import wilson
from unclip_jax.storage import write_text

QUESTIONS = {
    "photorealism": "Which picture looks more like a real photograph or a flawless drawing?",
    "caption": "Which picture fits the caption better?",
    "diversity": "Which set of pictures is more varied, while still fitting the caption?",
}
CHOICES = ("left", "right", "tie")
SIDE = 256  # pixels of a shown picture, at most
SET = 4  # pictures of a set


def make(a: str, b: str, out: str, num: int = 50, seed: int = 0, overwrite: bool = False) -> tuple[Path, Path, int]:
    """Writes PAGE.html and PAGE.key.json for up to `num` captions that both folders have pictures of.

    Args:
      a, b: folders as `unclip sample` writes them, or with captions.jsonl.
      seed: of the captions chosen, of sides and of the order.

    Returns: page, key, and how many questions there are.
    """
    page = gallery.check_file(out, ".html", overwrite)
    key = gallery.check_file(str(page.with_suffix(".key.json")), ".json", overwrite)
    if Path(a).resolve() == Path(b).resolve():
        raise UserError(f"both folders are {a!r}", "give two")
    folders = [PictureFolder(a, asked=True), PictureFolder(b, asked=True)]
    groups = [_by_caption(folder, name) for folder, name in zip(folders, (a, b), strict=True)]
    captions = [text for text in groups[0] if text in groups[1]]
    if not captions:
        raise UserError(f"{a} and {b} have no caption in common", "draw the same prompts with both")
    rng = Random(seed)
    captions = rng.sample(captions, min(num, len(captions)))
    trials = [trial for caption in captions for trial in _trials(caption, folders, groups, rng)]
    rng.shuffle(trials)
    shown = [{"caption": t["caption"], "question": t["question"], "sides": t["sides"]} for t in trials]
    identity = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    facts = {"page": identity, "seed": seed, "a": Path(a).resolve().name, "b": Path(b).resolve().name}
    answers = [{"question": t["question"], "caption": t["caption"], "left": t["left"]} for t in trials]
    write_text(page, _page(identity, shown))
    write_text(key, json.dumps({**facts, "trials": answers}, indent=2, ensure_ascii=False) + "\n")
    return page, key, len(trials)


def analyse(votes: Sequence[str], key: str) -> Report:
    """How often A was preferred, by question, over the votes of one or more judges.

    The share is of A among the choices for A or B; ties are counted apart. The p-value is of the sign test.
    """
    facts = read(key)
    try:
        page, names, trials = facts["page"], (str(facts["a"]), str(facts["b"])), facts["trials"]
        truth = [(str(t["question"]), t["left"]) for t in trials]
        if not truth or {left for _, left in truth} - {"a", "b"} or {q for q, _ in truth} - set(QUESTIONS):
            raise ValueError("trials")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{key} is no key of a page ({error})", "give the .key.json beside the page") from None
    tally = {question: {"a": 0, "b": 0, "tie": 0} for question in QUESTIONS}
    judges = set()
    for file in votes:
        judge, choices = _votes(file, page, len(truth))
        if judge in judges:
            raise UserError(f"{file} is of the judge {judge[:40]!r}, whose votes are counted already", "give it once")
        judges.add(judge)
        for number, choice in choices.items():
            question, left = truth[number]
            other = {"a": "b", "b": "a"}[left]
            tally[question][{"left": left, "right": other, "tie": "tie"}[choice]] += 1
    rows = []
    for question, found in tally.items():
        n = found["a"] + found["b"]
        if n + found["tie"]:
            share = found["a"] / n if n else None
            low, high = wilson(found["a"], n)
            rows.append([question, found["a"], found["b"], found["tie"], share, low, high, sign_test(found["a"], n)])
    columns = ["question", f"A: {names[0]}", f"B: {names[1]}", "ties", "share of A", "95% from", "to", "p"]
    facts = {"kind": "votes", "page": page, "a": names[0], "b": names[1], "judges": len(judges)}
    names_of = ("question", "a", "b", "ties", "share", "low", "high", "p")
    facts["results"] = [dict(zip(names_of, row, strict=True)) for row in rows]
    title = f"{names[0]} (A) against {names[1]} (B): {len(judges)} judges"
    warnings = ["the interval takes every vote as independent; with few judges it is too narrow"]
    return Report(title, {**facts, "warnings": warnings}, [Table("Votes", columns, rows)], warnings=warnings)


def sign_test(k: int, n: int) -> float:
    """Chance of a split at least as uneven as k of n, if both were as good (two-sided binomial)."""
    extreme = max(k, n - k)
    return min(1.0, 2 * sum(math.comb(n, j) for j in range(extreme, n + 1)) / 2**n)


def _by_caption(folder: PictureFolder, name: str) -> dict[str, list[str]]:
    if folder.captions is None:
        raise UserError(f"the pictures in {name} have no captions", "put captions.jsonl beside them")
    groups: dict[str, list[str]] = {}
    for file, caption in zip(folder.files, folder.captions, strict=True):
        groups.setdefault(caption, []).append(file)
    return groups


def _trials(caption: str, folders, groups, rng: Random):
    """One caption's questions: two about its first picture of each side, one about the sets where both have sets."""
    sets = [group[caption] for group in groups]
    size = min(SET, *map(len, sets))
    for question in QUESTIONS:
        take = size if question == "diversity" else 1
        if question == "diversity" and size < 2:
            continue
        sides = [[_shown(f, file) for file in files[:take]] for f, files in zip(folders, sets, strict=True)]
        left = rng.choice("ab")
        yield {"caption": caption, "question": question, "left": left, "sides": sides if left == "a" else sides[::-1]}


def _shown(folder: PictureFolder, file: str) -> str:
    image = open_image(folder.path / file)
    image.thumbnail((SIDE, SIDE))
    pixels = np.asarray(image)
    if max(pixels.shape[:2]) <= SIDE // 2:  # small pictures are enlarged without smoothing
        scale = SIDE // max(pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(pixels).resize((image.width * scale, image.height * scale), 0))
    return gallery.data_uri(pixels)


def _votes(file: str, page: str, trials: int) -> tuple[str, dict[int, str]]:
    facts = read(file)
    try:
        judge, of, votes = str(facts["judge"]), facts["page"], facts["votes"]
        found = {}
        for vote in votes:
            number, choice = vote["trial"], vote["choice"]
            if type(number) is not int or not 0 <= number < trials or number in found:
                raise ValueError(f"trial {number!r}")
            if choice not in CHOICES:
                raise ValueError(f"choice {choice!r}")
            found[number] = choice
    except (KeyError, TypeError, ValueError) as error:
        what = f"{file} is not as the page gives votes ({str(error)[:80]})"
        raise UserError(what, "give the downloaded file") from None
    if of != page:
        raise UserError(f"{file} has votes on another page than the key's", "give the key of that page")
    if not found:
        raise UserError(f"{file} holds no votes")
    return judge, found


SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const store = "votes-" + data.page, votes = new Map();
try {
  for (const [k, v] of JSON.parse(localStorage.getItem(store) || "[]")) votes.set(k, v);
} catch (e) { votes.clear(); }
const judge = (() => { const b = new Uint8Array(8); crypto.getRandomValues(b);
  return Array.from(b, x => x.toString(16).padStart(2, "0")).join(""); })();
let at = 0;
const by = id => document.getElementById(id);
function pictures(place, list) {
  place.replaceChildren(...list.map(uri => {
    const image = document.createElement("img");
    image.src = uri;
    image.alt = "";
    return image;
  }));
}
function show() {
  const trial = data.trials[at];
  by("count").textContent = (at + 1) + " of " + data.trials.length + ", " + votes.size + " answered";
  by("caption").textContent = trial.caption;
  by("question").textContent = data.questions[trial.question];
  pictures(by("left"), trial.sides[0]);
  pictures(by("right"), trial.sides[1]);
  for (const b of document.querySelectorAll("button[data-choice]"))
    b.setAttribute("aria-pressed", votes.get(at) === b.dataset.choice);
}
function choose(choice) {
  votes.set(at, choice);
  try { localStorage.setItem(store, JSON.stringify([...votes])); } catch (e) { /* a private window keeps nothing */ }
  at = Math.min(at + 1, data.trials.length - 1);
  show();
}
function save() {
  const out = { page: data.page, judge: by("name").value.trim() || judge,
    votes: [...votes].map(([trial, choice]) => ({ trial, choice })) };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(out, null, 1)], { type: "application/json" }));
  link.download = "votes-" + data.page + ".json";
  link.click();
}
for (const b of document.querySelectorAll("button[data-choice]"))
  b.addEventListener("click", () => choose(b.dataset.choice));
by("back").addEventListener("click", () => { at = Math.max(0, at - 1); show(); });
by("forth").addEventListener("click", () => { at = Math.min(at + 1, data.trials.length - 1); show(); });
by("save").addEventListener("click", save);
document.addEventListener("keydown", e => {
  if (e.target.tagName === "INPUT") return;
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[e.key];
  if (choice) { e.preventDefault(); choose(choice); }
});
show();
"""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;
max-width:960px;margin:1.5em auto;padding:0 1em}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:16px}.side{display:flex;flex-wrap:wrap;gap:6px;
justify-content:center;min-height:256px;align-content:flex-start}.side img{border:1px solid #ccc;max-width:100%}
blockquote{margin:.5em 0;padding:.4em 1em;background:#f3f3f3}button{font:inherit;padding:.4em 1em;margin:.2em}
button[aria-pressed=true]{background:#1b6ca8;color:#fff}.row{text-align:center;margin:1em 0}"""


def _page(identity: str, trials: Sequence[dict]) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    content = json.dumps({"page": identity, "questions": QUESTIONS, "trials": list(trials)}, ensure_ascii=True)
    content = content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    keys = "Arrow keys choose: left, right, down for a tie."
    body = f"""<h1>Which is better?</h1>
<p>Choose, for each question, the left or the right side. {escape(keys)} When you are done, save your votes and send
the file to whoever gave you this page. Nothing leaves your computer by itself.</p>
<p id="count"></p><p><strong id="question"></strong></p><blockquote id="caption"></blockquote>
<div class="sides"><div class="side" id="left"></div><div class="side" id="right"></div></div>
<div class="row"><button data-choice="left">left</button> <button data-choice="tie">cannot tell</button>
<button data-choice="right">right</button></div>
<div class="row"><button id="back">back</button><button id="forth">forth</button>
<label>your name: <input id="name" maxlength="40" autocomplete="off"></label>
<button id="save">save votes</button></div>
<script type="application/json" id="data">{content}</script>
<script>{SCRIPT}</script>"""
    return html("Which is better?", body, policy, STYLE)
