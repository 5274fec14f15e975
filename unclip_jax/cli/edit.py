"""`unclip edit`."""

from unclip_jax.cli.arguments import (
    add_model,
    add_output,
    add_settings,
    at_most,
    checked_text,
    command,
    done,
    facts_of,
    frames,
    load,
    name_of,
    read_picture,
    share,
    told,
)


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "edit", "Change a picture by the difference of two texts.",
                  epilog='Such as: unclip edit circle.png --from "red" --to "green" --out out/green')  # fmt: skip
    sub.add_argument("image", nargs="+", help="picture files; the middle square is looked at")
    sub.add_argument("--from", dest="source", required=True, metavar="TEXT", help="what the picture shows")
    sub.add_argument("--to", dest="target", required=True, metavar="TEXT", help="what it should show")
    sub.add_argument("--theta", type=share, default=0.5, help="how far at the last frame, 0 … 1 (0.5)")
    sub.add_argument("--frames", type=frames, default=6, help="pictures from theta 0 on, both counted (6)")
    add_output(sub)
    add_model(sub)
    add_settings(sub)
    done(sub)


def run(args) -> None:
    """Draws the edited pictures into a folder."""
    from unclip_jax import gallery
    from unclip_jax.gallery import Picture

    at_most(len(args.image) * args.frames)
    source, target = checked_text(args.source, "--from"), checked_text(args.target, "--to")
    out = gallery.check_folder(args.out, args.overwrite)
    images = [read_picture(path) for path in args.image]
    from unclip_jax.edits import TEXT_GUIDANCE

    pipe, settings = load(args)
    thetas = [round(theta, 6) for theta in (k * args.theta / (args.frames - 1) for k in range(args.frames))]
    drawn = pipe.text_diff(images, source, target, thetas, args.seed, batch_size=args.batch_size, **settings)
    rows = []
    for p, (path, image) in enumerate(zip(args.image, pipe.squares(images, pipe.size), strict=True)):
        name = name_of(path)
        about = {"image": name, "from": source, "to": target}
        row = [Picture(image, name, {**about, "role": "input"})]
        for theta, own in zip(thetas, drawn[p * args.frames :], strict=False):
            row.append(Picture(own, f"{source} to {target}, theta {theta:.2f}", {**about, "theta": theta}))
        rows.append((f"{name} {source} to {target}", row))
    gallery.write(out, rows, facts_of(args, pipe.exact_settings(settings, TEXT_GUIDANCE)), page=args.html)
    print(told(out, rows))
