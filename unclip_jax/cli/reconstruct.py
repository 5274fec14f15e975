"""`unclip reconstruct`."""

from unclip_jax.cli.arguments import add_model, add_output, add_settings, command, count, counts, load
from unclip_jax.cli.pictures import at_most, beside, finish, read_picture
from unclip_jax.errors import UserError


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "reconstruct", "Draw pictures from ever more principal components of what CLIP sees.")
    sub.add_argument("image", nargs="+", metavar="IMAGE", help="one or more picture files")
    sub.add_argument("--dims", type=counts, metavar="N,N,…", help="how many components (2,4,8,… and all)")
    add_output(sub)
    sub.add_argument("--data", metavar="SOURCE", help="measure the components on this data: shapes, icons or folder")
    sub.add_argument("--data-path", metavar="DIR", help="of the source 'folder'")
    sub.add_argument("--data-num", type=count, default=4096, metavar="N", help="pictures to measure them on (4096)")
    add_model(sub)
    add_settings(sub)


def run(args) -> None:
    """Writes a row for each picture: itself, then what is drawn from its first components."""
    from unclip_jax import data, gallery

    out = gallery.check_folder(args.out, args.overwrite)
    if args.data is None and args.data_path is not None:
        raise UserError("--data-path is of the source of --data", "add --data folder")
    images = [read_picture(path) for path in args.image]
    pipe, settings = load(args)
    pca = None
    if args.data is not None:
        extra = {} if args.data_path is None else {"path": args.data_path}
        side = pipe.configs["clip"].model.vision.image_size if pipe.configs["clip"].model.vision else pipe.size
        pca = pipe.components_of(data.make(args.data, "train", size=side, **extra), args.data_num)
    available = (pca or pipe.kept_components()).std.shape[0]
    dims = args.dims or [*(2**k for k in range(1, 12) if 2**k < available), available]
    at_most(len(images) * (1 + len(dims)))
    drawn = pipe.reconstruct(images, dims, args.seed, pca=pca, batch_size=args.batch_size, **settings)
    columns = [(f"{k} dims", {"role": "reconstruction", "dims": k}) for k in dims]
    rows = beside(args.image, pipe.squares(images, pipe.size), drawn, columns)
    finish(args, out, rows, pipe.embedded_settings(settings), components=args.data or "of the prior")
    print(f"there are {available} components")
