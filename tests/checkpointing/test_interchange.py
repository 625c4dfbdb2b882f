"""checkpoint.py export, and what diffusers reads and writes: safetensors and DiTPipeline folders."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import OTHER_DEFAULTS, build_tiny, load_rule_weights, other_defaults
from networks import save_tiny, save_vae

import checkpoint
from checkpointing import files as checkpoints
from checkpointing import published
from checkpointing.diffusers_format import from_diffusers, to_diffusers
from checkpointing.files import build_model
from diffusion import create_diffusion
from runtime.autoencoder import AUTOENCODERS
from runtime.class_names import class_names, resolve_labels
from runtime.cli import UserError, launch
from sampler import Sampler


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    save_vae(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def ckpt(tmp_path, vae):
    """A latent model of ten classes, its average other than its raw weights."""
    model = load_rule_weights(build_tiny(), 0.1)
    raw = {key: value + 1 for key, value in model.state_dict().items()}
    config = dict(
        model=model.config, process=create_diffusion(None).config, autoencoder=dict(vae=str(vae)),
        data=dict(classes=[f"class {i}" for i in range(10)]), sampling=dict(cfg_scale=3.0, steps="7"),
    )  # fmt: skip
    path = str(tmp_path / "run.pt")
    checkpoints.save(path, dict(model=raw, ema=model.state_dict(), step=3, config=config))
    return path


def export(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "export", *map(str, argv)])
    launch(checkpoint.main, checkpoint.build_parser())


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_safetensors_round_trip(ckpt, tmp_path, monkeypatch, weights):
    out = str(tmp_path / "dit.safetensors")
    export(monkeypatch, "--ckpt", ckpt, "--out", out, "--weights", weights)
    found, original = checkpoints.load(out), checkpoints.load(ckpt)
    assert_same(found.state_dict("ema"), original.state_dict(weights))
    assert found.config == original.config
    again = str(tmp_path / "again.safetensors")
    export(monkeypatch, "--ckpt", out, "--out", again)
    with open(out, "rb") as first, open(again, "rb") as second:
        assert first.read() == second.read()
    if weights == "ema":
        images = Sampler.from_checkpoint(out, device="cpu").sample([3, 4])
        assert torch.equal(images, Sampler.from_checkpoint(ckpt, device="cpu").sample([3, 4]))


@pytest.mark.parametrize("dtype, device", OTHER_DEFAULTS)
def test_pipelines_load_under_any_default(ckpt, tmp_path, dtype, device):
    checkpoints.export(checkpoints.load(ckpt), str(tmp_path / "pipeline"), any_classes=True)
    expected = checkpoints.load(str(tmp_path / "pipeline")).state_dict()
    with other_defaults(dtype, device):
        found = checkpoints.load(str(tmp_path / "pipeline")).state_dict()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_same(found, expected)


def test_bare_safetensors_export(tmp_path, monkeypatch):
    """Weights that come without a config leave with the one read off their shapes."""
    model = build_tiny(hidden_size=384, depth=12, num_heads=6)
    checkpoints.save(str(tmp_path / "bare.pt"), model.state_dict())
    export(monkeypatch, "--ckpt", tmp_path / "bare.pt", "--out", tmp_path / "a.safetensors")
    found = checkpoints.load(str(tmp_path / "a.safetensors"))
    assert found.config["model"] == model.config and found.config["process"]["learn_sigma"]


def test_pipeline_of_1000_classes_samples_by_its_defaults(vae, tmp_path, monkeypatch, capsys):
    from diffusers import DiTPipeline

    model = load_rule_weights(build_tiny(num_classes=1000), 0.1)
    config = dict(model=model.config, autoencoder=dict(vae=str(vae)))
    checkpoints.save(str(tmp_path / "run.pt"), dict(ema=model.state_dict(), config=config))
    export(monkeypatch, "--ckpt", tmp_path / "run.pt", "--out", tmp_path / "pipeline")
    said = capsys.readouterr().out
    assert "frequencies 10000^(-i/127)" in said and "it guides all 4 channels" in said
    assert "null label" not in said
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def sample(**options):
        generator = torch.Generator().manual_seed(0)
        return pipeline([207], num_inference_steps=4, generator=generator, output_type="np", **options).images

    assert sample().shape == (1, 32, 32, 3) and not (sample() == sample(guidance_scale=1.0)).all()


def test_a_vae_with_a_shift_is_refused(ckpt, tmp_path, monkeypatch, capsys):
    save_vae(tmp_path / "shifted", shift_factor=0.25)
    argv = ["--ckpt", ckpt, "--out", tmp_path / "out", "--vae", tmp_path / "shifted", "--any-classes"]
    with pytest.raises(SystemExit):
        export(monkeypatch, *argv)
    message = capsys.readouterr().err
    assert re.search(r"--out: .*ignores the shift .*0.25.*give --out FILE.safetensors", message)
    assert not (tmp_path / "out").exists()


def test_a_deterministic_autoencoder_in_a_pipeline(ckpt, tmp_path, monkeypatch):
    """diffusers decodes the same latents to the same images, and the folder comes back with it."""
    from diffusers import DiTPipeline

    tiny = save_tiny(tmp_path / "tiny", scaling_factor=0.5)
    export(monkeypatch, "--ckpt", ckpt, "--out", tmp_path / "pipeline", "--any-classes", "--vae", tiny)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    x = torch.randn(2, 4, 8, 8)
    theirs = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    sampler = Sampler.from_checkpoint(str(tmp_path / "pipeline"), device="cpu")
    assert torch.equal(sampler.autoencoder.decode(x), theirs)
    expected = Sampler.from_checkpoint(ckpt, vae=tiny, device="cpu").sample([3, 4], steps=3)
    assert torch.equal(sampler.sample([3, 4], steps=3, cfg_scale=3.0), expected)


def test_an_autoencoder_that_diffusers_has_not(ckpt, tmp_path, monkeypatch, capsys):
    from diffusers import AutoencoderTiny

    class Mine(AutoencoderTiny):
        pass

    folder = tmp_path / "mine"
    save_tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(config, _class_name="Mine")))
    tiny = AUTOENCODERS["AutoencoderTiny"]
    monkeypatch.setitem(AUTOENCODERS, "Mine", replace(tiny, load=Mine.from_pretrained))
    argv = ["--ckpt", ckpt, "--vae", folder, "--any-classes", "--out"]
    with pytest.raises(SystemExit):
        export(monkeypatch, *argv, tmp_path / "out")
    assert f"diffusers has no Mine, the class of {folder}; give --out FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    export(monkeypatch, *argv, tmp_path / "out.safetensors")
    assert Sampler.from_checkpoint(tmp_path / "out.safetensors", device="cpu").sample(2).shape == (
        2,
        3,
        32,
        32,
    )


def test_pipeline_loads_offline_and_makes_an_image(ckpt, tmp_path, monkeypatch, capsys):
    from diffusers import DiTPipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "pipeline"
    with pytest.raises(SystemExit):
        export(monkeypatch, "--ckpt", ckpt, "--out", folder)
    assert "a model of 10 classes; give --any-classes" in capsys.readouterr().err
    assert not folder.exists()
    export(monkeypatch, "--ckpt", ckpt, "--out", folder, "--any-classes")
    assert "its null label is 1000, this model's 10: give it guidance_scale=1" in capsys.readouterr().out
    pipeline = DiTPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels["class 7"] == 7
    images = pipeline(
        pipeline.get_label_ids(["class 7", "class 2"]), guidance_scale=1.0, num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert len(images) == 2 and images[0].size == (32, 32) and len(set(images[0].tobytes())) > 20


def test_a_diffusers_folder_loads_back_bitwise(ckpt, tmp_path, monkeypatch):
    export(monkeypatch, "--ckpt", ckpt, "--out", tmp_path / "pipeline", "--any-classes")
    for part in ("", "transformer"):
        found = checkpoints.load(str(tmp_path / "pipeline" / part))
        assert_same(found.state_dict(), checkpoints.load(ckpt).state_dict())
        model = build_model(found.model_config(factor=4), found.state_dict(), "here")
        assert model.config == build_tiny().config
    ours = Sampler.from_checkpoint(ckpt, device="cpu").sample([3, 4], cfg_scale=2.0, steps=5)
    sampler = Sampler.from_checkpoint(str(tmp_path / "pipeline"), device="cpu")
    assert torch.equal(sampler.sample([3, 4], cfg_scale=2.0, steps=5), ours)


def test_a_hub_id_is_fetched(ckpt, tmp_path, monkeypatch):
    import huggingface_hub

    export(monkeypatch, "--ckpt", ckpt, "--out", tmp_path / "pipeline", "--any-classes")
    asked = []

    def fetch(name, allow_patterns):
        asked.append(name)
        if name == "owner/none":
            raise OSError("401 Client Error\nand more")
        return str(tmp_path / "pipeline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert published.find_file("owner/DiT-mine") == str(tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"--ckpt owner/none: no such file or folder, and as a hub id .*401"):
        published.find_file("owner/none")
    for local in ("results/a/b.pt", "here/weights.safetensors", "/tmp/none", "none.pt", ckpt):
        assert published.find_file(local) == local
    assert asked == ["owner/DiT-mine", "owner/none"]


def test_embedders_that_differ_are_refused():
    model = build_tiny(depth=3)
    theirs = to_diffusers(model.state_dict(), 3)
    theirs["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(ValueError, match=r"block 2 has an embedder of its own"):
        from_diffusers(theirs, 3, model.pos_embed)


def test_other_configs_are_refused(ckpt, tmp_path, monkeypatch):
    export(monkeypatch, "--ckpt", ckpt, "--out", tmp_path / "pipeline", "--any-classes")
    path = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(dict(config, beta_end=0.03)))
    with pytest.raises(UserError, match="its noise schedule is linear"):
        checkpoints.load(str(tmp_path / "pipeline"))
    path.write_text(json.dumps(dict(config, beta_schedule="squaredcos_cap_v2")))
    found = checkpoints.load(str(tmp_path / "pipeline"))
    assert found.config["process"]["noise_schedule"] == "squaredcos_cap_v2"
    for other in (
        dict(num_train_timesteps=500),
        dict(trained_betas=[0.1]),
        dict(rescale_betas_zero_snr=True),
    ):
        path.write_text(json.dumps({**config, **other}))
        with pytest.raises(UserError, match="of other than 1000 steps|trained_betas|rescale_betas_zero_snr"):
            checkpoints.load(str(tmp_path / "pipeline"))
    path.write_text("{bad")
    with pytest.raises(UserError, match="scheduler_config.json: is damaged"):
        checkpoints.load(str(tmp_path / "pipeline"))
    with pytest.raises(UserError, match="not a DiT that diffusers saved"):
        checkpoints.load(str(tmp_path / "vae"))


@pytest.mark.parametrize(
    "options, vae, message",
    [
        ({}, "none", "diffusers' DiTPipeline has no pixel models"),
        (dict(input_size=[8, 4]), None, "no rectangular models"),
        (dict(num_classes=0), None, "no unconditional models"),
        (dict(class_dropout_prob=0.0), None, "no models trained without label dropout"),
        (dict(mlp_ratio=2.0), None, "no models of another mlp_ratio"),
        (dict(block="in-context"), None, "no in-context blocks"),
        (dict(ffn="conv"), None, "no conv FFN"),
        (dict(pos_embed="learned"), None, "no learned position embedding"),
        (dict(registers=2), None, "no registers"),
        (dict(qk_norm=True), None, "no QK-norm"),
    ],
)
def test_models_that_no_pipeline_holds(tmp_path, monkeypatch, capsys, options, vae, message):
    model = build_tiny(**options)
    contents = dict(ema=model.state_dict(), config=dict(model=model.config))
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(SystemExit):
        more = ["--vae", vae] if vae else []
        export(monkeypatch, "--ckpt", tmp_path / "a.pt", "--out", tmp_path / "out", *more)
    assert re.search(f"--out: .*{message}.*give --out FILE.safetensors", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(ckpt, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        export(monkeypatch, "--ckpt", ckpt, "--out", ckpt)
    assert "exists; remove it, or give another name" in capsys.readouterr().err


def test_names_of_classes():
    assert class_names(1000)[207] == "golden retriever"
    assert class_names(3, ["a", "b", "c"]) == ["a", "b", "c"]
    assert class_names(2) == ["0", "1"]
    for classes in (None, class_names(1000)):  # as exported to diffusers, synonyms after commas
        assert resolve_labels(["tench", "Carcharodon carcharias"], 1000, classes) == [0, 2]
