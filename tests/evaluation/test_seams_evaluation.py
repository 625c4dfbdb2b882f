"""Networks of evaluate.py --features: a toy one added from outside, and the project's own."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from images import pictures
from in_process import assert_refused, command, record_of

import evaluate
from evaluate import frechet_distance, kernel_distance
from evaluation import features
from evaluation.features import FEATURES, Classifier, FeatureNetwork, features_of
from evaluation.metrics import mean_and_covariance
from experiments import classifier

run, refuse = partial(command, evaluate), partial(assert_refused, evaluate)


# What somebody adds in a file of their own:
class Colours(FeatureNetwork):
    """The mean and spread of each colour."""

    name, sizes, sha256 = "colours", dict(pooled=6), "0" * 64

    def extract(self, images):
        pixels = images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setitem(FEATURES, "colours", Colours)


@pytest.fixture
def files(tmp_path):
    """A reference and darker samples."""
    np.savez(tmp_path / "ref.npz", pictures(40, seed=1))
    np.savez(tmp_path / "samples.npz", pictures(30) // 2)
    return tmp_path / "ref.npz", tmp_path / "samples.npz"


def test_a_network_from_outside(colours, files, capsys):
    run(*files, "--features", "colours")
    found = record_of(files[1])["metrics"]
    names = ["Fréchet distance", "Kernel distance", "Kernel distance's standard error", "Precision", "Recall"]
    assert list(found) == [f"{name} (colours)" for name in names]
    printed = capsys.readouterr().out
    assert f"Fréchet distance (colours): {found['Fréchet distance (colours)']}\n" in printed
    assert "FID" not in printed and "Inception" not in printed and "comparable" not in printed
    rows = [features_of(np.load(path)["arr_0"], Colours()) for path in files]
    assert rows[0].shape == (40, 6)
    expected = frechet_distance(*mean_and_covariance(rows[0]), *mean_and_covariance(rows[1]))
    assert found["Fréchet distance (colours)"] == pytest.approx(expected, rel=1e-6)  # float32 features
    mean, deviation = kernel_distance(*rows, subset_size=15)  # half of the 30 samples
    assert found["Kernel distance (colours)"] == pytest.approx(mean, rel=1e-6)
    assert found["Kernel distance's standard error (colours)"] == pytest.approx(deviation / 10, rel=1e-6)
    assert "fewer than 1,000 images on a side: Kernel distance (colours) is by subsets of 15" in printed
    assert found["Precision (colours)"] == found["Recall (colours)"] == 0  # half as bright

    refuse(capsys, "--metrics is: --features colours does not serve it, only fid, kid, precision, recall",
           *files, "--features", "colours", "--metrics", "fid", "is")  # fmt: skip
    refuse(
        capsys,
        "--metrics sfid: --features colours does",
        *files,
        "--features",
        "colours",
        "--metrics",
        "sfid",
    )


def test_statistics_are_of_one_network(colours, files, capsys):
    reference, samples = files
    stored = reference.parent / "stats.npz"
    run(*files, "--features", "colours", "--metrics", "fid")
    expected = record_of(samples)["metrics"]
    run(reference, "--save-stats", stored, "--stats-images", 0, "--features", "colours")
    run(stored, samples, "--features", "colours", "--metrics", "fid")
    assert record_of(samples)["metrics"] == pytest.approx(expected, rel=1e-9)
    assert record_of(samples)["reference"]["statistics"] == dict(pooled="stored")
    refuse(capsys, f"REF {stored}: its statistics are of the features colours, not pixels; give images",
           stored, samples, "--features", "pixels", "--metrics", "fid")  # fmt: skip
    refuse(capsys, f"REF {stored}: its statistics are of the features colours, not inception",
           stored, samples, "--metrics", "fid")  # fmt: skip
    np.savez(stored, **dict(np.load(stored), colours_sha256="f" * 64))
    refuse(capsys, f"REF {stored}: its statistics were made with other Colours weights, of sha256 ffffffff",
           stored, samples, "--features", "colours", "--metrics", "fid")  # fmt: skip
    np.savez(stored, mu=np.zeros(768), sigma=np.eye(768))  # ADM's, which name no network
    refuse(capsys, "its statistics are of the features inception, not pixels", stored, samples, "--features",
           "pixels", "--metrics", "fid")  # fmt: skip


def test_what_a_network_lacks_is_refused_by_name(files, capsys, monkeypatch):
    for attributes, lacking in (
        (dict(metrics=("fid", "is")), "logits"),
        (dict(metrics=("fid", "sfid")), "sizes of spatial features"),
        (dict(extract=None, sizes=None), "sizes, extract"),
    ):
        given = {name: getattr(Colours, name) for name in ("name", "sizes", "sha256", "extract")} | attributes
        left = {name: value for name, value in given.items() if value is not None}
        monkeypatch.setitem(FEATURES, "colours", type("Unready", (FeatureNetwork,), left))
        refuse(capsys, f"--features colours: Unready lacks {lacking}", *files, "--features", "colours")


def test_pixels_are_means_over_cells():
    images = pictures(3, 32, 48)
    found = features_of(images, FEATURES["pixels"]())
    cells = images.reshape(3, 16, 2, 16, 3, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(found, cells.reshape(3, -1), rtol=1e-5)  # sums of six float32 numbers
    grey = features_of(images[..., 0], FEATURES["pixels"]())
    np.testing.assert_allclose(grey, np.tile(cells[:, 0].reshape(3, -1), 3), rtol=1e-5)
    assert features_of(images[:, :8, :8], FEATURES["pixels"]()).shape == (3, 768)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Weights of a classifier of the digits, and images of two halves of them with their labels."""
    folder = tmp_path_factory.mktemp("classifier")
    with np.load(ROOT / "assets" / "digits.npz") as file:
        images, labels = (file["images"] * 15.9).astype(np.uint8), file["labels"]
    images = np.repeat(images[..., None], 3, 3)
    np.savez(folder / "train.npz", images[:1400], labels[:1400])
    np.savez(folder / "test.npz", images[1400:], labels[1400:])
    argv = [folder / "train.npz", "--test", folder / "test.npz", "--out", folder / "weights.safetensors",
            "--widths", 16, 32, "--epochs", 10, "--batch-size", 64]  # fmt: skip
    classifier.main(classifier.build_parser().parse_args(list(map(str, argv))))
    return folder


def test_the_classifier(digits, tmp_path, capsys):
    weights = digits / "weights.safetensors"
    network = Classifier(weights).load("cpu")
    with np.load(digits / "test.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    rows = features_of(images, network)
    assert rows.shape == (397, 128) == (397, network.sizes["pooled"])
    accuracy = (network.logits(rows).argmax(1).numpy() == labels).mean()
    assert accuracy == pytest.approx(network.config["accuracy"]) and accuracy > 0.85, accuracy
    assert network.config["num_classes"] == 10 and network.config["test_count"] == 397

    np.savez(tmp_path / "real.npz", images)
    np.savez(tmp_path / "noise.npz", pictures(300, 8, 8))
    options = ["--features", "classifier", "--feature-weights", weights]
    found = []
    for samples in (tmp_path / "real.npz", tmp_path / "noise.npz"):
        run(digits / "train.npz", samples, *options)
        found.append(record_of(samples)["metrics"])
        assert record_of(samples)["settings"]["feature_weights"]["file"] == str(weights)
    for name in ("Fréchet distance (classifier)", "Kernel distance (classifier)"):
        assert found[0][name] < found[1][name] / 3
    assert 1 < found[0]["Class score (classifier)"] <= 10

    np.savez(tmp_path / "large.npz", pictures(9))
    refuse(capsys, "knows images of 8x8 pixels, these have 16x16", digits / "train.npz",
           tmp_path / "large.npz", *options)  # fmt: skip


def test_options_of_networks_are_refused(files, tmp_path, capsys):
    (tmp_path / "junk").write_bytes(b"junk")
    for name, weights, message in (
        ("classifier", None, "--features classifier: needs --feature-weights, a file of experiments/"),
        ("classifier", "no", "no: cannot be read (No such file or directory)"),
        ("classifier", "junk", "junk: not a classifier of experiments/classifier.py"),
        ("mobilenet", None, "--features mobilenet: needs --feature-weights, torchvision's mobilenet_v2"),
        ("mobilenet", "junk", "junk: not weights of mobilenet_v2"),
        ("pixels", "junk", "--features pixels takes none; leave it out"),
        ("inception", "junk", "Inception's are --inception-weights"),
    ):
        given = ["--feature-weights", tmp_path / weights] if weights else []
        refuse(capsys, message, *files, "--features", name, *given)
    refuse(capsys, "--any-weights: of --features inception, not pixels; leave it out", *files, "--features",
           "pixels", "--any-weights")  # fmt: skip


def test_the_classifier_s_training_refuses(digits, tmp_path):
    def refusal(*argv):
        args = classifier.build_parser().parse_args(list(map(str, argv)))
        with pytest.raises(classifier.UserError) as refused:
            classifier.main(args)
        return str(refused.value)

    np.savez(tmp_path / "plain.npz", pictures(20))
    assert "REF: give an .npz with labels, or --dataset" in refusal()
    assert "plain.npz: no labels in it; they are arr_1" in refusal(tmp_path / "plain.npz")
    np.savez(tmp_path / "other.npz", pictures(20), np.arange(20))
    message = refusal(digits / "train.npz", "--test", tmp_path / "other.npz")
    assert "--test" in message and "its images are (3, 16, 16), those to train on (3, 8, 8)" in message


def test_mobilenet_against_torchvision(tmp_path):
    """Random weights: logits are those of torchvision's own forward pass on its own preprocessing."""
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    torch.manual_seed(0)
    model = mobilenet_v2().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = features.MobileNet(tmp_path / "weights.pth").load("cpu")
    images = torch.from_numpy(pictures(2, 224, 224)).permute(0, 3, 1, 2)
    preprocess = MobileNet_V2_Weights.IMAGENET1K_V1.transforms(resize_size=224)
    with torch.no_grad():
        expected = model(preprocess(images))
    rows = features_of(images.permute(0, 2, 3, 1), network)
    assert rows.shape == (2, 1280)
    torch.testing.assert_close(network.logits(rows), expected, rtol=1e-3, atol=1e-5)
