"""`unclip reconstruct`."""

from pathlib import Path

from unclip_jax.cli.arguments import MAX_PICTURES, add_model, add_settings, command, count, counts, done, load
from unclip_jax.errors import UserError


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "reconstruct", "Draw pictures from ever more principal components of what CLIP sees.")
    sub.add_argument("image", nargs="+", metavar="IMAGE", help="one or more picture files")
    sub.add_argument("--dims", type=counts, metavar="N,N,…", help="how many components (2,4,8,… and all)")
    sub.add_argument("--out", required=True, metavar="FILE.png|DIR", help="one sheet, or a folder with single pictures")
    sub.add_argument("--data", metavar="SOURCE", help="measure the components on this data: shapes, icons or folder")
    sub.add_argument("--data-path", metavar="DIR", help="of the source 'folder'")
    sub.add_argument("--data-num", type=count, default=4096, metavar="N", help="pictures to measure them on (4096)")
    add_model(sub)
    add_settings(sub)
    done(sub)


def run(args) -> None:
    """Writes a row for each picture: itself, then what is drawn from its first components."""
    import numpy as np
    from PIL import Image

    from unclip_jax import data, gallery
    from unclip_jax.data.images import center_crop_resize

    single = Path(args.out).suffix.lower() == ".png"
    out = (gallery.check_file(args.out, ".png", args.overwrite) if single else
           gallery.check_folder(args.out, args.overwrite))  # fmt: skip
    if args.data is None and args.data_path is not None:
        raise UserError("--data-path is of the source of --data", "add --data folder")
    images = read_images(args.image)
    pipe, settings = load(args)
    pca = None
    if args.data is not None:
        extra = {} if args.data_path is None else {"path": args.data_path}
        side = pipe.configs["clip"].model.vision.image_size if pipe.configs["clip"].model.vision else pipe.size
        pca = pipe.components_of(data.make(args.data, "train", size=side, **extra), args.data_num)
    available = (pca or pipe.kept_components()).std.shape[0]
    dims = args.dims or [*(2**k for k in range(1, 12) if 2**k < available), available]
    if len(images) * (1 + len(dims)) > MAX_PICTURES:
        raise UserError(f"{len(images)} pictures x {1 + len(dims)} are more than {MAX_PICTURES}", "name fewer")
    drawn = pipe.reconstruct(images, dims, args.seed, pca=pca, batch_size=args.batch_size, **settings)
    originals = np.stack([center_crop_resize(Image.fromarray(image), pipe.size) for image in images])
    rows = np.concatenate([originals[:, None], drawn.reshape(len(images), len(dims), *drawn.shape[1:])], axis=1)
    rows = rows.reshape(-1, *drawn.shape[1:])
    labels = [f"{Path(path).name}{part}" for path in args.image for part in ("", *(f", {k} dims" for k in dims))]
    used = {name: value for name, value in pipe.settings(**settings).items() if not name.startswith("prior")}
    facts = {"seed": args.seed, "model": Path(args.model).name, "dims": dims, "data": args.data, "settings": used}
    if single:
        gallery.write_image(out, gallery.labelled_grid(rows, labels, 1, 1 + len(dims)), facts)
    else:
        gallery.write(out, rows, labels, facts, ncols=1 + len(dims))
    print(f"{len(images)} pictures from {', '.join(map(str, dims))} of {available} components in {out}")


def read_images(paths: list[str]) -> list:
    """The pictures u8[h, w, 3] in files; UserError names the first that is none."""
    import numpy as np

    from unclip_jax.data.images import open_image

    return [np.asarray(open_image(path)) for path in paths]
