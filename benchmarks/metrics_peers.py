"""Our metrics beside those of torch-fidelity, clean-fid and torchmetrics on the same features.

    pip install torch-fidelity clean-fid torchmetrics torchvision
    python benchmarks/metrics_peers.py [--json FILE]

Prints each peer's value, ours and the relative difference. A peer that is not installed is said to be missing.
"""

import argparse
import json
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from unclip_jax.metrics.distances import Moments, frechet, kid
from unclip_jax.metrics.manifold import precision_recall
from unclip_jax.metrics.scores import inception_score

DIM, REAL, DRAWN, SUBSET = 256, 3000, 2500, 1000


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = []
    for peer, metric, theirs, ours in comparisons(*features()):
        try:
            named = f"{peer} {version(peer)}"
            value = float(theirs())
        except (PackageNotFoundError, ImportError) as error:
            print(f"{peer:24} {metric:24} missing ({error})")
            continue
        rows.append({"peer": named, "metric": metric, "theirs": value, "ours": ours, "relative": abs(ours / value - 1)})
        print(f"{named:24} {metric:24} {value:<22.15g} {ours:<22.15g} {rows[-1]['relative']:.1e}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two sets of correlated features f32[N, DIM] a little apart, and logits f64[SUBSET, 100]."""
    rng = np.random.default_rng(0)
    mix = lambda n: rng.standard_normal((n, DIM)) @ rng.standard_normal((DIM, DIM)) / np.sqrt(DIM)  # noqa: E731
    real, drawn = mix(REAL).astype(np.float32), (mix(DRAWN) + 0.1).astype(np.float32)
    return real, drawn, 3 * rng.standard_normal((SUBSET, 100))


def comparisons(real, drawn, logits):
    """(peer, metric, a function for its value, our value)."""
    a, b = Moments.of(real), Moments.of(drawn)
    ours = frechet(a.mean, a.covariance, b.mean, b.covariance)
    few = real[:SUBSET].astype(np.float64), (0.9 * real[SUBSET : 2 * SUBSET]).astype(np.float64)

    def fidelity_fid():
        from torch_fidelity.metric_fid import fid_statistics_to_metric

        statistics = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
        return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    def fidelity_kid():
        from torch_fidelity.metric_kid import kernel_poly, mmd2

        options = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
        return mmd2(*(kernel_poly(few[i], few[j], **options) for i, j in ((0, 0), (0, 1), (1, 1))))

    def fidelity_prc(which):
        import torch
        from torch_fidelity.metric_prc import prc_features_to_metric

        drawn_first = torch.from_numpy(few[1]), torch.from_numpy(few[0])
        options = {"prc_neighborhood": 3, "prc_batch_size": 500, "save_cpu_ram": False, "verbose": False}
        return prc_features_to_metric(*drawn_first, **options)[which]

    def fidelity_isc():
        import torch
        from torch_fidelity.metric_isc import isc_features_to_metric

        return isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=False)["inception_score_mean"]

    def clean_fid():
        from cleanfid.fid import frechet_distance

        return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    def clean_kid():
        from cleanfid.fid import kernel_distance

        return kernel_distance(*few, num_subsets=1, max_subset_size=SUBSET)

    def torchmetrics_fid():
        import torch
        from torchmetrics.image.fid import _compute_fid

        return _compute_fid(*map(torch.from_numpy, (a.mean, a.covariance, b.mean, b.covariance)))

    own_kid = kid(*few, SUBSET)[0]
    precision, recall = precision_recall(*few)
    return [
        ("torch-fidelity", "Frechet", fidelity_fid, ours),
        ("clean-fid", "Frechet", clean_fid, ours),
        ("torchmetrics", "Frechet", torchmetrics_fid, ours),
        ("torch-fidelity", "KID", fidelity_kid, own_kid),
        ("clean-fid", "KID", clean_kid, own_kid),
        ("torch-fidelity", "precision", lambda: fidelity_prc("precision"), precision),
        ("torch-fidelity", "recall", lambda: fidelity_prc("recall"), recall),
        ("torch-fidelity", "Inception score", fidelity_isc, inception_score(logits, 1)[0]),
    ]


if __name__ == "__main__":
    main()
