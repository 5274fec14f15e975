"""evaluation.alignment: on pictures whose truth is known."""

import dataclasses
import json
import re

import numpy as np
import pytest

from unclip_jax.data import shapes
from unclip_jax.data.shapes_world import COLOURS
from unclip_jax.errors import UserError
from unclip_jax.evaluation import alignment, report

N = 24


@pytest.fixture
def truth(monkeypatch):
    """{prompt: the scene it was said of}: what a perfect model would draw."""
    known, describe = {}, shapes.describe

    def recorded(scene, *args, **kwargs):
        caption, claim = describe(scene, *args, **kwargs)
        known[caption] = scene
        return caption, claim

    monkeypatch.setattr(shapes, "describe", recorded)
    return known


def pictures(scenes):
    return np.stack([shapes.render(scene, 32) for scene in scenes])


def perfect(truth):
    return lambda prompts: pictures(truth[prompt] for prompt in prompts)


def test_true_pictures_are_right(truth):
    rows, seen = alignment.alignment(perfect(truth), num=N)
    kinds = [" ".join((row["objects"], row["pairs"], str(row["n"]))) for row in rows]
    assert kinds == ["one seen 24", "one heldout 24", "two seen 24", "two heldout 24", "all all 96"]
    assert all(row["right"] >= 0.95 for row in rows)
    assert all(row["low"] < row["right"] <= row["high"] for row in rows)
    assert len(seen["two heldout"][0]) == N and seen["two heldout"][1].shape == (N, 32, 32, 3)


def test_other_prompts_pictures_are_wrong(truth):
    rows, _ = alignment.alignment(lambda prompts: np.roll(perfect(truth)(prompts), 2 * N, 0), num=N)
    assert rows[-1]["right"] < 0.05
    assert rows[0]["attributes"]["count"] == {"n": N, "right": 0.0}  # two objects where one is claimed


def test_a_wrong_colour_is_told_apart_from_a_wrong_shape(truth):
    following = dict(zip(COLOURS, [*list(COLOURS)[1:], "red"], strict=True))

    def recoloured(scene):
        objects = [dataclasses.replace(o, colour=following[o.colour]) for o in scene.objects]
        return dataclasses.replace(scene, objects=tuple(objects))

    def draw(prompts):
        return pictures(recoloured(truth[prompt]) for prompt in prompts)

    rows, _ = alignment.alignment(draw, num=N, objects=["one"])
    shares = rows[-1]["attributes"]
    assert rows[-1]["right"] == 0 == shares["colour"]["right"]
    assert shares["shape"]["right"] > 0.9 and shares["count"]["right"] > 0.9


def test_held_out_prompts_hold_held_out_pairs(truth):
    _, seen = alignment.alignment(perfect(truth), num=N, objects=["two"])

    def holds(prompt):
        return any(shapes.is_held_out(o.shape, o.colour) for o in truth[prompt].objects)

    assert not any(map(holds, seen["two seen"][0])) and all(map(holds, seen["two heldout"][0]))


def test_the_table_and_the_sheet_tell_the_rows(truth):
    rows, seen = alignment.alignment(perfect(truth), num=4, objects=["one"])
    lines = report.plain(alignment.table(rows)).splitlines()
    assert len(lines) == 1 + len(rows)
    assert len({re.match(r"\S+ +\S+ +\S+", line).end() for line in lines}) == 1
    assert lines[1].split()[:3] == ["one", "seen", "4"]
    sheet = alignment.sheet(seen)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 8 * 160
    made = alignment.as_report({"model": "m", "num": 4, "results": rows}, seen)
    assert made.samples[0].captions == [f"[right] {prompt}" for prompt in seen["one seen"][0]]
    json.dumps(rows)


def test_a_label_names_what_is_wrong(truth):
    _, seen = alignment.alignment(lambda prompts: 0 * perfect(truth)(prompts), num=1, objects=["one"])
    ((prompt,), _, (verdict,)) = seen["one seen"]
    wrong = [key for key in alignment.KEYS if verdict.get(key) is False]
    made = alignment.as_report({"model": "m", "num": 1, "results": []}, seen)
    assert "count" in wrong and made.samples[0].captions == [f"[wrong {', '.join(wrong)}] {prompt}"]


@pytest.mark.parametrize(("bad", "words"), [({"num": 0}, "num=0"), ({"objects": ["four"]}, "'four'")])
def test_bad_arguments_are_named(bad, words):
    with pytest.raises(UserError, match=words):
        alignment.alignment(lambda prompts: None, **bad)
