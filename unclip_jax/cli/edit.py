"""`unclip edit`."""

from unclip_jax.cli.arguments import (
    add_model,
    add_output,
    add_settings,
    checked_text,
    command,
    frames,
    load,
    share,
)
from unclip_jax.cli.pictures import at_most, beside, finish, name_of, read_picture


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


def run(args) -> None:
    """Draws the edited pictures into a folder."""
    from unclip_jax import gallery

    at_most(len(args.image) * args.frames)
    source, target = checked_text(args.source, "--from"), checked_text(args.target, "--to")
    out = gallery.check_folder(args.out, args.overwrite)
    images = [read_picture(path) for path in args.image]
    from unclip_jax.edits import TEXT_GUIDANCE

    pipe, settings = load(args)
    thetas = [round(theta, 6) for theta in (k * args.theta / (args.frames - 1) for k in range(args.frames))]
    drawn = pipe.text_diff(images, source, target, thetas, args.seed, batch_size=args.batch_size, **settings)
    columns = [(f"{source} to {target}, theta {theta:.2f}", {"theta": theta}) for theta in thetas]
    inputs = [(name_of(path), {"from": source, "to": target}) for path in args.image]
    rows = beside(args.image, pipe.squares(images, pipe.size), drawn, columns, inputs)
    finish(args, out, rows, pipe.exact_settings(settings, TEXT_GUIDANCE))
