"""Networks whose features evaluate.py --features compares: a class and a row each.

Only of Inception, with its published weights, is a Fréchet distance called FID. The others need no download,
and their numbers compare with one another's of the same network and reference only.
"""

import hashlib
import json

import torch
from torch import nn
from torch.nn import functional

from checkpointing.published import sha256_of
from evaluation.inception import InceptionFeatures
from evaluation.metrics import exact_fp32
from runtime.cli import UserError, user_errors


class FeatureNetwork:
    """Base of the networks: images to features, in float32. What a subclass has, or its __init__ sets:

    name      what the row is called
    metrics   names of --metrics that it serves
    sizes     dict(pooled=D), and spatial=S for sfid
    sha256    what tells its weights from others
    extract   (images uint8 (N, 3, H, W)) to features (N, D), or a tuple of these and spatial ones (N, S)
    logits    for is: (features (N, D)) to logits (N, classes)
    module    a torch module to move to the device, or None
    """

    metrics, module, device = ("fid", "kid", "precision", "recall"), None, torch.device("cpu")

    def __init__(self, weights=None):
        """weights: the file of --feature-weights. Raises UserError where it is not this network's."""
        if weights is not None:
            raise UserError(f"--feature-weights {weights}: --features {self.name} takes none; leave it out")

    def load(self, device):
        """The network on a device, ready to be called."""
        self.device = torch.device(device)
        if self.module is not None:
            self.module.to(self.device).eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def __call__(self, images):
        """A tuple of features (N, size), one for each of sizes, of images (N, 3, H, W), uint8."""
        with exact_fp32():
            found = self.extract(images.to(self.device))
        return found if isinstance(found, tuple) else (found,)

    def _require(self, weights, remedy):
        if weights is None:
            raise UserError(f"--features {self.name}: needs --feature-weights, {remedy}")
        with user_errors(f"--feature-weights {weights}", "cannot be read", OSError):
            self.sha256 = sha256_of(weights)


class Pixels(FeatureNetwork):
    """The pixels themselves, in [0, 1], averaged over a grid of 16 x 16: 768 numbers.

    So few, since a covariance of D numbers is of full rank only from more than D images, and Fréchet
    distances of fewer are too high. They see layout and colour, not what is shown.
    """

    name, side = "pixels", 16
    sizes = dict(pooled=3 * side * side)
    sha256 = hashlib.sha256(f"means over a grid of {side} x {side}, in [0, 1]".encode()).hexdigest()

    def extract(self, images):
        return functional.adaptive_avg_pool2d(images.float() / 255, self.side).flatten(1)


class SmallCNN(nn.Module):
    """A classifier of small images: 3 x 3 convolutions with batch norm, each but the last halving the sides
    by max pooling; the mean over the image and a hidden layer, whose outputs are the features.

    widths: channels of the convolutions; images (N, 3, H, W) in [0, 1] give logits (N, classes).
    """

    def __init__(self, classes, widths=(16, 32, 64, 128), hidden=128):
        super().__init__()
        self.convolutions, channels = nn.Sequential(), 3
        for i, width in enumerate(widths):
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.convolutions += nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())
            if i < len(widths) - 1:
                self.convolutions.append(nn.MaxPool2d(2))
            channels = width
        self.hidden, self.head = nn.Linear(channels, hidden), nn.Linear(hidden, classes)

    def features(self, images):
        """(N, hidden)."""
        return self.hidden(self.convolutions(images - 0.5).mean((2, 3))).relu()

    def forward(self, images):
        return self.head(self.features(images))


class Classifier(FeatureNetwork):
    """The hidden layer of a SmallCNN that experiments/classifier.py has trained on labelled images.

    config: what that wrote beside the weights: classes, widths, hidden, image_size, accuracy.
    """

    name, metrics = "classifier", ("is", *FeatureNetwork.metrics)

    def __init__(self, weights=None):
        from safetensors import SafetensorError, safe_open

        self._require(weights, "a file of experiments/classifier.py")
        errors = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
        wrong = "not a classifier of experiments/classifier.py, or cut short"
        with user_errors(f"--feature-weights {weights}", wrong, errors), safe_open(weights, "pt") as file:
            self.config = json.loads((file.metadata() or {})["classifier"])
            self.module = SmallCNN(*(self.config[name] for name in ("num_classes", "widths", "hidden")))
            self.module.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        self.sizes, self.file = dict(pooled=self.config["hidden"]), weights
        self.load("cpu")

    def extract(self, images):
        side = self.config["image_size"]
        if images.shape[2:] != (side, side):
            size = "x".join(map(str, images.shape[:1:-1]))
            raise UserError(
                f"--feature-weights {self.file}: knows images of {side}x{side} pixels, these have {size}"
            )
        return self.module.features(images.float() / 255)

    @torch.no_grad()
    def logits(self, pooled):
        """(N, D) to (N, classes)."""
        with exact_fp32():
            return self.module.head(pooled.to(self.device))


class MobileNet(FeatureNetwork):
    """torchvision's mobilenet_v2, trained on ImageNet, on images resized to 224 pixels: 1,280 features."""

    name, metrics, sizes = "mobilenet", ("is", *FeatureNetwork.metrics), dict(pooled=1280)

    def __init__(self, weights=None):
        from torchvision.models import mobilenet_v2

        self._require(weights, "torchvision's mobilenet_v2-b0353104.pth or another of mobilenet_v2")
        # What a file of anything else raises has no common class:
        with user_errors(f"--feature-weights {weights}", "not weights of mobilenet_v2", Exception):
            self.module = mobilenet_v2()
            self.module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.load("cpu")

    def extract(self, images):
        images = functional.interpolate(images.float() / 255, (224, 224), mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in IMAGENET)
        return self.module.features((images - mean) / std).mean((2, 3))

    @torch.no_grad()
    def logits(self, pooled):
        """(N, 1280) to (N, 1000)."""
        with exact_fp32():
            return self.module.classifier(pooled.to(self.device))


# Mean and standard deviation of the colours that torchvision's networks were trained with:
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The rows of --features, each called with the file of its weights, or None:
FEATURES = dict(inception=InceptionFeatures, pixels=Pixels, classifier=Classifier, mobilenet=MobileNet)


def features_of(images, network, batch_size=256):
    """Features (N, D), float32 on the CPU, of images: uint8 (N, H, W, 3), or grey (N, H, W).

    network: of a row, loaded: Classifier("classifier.safetensors").load("cpu").
    """
    images = torch.as_tensor(images)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images {tuple(images.shape)}: must be uint8 (N, H, W, 3), or (N, H, W)")
    images = images.permute(0, 3, 1, 2)
    return torch.cat([network(batch.expand(-1, 3, -1, -1))[0].cpu() for batch in images.split(batch_size)])
