"""`unclip vary`."""

from unclip_jax.cli.arguments import (
    add_model,
    add_output,
    add_settings,
    at_most,
    command,
    count,
    done,
    facts_of,
    load,
    name_of,
    read_picture,
    share,
    told,
)


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "vary", "Draw what pictures show anew: variations, by DDIM inversion.")
    sub.add_argument("image", nargs="+", help="picture files; the middle square is looked at")
    sub.add_argument("--num", type=count, default=4, help="variations of each picture (4)")
    way = sub.add_mutually_exclusive_group()
    way.add_argument(
        "--eta", type=share, default=0.5, metavar="E", help="chance in each step: 0 the picture itself … 1 (0.5)"
    )
    way.add_argument("--white-noise", action="store_true", help="keep what CLIP sees and nothing else")
    add_output(sub)
    add_model(sub)
    add_settings(sub)
    done(sub)


def run(args) -> None:
    """Draws variations of the pictures into a folder."""
    from unclip_jax import gallery
    from unclip_jax.gallery import Picture

    at_most(len(args.image) * args.num)
    out = gallery.check_folder(args.out, args.overwrite)
    images = [read_picture(path) for path in args.image]
    pipe, settings = load(args)
    eta = None if args.white_noise else args.eta
    used = pipe.settings(**settings) if args.white_noise else pipe.exact_settings(settings)
    drawn = pipe.variations(images, args.seed, num=args.num, eta=eta, batch_size=args.batch_size, **settings)
    rows = []
    for p, (path, image) in enumerate(zip(args.image, pipe.squares(images, pipe.size), strict=True)):
        name = name_of(path)
        row = [Picture(image, name, {"image": name, "role": "input"})]
        for i, own in enumerate(drawn[p * args.num : (p + 1) * args.num]):
            label = "white noise" if eta is None else f"eta {eta:g}"
            row.append(Picture(own, label, {"image": name, "role": "variation", "eta": eta, "index": i}))
        rows.append((name, row))
    gallery.write(out, rows, facts_of(args, used), page=args.html)
    print(told(out, rows))
