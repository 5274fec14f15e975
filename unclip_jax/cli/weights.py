"""`unclip export` and `unclip convert`."""

import shlex

from unclip_jax.cli.arguments import command, listed
from unclip_jax.errors import UserError


def add_export(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, export, "export", "Collect trained stages into one directory to sample from.")
    more = dict.fromkeys(("prior", "prior-ar"), "; one of the two priors, or both")
    more["clip"] = "; left out with the priors where the decoder knows none"
    for name in ("clip", "prior", "prior-ar", "decoder"):
        about = "workdir of its run, or a stack" + more.get(name, "")
        sub.add_argument(f"--{name}", required=name == "decoder", metavar="DIR", help=about)
    sub.add_argument("--upsampler", action="append", default=[], metavar="DIR", help="alike; may be given again")
    sub.add_argument("out", metavar="OUT", help="the directory to make")
    sub.add_argument(
        "--analytic", type=listed, default=[], metavar="STAGES", help="measure what the sampler analytic needs: prior,…"
    )
    sub.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    sub.add_argument("--overwrite", action="store_true", help="replace the stack that is there")


def add_convert(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, convert, "convert", "Make a stack of public weights, or the other way round.")
    way = sub.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--from", dest="origin", metavar="FORMAT", help="of PATH: hf-clip, open-clip, karlo, glide or inception"
    )
    way.add_argument("--to", dest="target", metavar="FORMAT", help="to make of the stack PATH: hf-clip or karlo")
    sub.add_argument("path", metavar="PATH", help="a directory or file of weights, a hub's org/name, or a stack")
    sub.add_argument("out", metavar="OUT", help="the directory to make")
    sub.add_argument("--tokenizer", metavar="DIR", help="its folder, where it is not beside the weights")
    sub.add_argument("--sha256", metavar="HEX", help="refuse a PATH, one file of weights, that has another")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of what is written")
    sub.add_argument("--overwrite", action="store_true", help="replace what such a command made there")


def export(args) -> None:
    """Makes a stack of workdirs."""
    from unclip_jax import gallery

    gallery.check_folder(args.out, overwrite=True)
    from unclip_jax.export import collect

    stages = (args.clip, args.prior, args.decoder, args.upsampler)
    out = collect(args.out, *stages, args.dtype, args.overwrite, args.analytic, args.prior_ar)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")
    print(f'draw with: unclip sample "a red circle" --model {shlex.quote(args.out)} --out out/sample')


def convert(args) -> None:
    """Makes a stack of others' weights, or weights for others of a stack."""
    from unclip_jax.interop import convert as formats

    if args.target:
        for flag in ("tokenizer", "sha256"):
            if getattr(args, flag):
                raise UserError(f"--{flag} is for --from; a stack has its own", "leave it out")
        out = formats.convert_out(args.target, args.path, args.out, args.dtype, args.overwrite)
    else:
        given = (args.path, args.out, args.tokenizer, args.dtype, args.overwrite, args.sha256)
        out = formats.convert_in(args.origin, *given)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
