"""A run's metrics and previews sent to Weights & Biases as well, where `config.track` names a project there.

It gets the config, the scalars of metrics.jsonl and the previews; neither the console nor code, nor what machine it is.
A workdir is one run there, found again by the id in its file `wandb_id`. Whatever fails there stops no training.
"""

import contextlib
import re
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from unclip_jax.errors import UserError
from unclip_jax.storage import new_file

ID = "wandb_id"
SETTINGS = {"console": "off", "disable_git": True, "disable_code": True, "x_disable_machine_info": True}
SETTINGS |= {"x_save_requirements": False, "finish_timeout": 60}  # seconds that a run's end waits for what is not sent


def check(project) -> None:
    """Raises UserError for a `config.track` that names no project, or where wandb is not installed; "" is none."""
    if not project:
        return
    if not isinstance(project, str) or not re.fullmatch(r"([\w.-]+/)?[^/\\#?%:]{1,128}", project):
        raise UserError(f"track={project!r} must name a project of Weights & Biases, as PROJECT or ENTITY/PROJECT")
    try:
        import wandb  # noqa: F401
    except ImportError as e:
        raise UserError(f"track={project!r} needs the package {e.name}", 'pip install "unclip_jax[track]"') from e


class Mirror:
    """The run of a workdir at W&B; of a failure there one warning, and no more is sent by this process.

    Args:
      project: PROJECT or ENTITY/PROJECT.
      workdir: where the id is kept, and what is not sent yet.
      config: JSON values, shown beside the run.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping):
        self.run = None
        with self._warned():
            import wandb

            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):  # nobody may be there to ask
                raise RuntimeError("not logged in; run `wandb login`, or set WANDB_MODE=offline")
            entity, _, name = project.rpartition("/")
            self.run = wandb.init(
                project=name, entity=entity or None, id=_id(workdir), resume="allow", name=workdir.resolve().name,
                dir=str(workdir), config=dict(config), allow_val_change=True, settings=wandb.Settings(**SETTINGS),
            )  # fmt: skip
            self.run.define_metric("*", step_metric="step")  # W&B's own steps cannot go back, and a resumed run does
            self.image: Callable = wandb.Image

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends what a line of metrics.jsonl holds."""
        if self.run is not None:
            with self._warned():
                self.run.log({"step": step, **values})

    def preview(self, step: int, path: Path) -> None:
        """Sends a picture's file."""
        if self.run is not None:
            with self._warned():
                self.run.log({"step": step, "preview": self.image(str(path))})

    def close(self, failed: bool) -> None:
        """Ends the run there, until it goes on."""
        if self.run is not None:
            with self._warned():
                self.run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _warned(self):
        try:
            yield
        except Exception as e:
            self.run = None
            why = f"{type(e).__name__}: {e}".splitlines()[0][:300]
            warnings.warn(f"no more is sent to Weights & Biases, and training goes on ({why})", stacklevel=4)


def _id(workdir: Path) -> str:
    """The run's id, made where the workdir has none."""
    path = workdir / ID
    if not path.is_file():
        with new_file(path) as stream:
            stream.write(secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8").strip()
