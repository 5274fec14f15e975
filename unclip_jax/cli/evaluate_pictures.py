"""`unclip evaluate` of pictures against real ones: from flags to `evaluation.sweep.run`.

Imported by the command when it runs, so this may import what is slow.
"""

import contextlib
import tempfile
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from unclip_jax import distributed, gallery, tasks
from unclip_jax.cli.arguments import given_settings
from unclip_jax.cli.evaluate import out_of, show
from unclip_jax.cli.programs import keep
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features, pictures, protocol, reference, sweep
from unclip_jax.evaluation.work import Work
from unclip_jax.interop import inception
from unclip_jax.pipeline import UnCLIP
from unclip_jax.settings import Settings
from unclip_jax.stack import identity, open_stack
from unclip_jax.tokenizer import Tokenizer

# What a sweep may vary, and the kind of its values: of `float | None` the float.
SWEPT = {name: typing.get_args(kinds)[0] for name, kinds in typing.get_type_hints(Settings).items()} | {"model": str}


class Draw(NamedTuple):
    """Pictures to draw: what of the sweep is theirs, the stack, and every setting that was given."""

    swept: dict[str, Any]
    model: str
    settings: dict[str, Any]


def run(args) -> None:
    """Prints, and on request writes, the metrics of drawn pictures."""
    distributed.initialize()
    out = out_of(args)
    _check(args)
    draws = draws_of(args) if args.images is None else []
    for name in {draw.model for draw in draws}:  # before hours are spent on the first
        open_stack(name)
    with _work_folder(args) as folder:
        made = _measure(args, draws, folder)
    if distributed.is_main():
        show(made, out)


def draws_of(args) -> list[Draw]:
    """One for each combination of the sweep, its settings known to be possible."""
    given, draws = given_settings(args), []
    for swept in sweep.parse(args.sweep or [], SWEPT):
        if doubled := [name for name in swept if name in given]:
            flag = doubled[0].replace("_", "-")
            raise UserError(f"--{flag} and --sweep {doubled[0]}=… set the same", "leave out one of them")
        settings = given | {name: value for name, value in swept.items() if name != "model"}
        Settings(**settings)
        draws.append(Draw(swept, swept.get("model", args.model), settings))
    return draws


def _check(args) -> None:
    """UserError for what is missing, unknown, or cannot be written in the end."""
    for name, metric in sorted(protocol.wanted(args.metrics).items()):
        if metric.real and args.data is None and args.reference is None:
            what = f"metric {name!r} compares with real pictures"
            raise UserError(what, "give --data SOURCE or --reference FILE.npz")
    if args.path is not None and args.data is None:
        raise UserError(f"path={args.path!r} is of a source, and none is given", "give --data SOURCE as well")
    if args.images is None and args.data is None:
        raise UserError("pictures are drawn from the captions of --data", "give --data SOURCE, or --images DIR")
    file = Path(args.reference) if args.reference is not None else None
    if file is not None and args.data is None and not file.is_file():
        raise UserError(f"reference {args.reference!r} does not exist", "give --data as well to make it")
    try:
        if file is not None and not file.exists():
            gallery.check_file(args.reference, file.suffix.lower())
    except UserError:
        raise UserError(f"reference {args.reference!r} cannot be written", "give another --reference") from None


@contextlib.contextmanager
def _work_folder(args) -> Iterator[Path]:
    """The folder of features: --work, which stays; else one beside the report, or a temporary one, till all is done."""
    if args.work is not None:
        yield Path(args.work)
    elif args.out is not None:
        folder = Path(args.out).with_suffix(".work")
        yield folder
        if distributed.is_main():
            Work(folder).clear()
    elif jax.process_count() > 1:
        raise UserError("several processes need a folder to share", "give --work DIR on a disk that all see")
    else:
        with tempfile.TemporaryDirectory(prefix="unclip-evaluate-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def _measure(args, draws: Sequence[Draw], folder: Path):
    plan = protocol.Protocol(args.metrics, *_networks(args), args.bootstrap, args.seed)
    if args.images is not None:
        images = pictures.PictureFolder(args.images, args.num, plan.needs_captions)
        size, num = images.size, len(images)
    else:
        stacks = _stacks(args, draws)
        sizes, num = {pipe.size for pipe, _ in stacks.values()}, args.num
        if len(sizes) > 1:
            raise UserError(f"the stacks draw pictures of {sorted(sizes)} pixels", "compare stacks of one size")
        (size,) = sizes
    facts = {"num": num, "seed": args.seed}
    real = None
    if args.data is not None:
        source, about = pictures.source(args.data, size, args.seed, args.path, asked=args.images is None)
        facts["data"] = about
        real = pictures.RealPictures(source, num, about)
    work = Work(folder)
    statistics = _statistics(args, plan, real, work, size, facts) if plan.needs_real else None
    if args.images is not None:
        points = [sweep.Point(Path(args.images).resolve().name, {}, images)]
    else:
        points = _points(args, draws, stacks, real.captions(), size)
    made = sweep.run(plan, points, statistics, work, facts)
    new = args.reference is not None and statistics is not None and not Path(args.reference).exists()
    if new and distributed.is_main():
        reference.save(Path(args.reference), statistics, real.about, plan.networks)
    return made


def _networks(args):
    """The networks that look, and the function that embeds captions."""
    needs = {metric.network for metric in protocol.wanted(args.metrics).values()}
    networks, embed = {}, None
    if args.inception is not None:
        networks["inception"] = features.inception(*inception.load(args.inception))
    if "clip" in needs or ("main" in needs and not networks):
        clip = tasks.load_clip(args.clip if args.clip is not None else args.model)
        networks["clip"] = features.clip(clip.model, clip.params, clip.identity)
        tokenizer = Tokenizer.from_json(clip.tokenizer_json)
        embed = lambda texts: features.embed_texts(clip.model, clip.params, tokenizer, texts)  # noqa: E731
    return networks, embed


def _stacks(args, draws: Sequence[Draw]) -> dict[str, tuple[UnCLIP, str]]:
    """{model: (pipeline over all devices of this host, its identity)}, each fit for what it is to draw."""
    made = {}
    for name in dict.fromkeys(draw.model for draw in draws):
        keep()
        pipe = UnCLIP.load(name, low_memory=args.low_memory)
        pipe = pipe.without_upsamplers() if args.base else pipe
        made[name] = pipe.spread(), identity(name)
    for draw in draws:
        made[draw.model][0].settings(**draw.settings)
    return made


def _points(args, draws: Sequence[Draw], stacks: Mapping, captions: Sequence[str], size: int) -> list[sweep.Point]:
    """What to draw and measure."""
    for name, (pipe, _) in stacks.items():
        _warn_of_long(Path(name).name, pipe, captions)
    points = []
    for swept, model, settings in draws:
        pipe, weights = stacks[model]

        def draw(texts, first, pipe=pipe, settings=settings):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "text has .* tokens")  # said once, of all
                return pipe.generate(texts, args.seed, first=first, batch_size=args.batch_size, **settings)

        name = Path(model).name
        about = {"model": name, "identity": weights, "seed": args.seed, "base": args.base, "size": size}
        about["settings"] = pipe.settings(**settings)
        label = ", ".join(f"{k}={name if k == 'model' else sweep.text_of(v)}" for k, v in swept.items())
        points.append(sweep.Point(label or name, swept, pictures.DrawnPictures(draw, captions, size, about)))
    return points


def _warn_of_long(name: str, pipe: UnCLIP, captions: Sequence[str]) -> None:
    """One warning for all captions that a stack cannot take whole."""
    with warnings.catch_warnings(record=True) as lost:
        warnings.simplefilter("always")
        pipe.tokenizer.encode(captions)
    if lost:
        room = pipe.tokenizer.max_len - 2
        text = f"{len(lost)} of {len(captions)} captions have more than the {room} tokens that {name} takes: cut"
        warnings.warn(text, stacklevel=2)


def _statistics(
    args, plan: protocol.Protocol, real: pictures.RealPictures | None, work: Work, size: int, facts: dict
) -> reference.Reference:
    """Of the real pictures: from the file where it is there, which `facts` then tells, else of --data."""
    file = Path(args.reference) if args.reference is not None else None
    if file is not None and file.exists():
        facts["reference"] = file.name
        return reference.load(file, plan.main, plan.networks, size, real.about if real else None)
    series = plan.look("real", real, work)
    return reference.of_series(series, plan.networks, plan.main.name)
