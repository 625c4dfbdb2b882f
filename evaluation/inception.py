"""The Inception network of ADM's evaluation, its weights, and FID while a model trains.

The network is torch-fidelity's, which has TensorFlow 1's resizing. Its published weights are known by their
checksum; numbers computed with any others can be compared with one another only.
"""

import hashlib
import io

import numpy as np
import torch

from checkpointing.published import INCEPTION_SHA256, INCEPTION_WEIGHTS, PRETRAINED_FOLDER, download_inception
from evaluation.metrics import exact_fp32, frechet_distance
from evaluation.statistics import check_same_weights, compute_features, read_statistics, share_of
from runtime.cli import UserError, user_errors


class Inception:
    """The network, in float32: images to features, and features to logits.

    sha256        of the file that its weights are from
    is_published  whether they are the weights of published numbers
    """

    name = "inception"
    sizes = dict(pooled=2048, spatial=7 * 17 * 17)  # of an image's features, for FID and for sFID

    def __init__(self, state, sha256, device):
        # Imported here, since it takes seconds and most commands need none of it:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The network reads its weights from a file by itself, as one that may execute code; so it is given
        # the tensors that were found in it, written anew:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self.network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=file
        ).to(device)
        self.sha256, self.is_published = sha256, sha256 == INCEPTION_SHA256
        self.device = torch.device(device)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 17 · 17 · 7), as ADM has them

    @torch.no_grad()
    def __call__(self, images):
        """Features of images (N, 3, H, W), uint8: pooled (N, 2048) and spatial (N, 2023)."""
        with exact_fp32():
            (pooled,) = self.network(images.to(self.device))
        return pooled, self.spatial

    @torch.no_grad()
    def logits(self, pooled):
        """Of the 1,008 classes, without the biases, which ADM leaves out: (N, 2048) to (N, 1008)."""
        with exact_fp32():
            return pooled.to(self.device) @ self.network.fc.weight.T


class InceptionFeatures:
    """The row "inception" of --features: the network above, whose weights are read last, since they may have
    to be fetched."""

    name, metrics = "inception", ("is", "fid", "sfid", "kid", "precision", "recall")

    def __init__(self, weights=None, any_weights=False):
        if weights is not None:
            read_weights(weights, any_weights)
        self.weights, self.any_weights, self.sizes = weights, any_weights, Inception.sizes

    def load(self, device):
        return load_inception(self.weights, device, self.any_weights)


def load_inception(path, device, any_weights=False):
    """The Inception network with the weights of a file; None for the published file, fetched where need be.

    Raises UserError for a file that is not the published one, unless any_weights, and one that does not fit.
    """
    path = path or download_inception()
    data = read_weights(path, any_weights)
    sha256 = hashlib.sha256(data).hexdigest()
    wrong = f"not weights of this network, the 472 tensors of {INCEPTION_WEIGHTS}"
    # What a file of anything else raises has no common class:
    with user_errors(f"--inception-weights {path}", wrong, Exception):
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return Inception(state, sha256, device)


def read_weights(path, any_weights=False):
    """The bytes of a file of weights; UserError where they are not the published ones, unless any_weights."""
    with user_errors(f"--inception-weights {path}", "cannot be read", OSError), open(path, "rb") as file:
        data = file.read()
    sha256 = hashlib.sha256(data).hexdigest()
    if not any_weights and sha256 != INCEPTION_SHA256:
        raise UserError(
            f"--inception-weights {path}: its sha256 is {sha256[:16]}…, the published weights' is"
            f" {INCEPTION_SHA256[:16]}…; give {INCEPTION_WEIGHTS}, or add --any-weights for numbers that"
            " compare with no published ones"
        )
    return data


def add_inception_arguments(parser):
    """--inception-weights and --any-weights, the same in every command."""
    parser.add_argument(
        "--inception-weights", default=None, metavar="FILE",
        help=f"weights of the Inception network (default: {PRETRAINED_FOLDER}/{INCEPTION_WEIGHTS},"
        " downloaded where it is not there)",
    )  # fmt: skip
    parser.add_argument(
        "--any-weights", action="store_true",
        help="take weights that are not the published ones, for numbers that compare only with one another"
        " (default: off)",
    )  # fmt: skip


def read_fid_reference(path):
    """The mean and covariance of --fid-ref; UserError where the file has none."""
    statistics = read_statistics(path, "pooled", Inception, "--fid-ref")
    if statistics is None:
        raise UserError(
            f"--fid-ref {path}: no statistics in it (mu, sigma); make one with evaluate.py --save-stats"
        )
    return statistics


def name_of_count(count):
    """10000 as 10K; 1234 as 1234."""
    return f"{count // 1000}K" if count and count % 1000 == 0 else str(count)


class SampleFID:
    """FID of a model's samples against statistics, while it trains; every process takes a share of them.

    reference   .npz with mu and sigma, ADM's or of evaluate.py --save-stats
    count       samples; they have the seeds 0 … count - 1, and random labels
    weights     file of the Inception network's, None for the published one
    sampling    how samples are made, plain data: what a Sampler is given as defaults
    bfloat16    whether the models will be sampled in it
    Raises UserError for a reference or weights that cannot be used.
    """

    def __init__(
        self, reference, count, *, weights=None, any_weights=False, sampling=None, bfloat16=False, dist,
        batch_size=64,
    ):  # fmt: skip
        self.network = load_inception(weights, dist.device, any_weights)
        check_same_weights(reference, self.network, "--fid-ref")
        self.reference = read_fid_reference(reference)
        self.count, self.batch_size, self.dist = count, batch_size, dist
        self.sampling = sampling
        self.name = f"FID-{name_of_count(count)}"  # never 50K of fewer samples
        # What two values must have in common to be compared:
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in self.reference))
        self.settings = dict(
            reference_sha256=digest.hexdigest(), count=count, inception_sha256=self.network.sha256,
            sampling=sampling, **(dict(precision="bf16") if bfloat16 else {}),
        )  # fmt: skip

    def __call__(self, sampler):
        """The FID of a Sampler's images; every process calls it with the same weights and gets it."""
        share = share_of(self.count, self.batch_size, self.dist)
        batches = self._sample(sampler, *share)
        found = compute_features(batches, share, self.network, self.dist, {"pooled"}, self.name)
        return self.dist.on_main(
            lambda: frechet_distance(*self.reference, found.pooled.mean, found.pooled.covariance)
        )

    def _sample(self, sampler, start, stop):
        for first in range(start, stop, self.batch_size):
            count = min(self.batch_size, stop - first)
            images = sampler.sample(count, seeds=first, batch_size=count)
            yield to_bytes(images)


def to_bytes(images):
    """Images (N, C, H, W) in [0, 1] as uint8 (N, 3, H, W); grey ones in three equal colours."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
