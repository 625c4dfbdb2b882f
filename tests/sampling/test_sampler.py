"""sampler.py: an image depends on its seed and label alone; bad requests are refused first."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import OTHER_DEFAULTS, build_tiny, load_rule_weights, other_defaults
from networks import save_vae
from PIL import Image

from checkpointing import files as checkpoints
from diffusion import create_diffusion, create_flow
from runtime.cli import UserError
from runtime.distributed import fold_seed
from runtime.image_io import save_grid
from sampler import Sampler
from sampling.noise import SampleNoise


def tiny_sampler(**overrides):
    model = load_rule_weights(build_tiny(**dict(in_channels=3, learn_sigma=False, **overrides)), 0.1)
    return Sampler(model, device="cpu", defaults=dict(steps="5"))


def test_shapes_and_range():
    sampler = tiny_sampler()
    images = sampler.sample(3)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.1
    assert sampler.sample_each_class(2).shape == (20, 3, 8, 8)
    assert sampler.sample_each_class(1, [4, 2]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "options", [dict(num_classes=0), dict(input_size=[8, 12]), dict(class_dropout_prob=0.0)]
)
def test_other_models(options):
    sampler = tiny_sampler(**options)
    assert sampler.sample(2).shape == (2, 3, *sampler.model.input_size)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_images_do_not_depend_on_the_batch(solver):
    sampler, labels = tiny_sampler(), [i % 10 for i in range(12)]
    together = sampler.sample(labels, seeds=100, sampler=solver, steps=5)
    for batch_size in (1, 5):
        split = sampler.sample(labels, seeds=100, sampler=solver, steps=5, batch_size=batch_size)
        torch.testing.assert_close(split, together, atol=1e-4, rtol=0)  # GEMM rounding
    order = [7, 3, 11]
    some = sampler.sample([labels[i] for i in order], seeds=[100 + i for i in order], sampler=solver, steps=5)
    torch.testing.assert_close(some, together[order], atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[10], atol=1e-2)  # same label, other seed


def test_random_labels_belong_to_the_seed():
    labels = SampleNoise(range(40)).labels(10)
    assert len(labels.unique()) > 5
    assert torch.equal(SampleNoise(range(20, 40)).labels(10), labels[20:])
    counts = SampleNoise(range(4000)).labels(10).bincount()
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared of 9 degrees of freedom: 1 in 1000


def test_a_drawn_label_is_as_good_as_a_given_one():
    """The image is the same to the bit, for the noise does not know whether a label was drawn before it."""
    sampler = tiny_sampler()
    labels = SampleNoise(range(100, 108)).labels(10).tolist()
    assert torch.equal(sampler.sample(8, seeds=100), sampler.sample(labels, seeds=100))


def test_seeds_do_not_wrap():
    """2^32 is not 0 again, nor are any two beyond it alike; below it the generator has the seed itself."""
    sampler = tiny_sampler()
    images = sampler.sample([3] * 6, seeds=[0, 1, 2**32, 2**32 + 1, 2**33, 2**40], steps=2)
    for i in range(6):
        for j in range(i):
            assert (images[i] - images[j]).abs().mean() > 0.02
    across = sampler.sample([3] * 4, seeds=2**32 - 2, steps=2)
    torch.testing.assert_close(across[2:], images[2:4], atol=1e-4, rtol=0)  # other batches' rounding
    for seed in (0, 5, 2**32 - 1):
        expected = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(SampleNoise([seed]).randn((3, 4))[0], expected)
    assert len({fold_seed(2**32 + i) for i in range(1000)} | set(range(1000))) == 2000
    labels = SampleNoise(range(2**32, 2**32 + 40)).labels(10)
    assert len(labels.unique()) > 5 and not torch.equal(labels, SampleNoise(range(40)).labels(10))


def test_seeds_give_normal_noise():
    noise = SampleNoise(range(2000)).randn((4, 4))
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    correlation = np.corrcoef(noise.flatten(1).numpy())[np.triu_indices(2000, 1)]
    assert abs(correlation.mean()) < 2e-3  # neighbouring seeds share nothing


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "euler", "heun"])
def test_trajectory(solver):
    """From the noise to the images themselves, at most 33 frames."""
    sampler = tiny_sampler()
    options = dict(sampler=solver, steps=5, batch_size=2)
    images, trajectory = sampler.sample([3, 4, 5], return_trajectory=True, **options)
    assert trajectory.shape == (6, 3, 3, 8, 8)
    assert torch.equal(trajectory[-1], images) and torch.equal(images, sampler.sample([3, 4, 5], **options))
    noise = SampleNoise(range(3)).randn((3, 8, 8))
    torch.testing.assert_close(trajectory[0], ((noise + 1) / 2).clamp(0, 1))
    assert (trajectory[0] - trajectory[1]).abs().mean() > 1e-3
    _, long = sampler.sample(1, sampler=solver, steps=200, return_trajectory=True)
    assert long.shape == (33, 1, 3, 8, 8)


def test_image_to_image():
    """Noise found by reverse DDIM leads back to the images; to others where the labels are others."""
    sampler = tiny_sampler()
    images = sampler.sample([3, 4], cfg_scale=1, sampler="ddim", steps=200)
    back = sampler.image_to_image(images, [3, 4], steps=200, cfg_scale=1)
    assert (back - images).abs().mean() < 0.02
    assert sampler.settle()["cfg_scale"] > 1  # which would not lead back
    assert torch.equal(sampler.image_to_image(images, [3, 4], steps=200), back)
    other = sampler.image_to_image(images, [3, 4], [5, 6], steps=200, cfg_scale=2)
    assert (other - images).abs().mean() > 2 * (back - images).abs().mean()
    assert sampler.image_to_image(images, None, steps=5).shape == images.shape
    with pytest.raises(UserError, match="1 labels for 2 images"):
        sampler.image_to_image(images, [3], steps=5)
    for wrong in (images * 255, images.numpy()):
        with pytest.raises(UserError, match="images: must be a tensor"):
            sampler.image_to_image(wrong, [3, 4], steps=5)
    with pytest.raises(UserError, match="new_labels 8: must be whole numbers, one an image"):
        sampler.image_to_image(images, [3, 4], 8, steps=5)
    free = tiny_sampler(num_classes=0)
    assert free.image_to_image(images, steps=5).shape == images.shape


def test_defaults_of_another_sampler():
    """Steps that suit the sampler asked for; those of the run for the run's own."""
    sampler = tiny_sampler()
    assert sampler.settle()["steps"] == "5" and sampler.settle(sampler="dpm++")["steps"] == "25"
    assert sampler.settle(sampler="dpm++", steps=7)["steps"] == 7
    assert sampler.settle()["cfg_channels"] == "all"
    assert Sampler(build_tiny(), device="cpu").settle()["cfg_channels"] == 3


def test_a_model_in_training_is_sampled_in_evaluation():
    """No label is dropped, the guide's neither, and every module is left in the mode that it had."""
    options = dict(in_channels=3, learn_sigma=False)
    guide = load_rule_weights(build_tiny(depth=1, **options), 0.1).eval()
    model = load_rule_weights(build_tiny(class_dropout_prob=0.9, **options), 0.1).eval()
    sampler = Sampler(model, device="cpu", defaults=dict(steps="3"), guide=guide)
    assert not any(module.training for module in (*model.modules(), *guide.modules()))
    images, labels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), [1, 2, 3, 4]
    expected = sampler.sample(labels), sampler.image_to_image(images, labels, [5, 6, 7, 8], steps=3)
    model.train().blocks[1].eval()
    guide.train()
    modes = [module.training for module in (*model.modules(), *guide.modules())]
    assert torch.equal(sampler.sample(labels), expected[0])
    assert torch.equal(sampler.image_to_image(images, labels, [5, 6, 7, 8], steps=3), expected[1])

    def stop(state):
        assert not any(module.training for module in (*model.modules(), *guide.modules()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate([0], [1], sampler.settle(), callback=stop)
    assert [module.training for module in (*model.modules(), *guide.modules())] == modes
    Sampler(model, device="cpu")
    assert model.training and not model.blocks[1].training  # looking at it changes nothing


def test_published_draws_are_one_stream():
    """With one generator an image depends on its place; the draws of the null half are passed over."""
    sampler = tiny_sampler()
    images = sampler.sample([3, 4], seeds=7, published_draws=True, batch_size=1)
    assert torch.equal(images, sampler.sample([3, 4], seeds=7, published_draws=True))
    assert not torch.allclose(images[:1], sampler.sample([3], seeds=7, published_draws=True), atol=1e-2)
    with pytest.raises(UserError, match="--published-draws: takes one seed"):
        sampler.sample([3, 4], seeds=[7, 8], published_draws=True)
    with pytest.raises(UserError, match="--published-draws: the published script samples by ddpm, not ddim"):
        sampler.sample([3, 4], sampler="ddim", published_draws=True)


@pytest.mark.parametrize("options", [{}, dict(input_size=[8, 12]), dict(num_classes=0)])
def test_bfloat16_weights(options):
    """Stored in half the memory, they give nearly the same images, and the output stays float32."""
    full, half = tiny_sampler(**options), tiny_sampler(**options)
    half.model.store_bfloat16()
    assert {p.dtype for p in half.model.blocks.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.model.final_layer.parameters()} == {torch.float32}
    expected, images = (s.sample(4, seeds=0, sampler="ddim") for s in (full, half))
    assert images.dtype == torch.float32
    assert 0 < (images - expected).abs().mean() < 0.01


def test_guidance_scale_acts():
    sampler = tiny_sampler()
    one, two = (sampler.sample([3, 4], cfg_scale=scale) for scale in (1, 2))
    assert not torch.allclose(one, two, atol=1e-2)
    # Scale 0 is the unconditional model, whatever the label:
    assert torch.allclose(sampler.sample([3], cfg_scale=0), sampler.sample([8], cfg_scale=0), atol=1e-5)


@pytest.mark.parametrize(
    "options, call, message",
    [
        ({}, dict(n_or_labels=[10]), "--class-labels 10: must be between 0 and 9"),
        ({}, dict(n_or_labels=[-1]), "--class-labels -1: must be between 0 and 9"),
        ({}, dict(n_or_labels=0), "0 samples: ask for at least 1"),
        ({}, dict(n_or_labels=2, seeds=[1, 2, 3]), "3 seeds for 2 samples"),
        ({}, dict(n_or_labels=2, cfg_scale=-1), "--cfg-scale -1: must be 0 or more"),
        ({}, dict(n_or_labels=2, cfg_scale=float("nan")), "--cfg-scale nan: must be 0 or more"),
        ({}, dict(n_or_labels=2, steps=0), "--num-sampling-steps 0: 0 steps: there must be at least 1"),
        ({}, dict(n_or_labels=2, sampler="magic"), "--sampler magic: this model has ddpm, ddim, dpm++"),
        ({}, dict(n_or_labels=2, cfg_channels=4), "--cfg-channels 4: must be between 1 and 3, or all"),
        ({}, dict(n_or_labels=2, cfg_interval=(2, 1)), "--cfg-interval: interval 2 1: must be two noise"),
        ({}, dict(n_or_labels=2, cfg_interval=[2]), "--cfg-interval [2]: must be two noise levels"),
        ({}, dict(n_or_labels=2, cfg_schedule="x"), "--cfg-schedule: schedule 'x': choose one of constant"),
        (
            {},
            dict(n_or_labels=2, sampler="heun", steps="ddim50"),
            "--num-sampling-steps ddim50: 'ddim50' is not a number of steps, and heun takes no other",
        ),
        (
            dict(num_classes=0),
            dict(n_or_labels=2, cfg_scale=2),
            "this model is unconditional, so there is nothing",
        ),
        (dict(num_classes=0), dict(n_or_labels=[1]), "--class-labels 1: this model is unconditional"),
        (dict(class_dropout_prob=0.0), dict(n_or_labels=2, cfg_scale=2), "was trained without label dropout"),
    ],
)
def test_refused_requests(options, call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny_sampler(**options).sample(**call)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(batch_size=0), "batch_size 0: must be a whole number, at least 1"),
        (dict(batch_size=-1), "batch_size -1: must be"),
        (dict(batch_size=1.5), "batch_size 1.5: must be"),
        (dict(batch_size=True), "batch_size True: must be"),
        (dict(n_or_labels=[1.7]), "labels 1.7: must be whole numbers, one an image"),
        (dict(n_or_labels=[1, True]), "labels True: must be"),
        (dict(n_or_labels=["1"]), "labels '1': must be"),
        (dict(n_or_labels="12"), "labels '1': must be"),
        (dict(n_or_labels=1.0), "labels 1.0: must be"),
        (dict(n_or_labels=None), "labels None: must be"),
        (dict(n_or_labels=True), "labels True: must be"),
        (dict(n_or_labels=np.array([1.0])), "labels 1.0: must be"),
        (dict(n_or_labels=torch.tensor([True])), "labels True: must be"),
        (dict(n_or_labels=torch.zeros(2, 2, dtype=torch.int64)), "labels tensor([0, 0]): must be"),
        (dict(seeds=[0.9, 1]), "seeds 0.9: must be"),
        (dict(seeds=0.9), "seeds 0.9: must be"),
        (dict(seeds=math.inf), "seeds inf: must be"),
        (dict(seeds=[math.nan, 1]), "seeds nan: must be"),
        (dict(seeds="7"), "seeds '7': must be"),
        (dict(seeds=-1), "--seed -1: must be 0 or more"),
        (dict(cfg_scale="2"), "--cfg-scale '2': must be a number"),
        (dict(cfg_scale=math.inf), "--cfg-scale inf: must be 0 or more"),
        (dict(cfg_scale=[2.0]), "--cfg-scale [2.0]: must be a number"),
        (dict(cfg_scale=torch.ones(2)), "--cfg-scale tensor([1., 1.]): must be a number"),
        (dict(cfg_scale=2j), "--cfg-scale 2j: must be a number"),
        (dict(cfg_interval=3.0), "--cfg-interval 3.0: must be two noise levels"),
        (dict(cfg_interval="12"), "--cfg-interval '12': must be two noise levels"),
        (dict(cfg_interval=(1, None)), "--cfg-interval (1, None): must be two noise levels"),
        (dict(cfg_interval=(1, math.nan)), "--cfg-interval: interval 1 nan: must be two noise levels"),
        (dict(cfg_channels="2"), "--cfg-channels '2': must be a whole number, or all"),
        (dict(cfg_channels=1.5), "--cfg-channels 1.5: must be"),
        (dict(cfg_channels=[1]), "--cfg-channels [1]: must be"),
        (dict(cfg_schedule=["constant"]), "--cfg-schedule ['constant']: must be a name"),
        (dict(sampler=["ddim"]), "--sampler ['ddim']: must be a name"),
        (dict(sampler=3), "--sampler 3: must be a name"),
        (dict(steps=5.0), "--num-sampling-steps 5.0: must be a whole number, or a spacing"),
        (dict(steps=True), "--num-sampling-steps True: must be"),
        (dict(steps=math.nan), "--num-sampling-steps nan: must be"),
        (dict(steps=object), "--num-sampling-steps <class 'object'>: "),
        (dict(steps=[1.5]), "--num-sampling-steps [1.5]: [1.5] is not a whole number of steps"),
        (dict(steps=[5], sampler="heun"), "--num-sampling-steps [5]: [5] is not a number of steps"),
        (dict(steps="five"), "--num-sampling-steps five: 'five' is not"),
        (dict(n_or_labels=[3], seeds=[7], published_draws=True), "--published-draws: takes one seed for all"),
        (dict(n_or_labels=[3, 4], seeds=[7], published_draws=True), "--seed: 1 seeds for 2 samples; give"),
        (dict(n_or_labels=[3], seeds=2**64, published_draws=True), "must be below 2^63 for the published"),
    ],
)
def test_values_of_another_type_are_refused(call, message, monkeypatch):
    sampler = tiny_sampler()
    monkeypatch.setattr(sampler, "generate", None)  # before any work
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        sampler.sample(**{"n_or_labels": 2, **call})
    assert "\n" not in str(refused.value)


def test_numbers_of_numpy_and_torch_are_numbers():
    sampler = tiny_sampler()
    expected = sampler.sample([3, 4], seeds=[7, 8], cfg_scale=2, cfg_channels=2, cfg_interval=(1, 9), steps=3)
    for whole, many, real in (
        (np.int64, np.array, np.float32), (torch.tensor, torch.tensor, torch.tensor), (int, iter, np.float64)
    ):  # fmt: skip
        images = sampler.sample(
            many([3, 4]), seeds=many([7, 8]), cfg_scale=real(2.0), cfg_channels=whole(2), steps=whole(3),
            cfg_interval=[real(1.0), real(9.0)], batch_size=whole(2),
        )  # fmt: skip
        assert torch.equal(images, expected)
        assert torch.equal(sampler.sample(whole(2), seeds=whole(5)), sampler.sample(2, seeds=[5, 6]))
        assert len(sampler.sample_each_class(whole(1), many([2, 3]), sampler="dpm++", steps=whole(2))) == 2


def test_images_that_cannot_be_led_back():
    sampler, images = tiny_sampler(), torch.rand(2, 3, 8, 8)
    for wrong, message in (
        (images[:0], "images (0, 3, 8, 8): must be (N, 3, 8, 8), and one or more"),
        (images[0], "images: must be a tensor (N, C, H, W) of values in [0, 1]"),
        (images[:, :1], "images (2, 1, 8, 8): must be (N, 3, 8, 8)"),
        (images[..., :4], "images (2, 3, 8, 4): must be (N, 3, 8, 8)"),
        ((images * 255).byte(), "images: must be a tensor"),
        (images * math.nan, "images: must be a tensor"),
        (images - 1, "images: must be a tensor"),
        (None, "images: must be a tensor"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            sampler.image_to_image(wrong, steps=2)
    for call, message in (
        (dict(labels=3), "labels 3: must be whole numbers"),
        (dict(labels=[1.5, 2]), "labels 1.5: must be"),
        (dict(labels=[1, 2], new_labels=[1, 10]), "--class-labels 10: must be between 0 and 9"),
        (dict(steps=1.5), "--num-sampling-steps 1.5: must be"),
        (dict(cfg_scale="2"), "--cfg-scale '2': must be a number"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            sampler.image_to_image(images, **call)
    expected = sampler.image_to_image(images, [1, 2], steps=3)
    labels, steps = torch.tensor([1, 2]), np.int64(3)
    assert torch.equal(sampler.image_to_image(images.double(), labels, steps=steps), expected)


def test_each_class_of_no_number():
    for call, message in (
        (dict(n_per_class=0), "n_per_class 0: must be a whole number, at least 1"),
        (dict(n_per_class=1.5), "n_per_class 1.5: must be"),
        (dict(n_per_class=1, classes=3), "classes 3: must be whole numbers"),
        (dict(n_per_class=1, classes=[]), "0 samples: ask for at least 1"),
        (dict(n_per_class=1, classes=[10]), "--class-labels 10: must be between 0 and 9"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            tiny_sampler().sample_each_class(**call)


def test_a_guide_that_would_guide_nothing():
    model = build_tiny(in_channels=3, learn_sigma=False, num_classes=0)
    sampler = Sampler(model, device="cpu", defaults=dict(cfg_scale=1.0, steps="2"), guide=model)
    with pytest.raises(UserError, match="--guide: this run samples with --cfg-scale 1, where nothing guides"):
        sampler.sample(1)
    assert sampler.sample(1, cfg_scale=2).shape == sampler.sample(1, cfg_scale=1).shape


def test_published_draws_need_labels():
    with pytest.raises(UserError, match="published_draws: the published script draws no labels"):
        tiny_sampler().sample(2, published_draws=True)


def test_grid_enlarges_tiny_images(tmp_path):
    images = torch.zeros(6, 1, 8, 8)
    images[4, 0, 2:6, 3:] = 1
    save_grid(images, str(tmp_path / "new" / "grid.png"), nrow=3)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)
        pixels = np.array(picture.convert("L"))
    tiles = {
        (i, j): pixels[2 + 66 * i : 66 + 66 * i, 2 + 66 * j : 66 + 66 * j] for i in range(2) for j in range(3)
    }
    assert [place for place, tile in tiles.items() if tile.max() > 0] == [(1, 1)]
    assert (tiles[1, 1][24:40, 40:] == 255).all() and (tiles[1, 1][:, :8] == 0).all()


def test_grid_leaves_larger_images_alone(tmp_path):
    images = torch.rand(2, 3, 64, 64)
    save_grid(images, str(tmp_path / "grid.png"), nrow=4)
    with Image.open(tmp_path / "grid.png") as picture:
        shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert shown.shape == (3, 68, 2 * 66 + 2)
    assert torch.equal(shown[:, 2:66, 68:132], (images[1] * 255 + 0.5).byte())


@pytest.mark.parametrize("dtype, device", OTHER_DEFAULTS)
@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_default_dtype_and_device_change_nothing(objective, dtype, device, tmp_path):
    """From the file to the image, by every sampler, guided by null label and by another model."""
    is_flow = objective == "flow"
    process = create_flow(path="gvp", prediction="noise") if is_flow else create_diffusion(None)
    model = load_rule_weights(build_tiny(learn_sigma=not is_flow, registers=2), 0.1)
    vae = save_vae(tmp_path / "vae")
    config = dict(model=model.config, process=process.config, autoencoder=dict(vae=vae))
    checkpoints.save(str(tmp_path / "run.pt"), dict(ema=model.state_dict(), config=config))
    checkpoints.export(checkpoints.load(str(tmp_path / "run.pt")), str(tmp_path / "run.safetensors"))

    def everything():
        sampler = Sampler.from_checkpoint(tmp_path / "run.pt", device="cpu")
        guided = Sampler.from_checkpoint(
            tmp_path / "run.safetensors", device="cpu", guide=tmp_path / "run.pt", precision="bf16"
        )
        found = [
            one.sample(2, steps=2, sampler=name, cfg_interval=(0.1, 100), cfg_schedule="power-cosine")
            for one in (sampler, guided) for name in process.samplers
        ]  # fmt: skip
        found.append(sampler.image_to_image(found[0], [1, 2], [3, 4], steps=2))
        found += sampler.sample([3], seeds=2**40, steps=2, return_trajectory=True)
        if not is_flow:
            found.append(sampler.sample([3, 4], steps=2, published_draws=True))
        former = SampleNoise([5, 2**32], draws=1)
        return [*found, former.labels(10), former.randn((2,))]

    expected = everything()
    with other_defaults(dtype, device):
        images = everything()
    assert all(one.dtype == other.dtype for one, other in zip(images, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(images, expected))


def test_a_model_of_another_dtype_is_sampled():
    """As a default dtype makes it: its images are those of the same weights in float32, to rounding."""
    sampler = tiny_sampler()
    expected = sampler.sample([3, 4])
    sampler.model.double()
    images = sampler.sample([3, 4])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
