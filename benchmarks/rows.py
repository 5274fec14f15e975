"""The table of `benchmarks.run`: each row is a piece of work done by us and by a peer."""

from benchmarks.sampling import decoder_sampling, decoder_step, prior_sampling, upsampling, whole_prompt
from benchmarks.sides import Row
from benchmarks.sizes import SIZES
from benchmarks.training import clip_training, decoder_training, prior_training, prior_training_of_dalle2_pytorch


def rows(size: str) -> list[Row]:
    """All rows at a size of `sizes.SIZES`."""
    s = SIZES[size]
    batches = [1, 2] if size == "tiny" else [1, 4, 32]
    counts = [2] if size == "tiny" else [25, 64]
    made = [prior_sampling(s, steps, batch) for steps in counts for batch in batches]
    made += [decoder_step(s), decoder_sampling(s), upsampling(s), whole_prompt(s)]
    made += [prior_training(s), prior_training_of_dalle2_pytorch(s), decoder_training(s), clip_training(s)]
    return made
