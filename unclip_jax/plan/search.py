"""Which mesh, batch size and remat policies suit a config on devices that are not here."""

import itertools
from collections.abc import Iterator

from ml_collections import ConfigDict
from tqdm import tqdm

from unclip_jax import tasks
from unclip_jax.errors import UserError
from unclip_jax.plan.abstract import Abstract, abstract
from unclip_jax.plan.chips import TPUS
from unclip_jax.plan.steps import Counts, Report, count_train, plan_train
from unclip_jax.tasks.remat import POLICIES

COMPILED = 3  # candidates, of those for TPUs


def search(config: ConfigDict, devices, chip: str, clip: ConfigDict | None = None) -> list[Report]:
    """Train steps over meshes (data, fsdp) of the devices, 1, 1/2 and 1/4 of the config's batch, and remat policies.

    Those that fit come first, and of them the fastest by predicted seconds a picture. Arithmetic on shapes predicts
    compute alone, so what lies within a twentieth is equal: then the largest batch comes first, and the least split,
    which transfer less for each picture. For TPUs the best of each policy are compiled, and stand before all others.
    """
    candidates = list(_candidates(config, devices, chip, clip))
    if not candidates:
        count = devices if isinstance(devices, int) else len(devices)
        raise UserError(f"no mesh of {count} devices divides batch_size={config.batch_size}", "change the batch size")
    fastest = min(report.seconds_a_picture for report, *_ in candidates)

    def order(candidate):
        r = candidate[0]
        slower = int(20 * (r.seconds_a_picture / fastest - 1))
        return not r.fits, slower, -r.batch_size, r.mesh["fsdp"], POLICIES.index(r.remat)

    candidates.sort(key=order)
    places = {policy: itertools.count() for policy in POLICIES}
    turns = [(not report.fits, next(places[report.remat]), at) for at, (report, *_) in enumerate(candidates)]
    tried = [at for *_, at in sorted(turns)[:COMPILED]] if chip in TPUS else []
    shown = tqdm(tried, "compiling", unit=" steps", disable=None, leave=False)
    best = [plan_train(run, chip, counts=counts) for _, run, counts in (candidates[at] for at in shown)]
    rest = [report for at, (report, *_) in enumerate(candidates) if at not in tried]
    return sorted(best, key=lambda r: (not r.fits, r.seconds_a_picture)) + rest


def _candidates(config: ConfigDict, devices, chip: str, clip) -> Iterator[tuple[Report, Abstract, Counts]]:
    """What `search` tries, by arithmetic. The networks are traced for each batch and policy, not for each mesh."""
    count = devices if isinstance(devices, int) else len(devices)
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.mesh.update(data=1, fsdp=1, tensor=1)
    run = abstract(changed, 1, clip)  # refused where no mesh and no batch would help
    for share in (1, 2, 4):
        plain = None  # counts of this batch without recomputation
        size = config.batch_size // share
        for policy in tqdm(POLICIES, f"counting, batch {size}", unit=" policies", disable=None, leave=False):
            counts, changed = None, tasks.with_policy(config, policy)
            for fsdp in [n for n in range(1, count + 1) if count % n == 0]:
                with changed.unlocked():
                    changed.mesh.update(data=-1, fsdp=fsdp, tensor=1)
                    changed.batch_size = size
                try:
                    run = abstract(changed, devices, clip, like=run)
                except UserError:  # such as a batch that does not divide
                    continue
                counts = counts or count_train(run, plain=plain)
                plain = plain or counts
                yield plan_train(run, chip, compiled=False, counts=counts), run, counts
