"""Compiled for slices that are not here: the paper's priors for the one that the manual names, which fit and are split.

Needs libtpu, the compiler (extra [tpu], 0.7 GB), and about two minutes of a core for each of the paper's.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra [tpu])")


def plan(*command: str) -> subprocess.CompletedProcess:
    """In a process of its own: a program of libtpu's is there for good, and holds a lock."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    command = [sys.executable, "-m", "unclip_jax.cli", "plan", *command]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "stage"), [("v4:2x2x1", "clip"), ("v6e:2x2", "upsampler")])
def test_a_small_stage_is_planned_without_a_word_of_libtpus(topology, stage, tmp_path):
    what, out = "train" if stage == "clip" else "sample", str(tmp_path / "plan.json")
    settings = ("--what", what, "--quick", "--out", out)
    done = plan("--config", f"configs/shapes/{stage}.py:tiny", "--topology", topology, *settings)
    assert (done.returncode, done.stderr) == (0, "")
    (report,) = json.loads(Path(out).read_text())
    assert report["fits"] and report["compiled"] and report["devices"] == 4


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prior_diffusion", "prior_ar"])
def test_the_papers_priors_fit_a_slice_that_is_not_here(stage, tmp_path):
    out = tmp_path / "plan.json"
    done = plan("--config", f"configs/dalle2/{stage}.py", "--topology", "v5p:4x8x8", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = json.loads(out.read_text())
    assert report["fits"] and report["compiled"] and report["devices"] == 256 and report["batch_size"] == 4096
    assert report["peak"] < 0.9 * report["limit"]
    # Parameters in f32 over mesh.fsdp=8 devices, but for the few arrays too small or odd to split; AdamW has two more.
    parameters = {"prior_diffusion": 1_324_648_448, "prior_ar": 2_119_287_040}[stage]
    assert 4 * parameters / 8 <= report["held"]["parameters"] < 1.01 * 4 * parameters / 8
    assert report["held"]["optimizer"] == pytest.approx(2 * report["held"]["parameters"], rel=1e-3)
    # Weights are gathered and gradients reduced over devices; forward and backward passes alone are 6 FLOPs a weight.
    kinds = {c[0] for c in report["collectives"]}
    assert "all-gather" in kinds and kinds & {"reduce-scatter", "all-reduce"}
    assert report["model_flops"] <= report["flops"]
