"""`unclip probe`."""

from unclip_jax.cli.arguments import (
    add_model,
    add_output,
    add_settings,
    checked_text,
    command,
    count,
    listed,
    load,
)
from unclip_jax.cli.pictures import at_most, beside, finish, name_of, read_picture


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "probe", "Tell what CLIP takes pictures for, beside what the decoder draws of them.")
    sub.add_argument("image", nargs="+", help="picture files; the middle square is looked at")
    sub.add_argument("--labels", required=True, type=listed, metavar="A,B,…", help="two or more to choose from")
    sub.add_argument("--template", default="a picture of {}", help="the text for a label ('a picture of {}')")
    sub.add_argument("--num", type=count, default=4, help="variations of each picture from white noise (4)")
    add_output(sub)
    add_model(sub)
    add_settings(sub)


def run(args) -> None:
    """Prints the odds, and draws the pictures' variations into a folder."""
    from unclip_jax import gallery
    from unclip_jax.edits import label_texts

    at_most(len(args.image) * args.num)
    labels = [checked_text(label, "label") for label in args.labels]
    label_texts(labels, args.template)
    checked_text(args.template, "--template")
    out = gallery.check_folder(args.out, args.overwrite)
    images = [read_picture(path) for path in args.image]
    pipe, settings = load(args)
    odds = pipe.probe(images, labels, args.template, batch_size=args.batch_size)
    drawn = pipe.variations(images, args.seed, num=args.num, batch_size=args.batch_size, **settings)
    inputs = []
    for path, row in zip(args.image, odds.round(4), strict=True):
        own = dict(zip(labels, map(float, row), strict=True))
        ranked = sorted(own.items(), key=lambda item: -item[1])
        print(f"{name_of(path)}: " + ", ".join(f"{label} {100 * share:.1f} %" for label, share in ranked))
        label = f"{name_of(path)}: {ranked[0][0]} {100 * ranked[0][1]:.0f} %"
        inputs.append((label, {"odds": own, "template": args.template}))
    columns = [("variation", {"role": "variation", "index": i}) for i in range(args.num)]
    rows = beside(args.image, pipe.squares(images, pipe.size), drawn, columns, inputs)
    finish(args, out, rows, pipe.embedded_settings(settings))
