"""What a training run tells on the way: a progress bar, metrics.jsonl, TensorBoard, W&B, previews, held-out metrics."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from unclip_jax import distributed, optim, sharding, tasks, track
from unclip_jax.data import images
from unclip_jax.gallery import write_image
from unclip_jax.meter import Meter
from unclip_jax.storage import new_file


class Logs:
    """Progress bar, metrics.jsonl, TensorBoard, and W&B where `config.track` says so; written by the main process.

    Metrics stay on the device until they are written, so that no step waits for the host.

    Args:
      config: of the run.
      workdir: where the files go.
      start: steps done before; what an earlier process logged after them is dropped, as it is done again.
      meter: of the run's time.
    """

    def __init__(self, config, workdir: Path, start: int, meter: Meter):
        self.pending: list[dict] = []
        self.batch_size = config.batch_size
        self.rate = optim.learning_rate(config.num_steps, **config.optim)
        self.meter, self.number = meter, start
        self.main, self.mirror = distributed.is_main(), None
        settings = {"desc": config.task, "unit": "step", "disable": not self.main, "mininterval": 1, "file": _Unheard()}
        self.bar = tqdm(total=config.num_steps, initial=start, **settings)
        if self.main:
            path = workdir / "metrics.jsonl"
            _keep_until(path, start)
            self.file, self.board = path.open("a", encoding="utf-8"), Board(workdir / "tb", start)
            if project := config.get("track"):
                self.mirror = track.Mirror(project, workdir, config.to_dict())

    def add(self, metrics: dict) -> None:
        """Takes one step's metrics, still on the device."""
        self.pending.append(metrics)

    def write(self, number: int) -> bool:
        """Means since the last time; waits for the device. False where a step's loss was not finite."""
        if not self.pending:
            return True
        fetched = jax.device_get(self.pending)
        self.meter.lap("step")
        self.pending = []
        steps, self.number = number - self.number, number
        means = {k: float(np.mean([m[k] for m in fetched])) for k in fetched[0]}
        means |= self.meter.read(steps, self.batch_size, jax.devices()[0].device_kind)
        means["learning_rate"] = float(self.rate(number - 1))
        speed = f"{means['images_per_second']:.0f} images/s" + (f", MFU {means['mfu']:.1%}" if "mfu" in means else "")
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, {speed}")
        self.bar.update(steps)
        self.record(number, means)
        return bool(np.isfinite([m["loss"] for m in fetched]).all())

    def record(self, number: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl (null: not finite), and the same scalars for TensorBoard and W&B."""
        if self.main:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.file.write(json.dumps({"step": number, **finite}) + "\n")
            self.file.flush()
            self.board.scalars(number, values)
        if self.mirror:
            self.mirror.scalars(number, values)

    def picture(self, number: int, path: Path) -> None:
        """Sends the preview after step `number` to W&B."""
        if self.mirror:
            self.mirror.preview(number, path)

    def close(self) -> None:
        """Ends the bar and the files."""
        self.bar.close()
        if self.main:
            self.file.close()
            self.board.close()
        if self.mirror:
            self.mirror.close(failed=sys.exc_info()[0] is not None)


class Board:
    """Events for TensorBoard, written at once.

    tensorboardX's SummaryWriter leaves that to a thread, which a full disk ends; scalars then wait for it for ever.

    Args:
      folder: where the file goes; made where it is missing.
      start: steps done before; TensorBoard drops what earlier files say of those after.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        folder.mkdir(exist_ok=True)
        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.writer = EventsWriter(str(folder / "events"))
        self._write(start + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def scalars(self, number: int, values: Mapping[str, float]) -> None:
        """Of step `number`."""
        pairs = [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(number, summary=self.summary(value=pairs))

    def _write(self, number: int, **content) -> None:
        self.writer.write_event(self.event(wall_time=time.time(), step=number, **content))
        self.writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self.writer.close()


class Checks:
    """Previews and metrics of the averaged weights on held-out data, while training.

    Args:
      run: of `run.make_run`.
      batches: batches(start, source, size, **loader settings) yields batches on the run's devices.
      stop: of the run's signals.
    """

    def __init__(self, run, batches: Callable, stop: distributed.StopSignals):
        self.run, self.batches, self.stop = run, batches, stop
        self.settings, self.seed = run.config.eval, run.config.seed
        self.measure = tasks.measurer(run.task)
        self.draw = jax.jit(self._draw, out_shardings=sharding.replicated(run.mesh))
        self.batch = None

    def _draw(self, params, frozen, batch):
        task = self.run.task
        return images.to_uint8(task.preview(params, task.encode(frozen, batch), jax.random.key(self.seed)))

    def due(self, params, number: int, last: bool, logs: Logs) -> bool:
        """Takes what `config.every` asks for after step `number`; whether it asks for any."""
        every = self.run.config.every
        preview, evaluate = (n and (number % n == 0 or last) for n in (every.preview, every.eval))
        if preview:
            logs.picture(number, self.preview(params, number))
        if evaluate:
            logs.record(number, self.evaluate(params))
        return bool(preview or evaluate)

    def preview(self, params, number: int) -> Path:
        """Writes previews/step_N.png: the same held-out examples and noise each time. Gives its path."""
        parts = sharding.parts_of_batch(self.run.mesh)
        size = -(-self.settings.preview // parts) * parts
        if self.batch is None:
            plain = {"crop": None, "num_workers": 0, "shuffle": False}
            self.batch = next(self.batches(0, self.run.held_out, size, **plain))
        pictures = np.asarray(self.draw(params, self.run.frozen, self.batch))
        path = self.run.workdir / "previews" / f"step_{number:07d}.png"
        if distributed.is_main():
            write_image(path, images.grid(pictures, min(len(pictures), size)), {"step": str(number)})
        return path

    def evaluate(self, params) -> dict[str, float]:
        """{"eval/metric": value} over `eval.batches` batches of the evaluation split.

        Raises:
          Stopped: a signal asks for a stop before all are measured.
        """
        stream = self.batches(0, self.run.held_out, self.run.config.batch_size, num_workers=0)
        measured = self.measure(self.run.frozen, params, self._unless_stopped(stream), self.settings.batches)
        return {f"eval/{name}": value for name, value in measured.items()}

    def _unless_stopped(self, stream: Iterator) -> Iterator:
        for batch in stream:
            if self.stop.reached():
                raise Stopped
            yield batch


class Stopped(Exception):
    """A stop was asked for in the midst of an evaluation."""


class Trace:
    """A profiler's trace of a few steps of each process, the second of it and those after.

    Args:
      folder: where it goes; None: nowhere, and all methods do nothing.
      start, end: steps done before, and the run's last one.
    """

    STEPS = 3

    def __init__(self, folder: Path | None, start: int, end: int):
        self.folder = folder
        self.first, self.last = min(start + 2, end), min(start + 1 + self.STEPS, end)
        self.running = False

    def before(self, number: int) -> None:
        """Of step `number`."""
        if self.folder is not None and number == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, number: int, result) -> None:
        """Of step `number`, whose result is waited for where it is the last one traced."""
        if self.running and number == self.last:
            jax.block_until_ready(result)
            self.close()
            say(f"steps {self.first} to {self.last} are traced in {self.folder} (xprof --logdir {self.folder})")

    def close(self) -> None:
        """Writes what there is."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


def say(text: str) -> None:
    """One line on stderr, by the main process, above a progress bar if there is one."""
    if distributed.is_main():
        tqdm.write(text, file=_Unheard())


class _Unheard:
    """Standard error, where it does not matter whether anybody still reads it: a run outlives its terminal."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with new_file(path) as stream:
        stream.write("".join(kept).encode())
