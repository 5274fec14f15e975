"""Reports of `steps` and rankings of `search` for reading; every time in them is a prediction."""

from unclip_jax.meter import GIB
from unclip_jax.plan.steps import Report


def table(reports: list[Report], title: str = "") -> str:
    """Reports for reading; every time is a prediction."""
    lines = [title] if title else []
    for r in reports:
        mesh = " x ".join(f"{name} {size}" for name, size in r.mesh.items() if size > 1) or "one device"
        source = "compiled ahead of time" if r.compiled else "arithmetic on shapes, nothing compiled: a rough estimate"
        remat = f", remat {r.remat}" if r.remat else ""
        lines += [
            f"{r.what} step on {r.devices} x {r.chip} ({mesh}), batch {r.batch_size}{remat} ({source})",
            *(f"  {name:24}{size / GIB:10.3f} GiB a device" for name, size in r.held.items() if size),
            f"  {'peak':24}{_gib(r.peak)} of {r.limit / GIB:.1f} GiB: {'fits' if r.fits else 'DOES NOT FIT'}",
            f"  {'FLOPs, all devices':24}{r.flops:10.3e}, {r.model_flops:.3e} without recomputation",
        ]
        for c in r.collectives or ():
            lines.append(f"  {c.kind + ' of ' + str(c.group):24}{c.bytes / GIB:10.3f} GiB a device in {c.count}")
        if r.peak is not None:
            times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in r.seconds.items())
            lines.append(f"  {'predicted, each alone':24}{times}")
            if r.what == "train":
                lines.append(f"  {'predicted MFU ceiling':24}{100 * r.mfu_ceiling:10.1f} %")
        if r.error:
            lines.append(f"  the compiler says: {r.error}")
        if not r.fits:
            more = ", remat; or try --search" if r.what == "train" else ""
            lines.append(f"  what would help: more devices in mesh.fsdp, a smaller batch_size{more}")
    return "\n".join(lines)


def ranking(reports: list[Report], most: int = 20) -> str:
    """A line for each of the first reports of a `search`; every time is a prediction."""
    lines = ["  rank  remat  data x fsdp   batch  peak, GiB                  step, ms  pictures/s"]
    for rank, r in enumerate(reports[:most], 1):
        mesh, fits = f"{r.mesh['data']} x {r.mesh['fsdp']}", "fits" if r.fits else "DOES NOT FIT"
        lines.append(
            f"{rank:6}{r.remat:>7}{mesh:>13}{r.batch_size:8} {_gib(r.peak)}  {fits:14}"
            f"{1e3 * max(r.seconds.values()):10.1f}{1 / r.seconds_a_picture:12,.0f}{'  compiled' if r.compiled else ''}"
        )
    if len(reports) > most:
        fit = sum(r.fits for r in reports[most:])
        lines.append(f"   and {len(reports) - most} more, of which {fit} fit; --out FILE.json has all")
    return "\n".join(lines)


def _gib(size: float | None) -> str:
    return "   unknown" if size is None else f"{size / GIB:10.3f}"
