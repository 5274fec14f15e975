"""The table of `benchmarks.run`: each row is a piece of work done by us and by a peer."""

from benchmarks.device import CPU, Device
from benchmarks.sampling import decoder_sampling, decoder_step, prior_sampling, upsampling, whole_prompt
from benchmarks.sides import Row
from benchmarks.sizes import BATCHES, SIZES, doubled
from benchmarks.training import clip_training, decoder_training, prior_training, prior_training_of_dalle2_pytorch


def rows(size: str, device: Device = CPU) -> list[Row]:
    """All rows at a size of `sizes.SIZES`."""
    s, tiny = SIZES[size], size == "tiny"
    batch = BATCHES["tiny" if tiny else device.name]
    made = [prior_sampling(s, device, steps, n) for steps in ([2] if tiny else [25, 64]) for n in batch["prior"]]
    few, many = batch["decoder"], 4 * batch["decoder"]
    made += [decoder_step(s, device, few), decoder_step(s, device, many, f"-batch-{many}")]
    made += [decoder_step(doubled(s), device, few, f"-{2 * s['side']}-px")]
    made += [decoder_sampling(s, device, few), upsampling(s, device, batch["upsampler"]), whole_prompt(s, device)]
    made += [train(s, device, batch["prior-train"]) for train in (prior_training, prior_training_of_dalle2_pytorch)]
    return [*made, decoder_training(s, device, batch["decoder-train"]), clip_training(s, device, batch["clip-train"])]


def choose(made: list[Row], wanted: list[str] | None) -> list[Row]:
    """The rows of such names, or whose names begin so, in the order in which they are wanted; None: all."""
    if wanted is None:
        return made
    names, chosen = {row.name for row in made}, {}
    for name in wanted:
        chosen |= {row.name: row for row in made if row.name == name or name not in names and row.name.startswith(name)}
    return list(chosen.values())
