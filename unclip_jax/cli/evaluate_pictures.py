"""`unclip evaluate` of pictures against real ones: from flags to `evaluation.sweep.run`."""

import shutil
import tempfile
import warnings
from pathlib import Path

from unclip_jax.cli.arguments import given_settings
from unclip_jax.cli.evaluate import out_of, show
from unclip_jax.errors import UserError, suggest

# What a sweep may vary, and how its values are read.
TYPES = {
    "guidance": float, "steps": int, "sampler": str, "prior_guidance": float, "prior_steps": int, "candidates": int,
    "upsample_steps": int, "prior": str, "prior_sampler": str, "prior_temperature": float, "prior_top_p": float,
    "rescale": float, "threshold": float, "model": str,
}  # fmt: skip


def run(args) -> None:
    """Prints, and on request writes, the metrics of drawn pictures."""
    from unclip_jax import distributed, gallery
    from unclip_jax.evaluation import protocol, sweep

    distributed.initialize()
    for name in args.metrics:
        if name not in protocol.METRICS:
            raise UserError(f"metrics={name!r} is unknown", suggest(name, protocol.METRICS))
    out = out_of(args)
    combinations = sweep.parse(args.sweep or [], TYPES)
    if doubled := sorted(set(combinations[0]) & set(given_settings(args))):
        flag = doubled[0].replace("_", "-")
        raise UserError(f"--{flag} and --sweep {doubled[0]}=… set the same", "leave out one of them")
    wanted = set(args.metrics)
    if wanted & protocol.WITH_REAL and args.data is None and args.reference is None:
        named = sorted(wanted & protocol.WITH_REAL)[0]
        raise UserError(f"metric {named!r} compares with real pictures", "give --data SOURCE or --reference FILE.npz")
    if args.path is not None and args.data is None:
        raise UserError(f"path={args.path!r} is of a source, and none is given", "give --data SOURCE as well")
    if args.images is None and args.data is None:
        raise UserError("pictures are drawn from the captions of --data", "give --data SOURCE, or --images DIR")
    if args.reference is not None and args.data is None and not Path(args.reference).is_file():
        raise UserError(f"reference {args.reference!r} does not exist", "give --data as well to make it")
    if args.reference is not None and not Path(args.reference).exists():
        try:
            gallery.check_file(args.reference, Path(args.reference).suffix.lower())
        except UserError:  # known before hours are spent
            raise UserError(f"reference {args.reference!r} cannot be written", "give another --reference") from None
    _models_exist(args, combinations)
    with _work(args) as folder:
        made = _measure(args, combinations, folder)
    if distributed.is_main():
        show(made, out)


class _work:
    """The folder of features: --work, kept; else one beside the report, removed when all is done."""

    def __init__(self, args):
        import jax

        self.keep = args.work is not None
        beside = Path(args.out).with_suffix(".work") if args.out is not None else None
        self.path = Path(args.work) if self.keep else beside
        self.temporary = self.path is None
        if self.temporary and jax.process_count() > 1:
            raise UserError("several processes need a folder to share", "give --work DIR on a disk that all see")

    def __enter__(self) -> Path:
        if self.temporary:
            self.path = Path(tempfile.mkdtemp(prefix="unclip-evaluate-"))
        return self.path

    def __exit__(self, kind, *_):
        from unclip_jax import distributed
        from unclip_jax.evaluation.work import Work

        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        elif kind is None and not self.keep and distributed.is_main():
            Work(self.path).clear()


def _models_exist(args, combinations) -> None:
    """Every stack and setting is looked at before the first picture is drawn."""
    if args.images is not None:
        return
    from unclip_jax.settings import Settings
    from unclip_jax.stack import open_stack

    for name in {c.get("model", args.model) for c in combinations}:
        open_stack(name)
    for combination in combinations:
        Settings(**{k: v for k, v in {**given_settings(args), **combination}.items() if k != "model"})


def _measure(args, combinations, folder: Path):
    from unclip_jax import distributed
    from unclip_jax.evaluation import pictures, protocol, reference, sweep
    from unclip_jax.evaluation.work import Work

    networks, embed = _networks(args)
    plan = protocol.Protocol(args.metrics, networks, embed, args.bootstrap, args.seed)
    drawn = pictures.PictureFolder(args.images, args.num) if args.images is not None else None
    args.num = len(drawn) if drawn else args.num
    stacks = {} if drawn else _stacks(args, combinations)
    sizes = {drawn.size} if drawn else {pipe.size for pipe, _ in stacks.values()}
    if len(sizes) > 1:
        raise UserError(f"the stacks draw pictures of {sorted(sizes)} pixels", "compare stacks of one size")
    size = sizes.pop()
    facts = {"num": args.num, "seed": args.seed}
    captions = real = None
    if args.data is not None:
        source, about = pictures.source(args.data, size, args.seed, args.path)
        facts["data"] = about
        real = pictures.RealPictures(source, args.num, about)
        captions = None if drawn else real.captions()
    work = Work(folder)
    statistics = _real(args, plan, real, work, size, facts) if plan.needs_real else None
    points = [_folder_point(args, drawn)] if drawn else _points(args, combinations, stacks, captions, size)
    made = sweep.run(plan, points, statistics, work, facts)
    new = args.reference is not None and statistics is not None and not Path(args.reference).exists()
    if new and distributed.is_main():
        reference.save(Path(args.reference), statistics, real.about, networks)
    return made


def _networks(args):
    """The networks that look, and the function that embeds captions."""
    from unclip_jax import tasks
    from unclip_jax.evaluation import features
    from unclip_jax.interop import inception
    from unclip_jax.stack import located
    from unclip_jax.tokenizer import Tokenizer

    wanted, networks, embed = set(args.metrics), {}, None
    if args.inception is not None:
        networks["inception"] = features.inception(*inception.load(args.inception))
    by_main = wanted & {"fid", "kid", "precision_recall"} and "inception" not in networks
    if by_main or wanted & {"cmmd", "clip_score"}:
        clip = tasks.load_clip(args.clip if args.clip is not None else located(args.model))
        networks["clip"] = features.clip(clip.model, clip.params, clip.identity)
        tokenizer = Tokenizer.from_json(clip.tokenizer_json)
        embed = lambda texts: features.embed_texts(clip.model, clip.params, tokenizer, texts)  # noqa: E731
    return networks, embed


def _stacks(args, combinations) -> dict:
    """{model: (pipeline over all devices of this host, its identity)}."""
    from unclip_jax.pipeline import UnCLIP
    from unclip_jax.stack import identity

    made = {}
    for name in dict.fromkeys(c.get("model", args.model) for c in combinations):
        pipe = UnCLIP.load(name, low_memory=args.low_memory)
        pipe = pipe.without_upsamplers() if args.base else pipe
        made[name] = pipe.spread(), identity(name)
    for combination in combinations:
        settings = {k: v for k, v in {**given_settings(args), **combination}.items() if k != "model"}
        made[combination.get("model", args.model)][0].settings(**settings)
    return made


def _points(args, combinations, stacks, captions, size):
    """What to draw and measure, one for each combination of settings."""
    from unclip_jax.evaluation.pictures import DrawnPictures
    from unclip_jax.evaluation.sweep import Point

    points = []
    for name, (pipe, _) in stacks.items():
        _warn_of_long(Path(name).name, pipe, captions)
    for combination in combinations:
        name = combination.get("model", args.model)
        pipe, identity = stacks[name]
        settings = {k: v for k, v in {**given_settings(args), **combination}.items() if k != "model"}

        def draw(texts, first, pipe=pipe, settings=settings):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "text has .* tokens")  # said once, of all
                return pipe.generate(texts, args.seed, first=first, batch_size=args.batch_size, **settings)

        about = {"model": Path(name).name, "identity": identity, "seed": args.seed, "base": args.base, "size": size}
        about["settings"] = pipe.settings(**settings)
        label = ", ".join(f"{k}={Path(v).name if k == 'model' else v}" for k, v in combination.items())
        points.append(Point(label or Path(name).name, combination, DrawnPictures(draw, captions, size, about)))
    return points


def _warn_of_long(name: str, pipe, captions) -> None:
    """One warning for all captions that a stack cannot take whole."""
    with warnings.catch_warnings(record=True) as lost:
        warnings.simplefilter("always")
        pipe.tokenizer.encode(captions)
    if lost:
        room = pipe.tokenizer.max_len - 2
        said = f"{len(lost)} of {len(captions)} captions have more than the {room} tokens that {name} takes: cut"
        warnings.warn(said, stacklevel=2)


def _folder_point(args, drawn):
    from unclip_jax.evaluation.sweep import Point

    return Point(Path(args.images).resolve().name, {}, drawn)


def _real(args, plan, real, work, size, facts):
    """Statistics of the real pictures: from the file where it is there, else of --data."""
    from unclip_jax.evaluation import reference

    file = Path(args.reference) if args.reference is not None else None
    if file is not None and file.exists():
        facts["reference"] = file.name
        return reference.load(file, plan.main, plan.networks, size, real.about if real else None)
    series = plan.look("real", real, work)
    return reference.of_series(series, plan.networks, plan.main.name)
