"""The commands as documented: help on every option, and README lines that parse; the lists of
dependencies."""

import importlib
import json
import re
import shlex
import sys
import tomllib

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from test_data import write_image

from models import DiT, DiT_models
from runtime import launch

COMMANDS = sorted(path.stem for path in ROOT.glob("*.py") if "launch(main, build_parser(" in path.read_text())
README = (ROOT / "README.md").read_text()
SCRIPTS = r"\b(train|sample|sample_ddp|extract_features|evaluate)\.py\b"


def test_all_commands_are_found():
    assert {"train", "sample", "extract_features", "evaluate", "checkpoint", "download", "models"} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_everything(name):
    module = importlib.import_module(name)
    parser = module.build_parser()
    for action in parser._actions:
        if action.dest == "help":
            continue
        if not action.option_strings:  # a positional one has no default
            assert action.help and (action.choices or action.metavar.isupper()), f"{name}.py {action.dest}"
            continue
        option = action.option_strings[0]
        assert option.startswith("--") and "_" not in option, option
        assert action.help and "(default" in action.help, f"{name}.py {option}: help with a default"
        if action.nargs != 0 and not action.choices:
            units = action.metavar if isinstance(action.metavar, tuple) else [action.metavar or ""]
            assert all(unit.isupper() for unit in units), f"{name}.py {option}: what unit?"
        shown = re.search(r"\(default: ([^);]+)", action.help)[1]
        if isinstance(action.default, bool):
            assert shown == ("on" if action.default else "off"), option
        elif isinstance(action.default, (int, float)):
            assert float(shown) == action.default, option
        elif isinstance(action.default, list):
            assert shown == " ".join(map(str, action.default)), option
        elif action.default is not None:
            assert shown == action.default, option
    parser.format_help()


def readme_commands():
    """Every line of these scripts in the README's code blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if re.search(SCRIPTS, line)]


def test_readme_has_the_commands():
    found = "\n".join(readme_commands())
    for expected in ("uv run train.py --preset digits", "uv run sample.py --ckpt", "torchrun --nnodes=1"):
        assert expected in found


def write_checkpoint(path, **config):
    """A checkpoint of the right shapes whose tensors are one number, repeated without taking space."""
    with torch.device("meta"):
        model = DiT(**config)
    state = {key: torch.zeros(1).expand(value.shape) for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = dict(vae="none", factor=1) if model.in_channels == 1 else {}
    torch.save(dict(ema=state, config=dict(model=model.config, autoencoder=pixels)), path)


def write_cache(folder):
    """A cache of 256 latents, in little space."""
    folder.mkdir()
    np.save(folder / "moments.npy", np.zeros((256, 2, 8, 1, 1), np.float16))
    np.save(folder / "labels.npy", np.arange(256) % 10)
    vae = dict(vae="stabilityai/sd-vae-ft-ema", channels=4, factor=8, scale=0.18215, shift=0.0)
    files = dict(moments="moments.npy", labels="labels.npy")
    shards = [dict(files, bytes=(folder / "moments.npy").stat().st_size, sha256="0" * 64)]
    manifest = dict(
        complete=True,
        vae=vae,
        image_size=256,
        classes=list("0123456789"),
        count=256,
        shard_size=256,
        shards=shards,
    )
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_evaluated(folder):
    """Images to evaluate, and statistics to compare them with."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(folder / "samples.npz", images)
    statistics = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    for name in ("VIRTUAL_imagenet256_labeled.npz", "my_reference.npz"):
        np.savez_compressed(folder / name, images, **statistics)


@pytest.mark.parametrize("line", readme_commands())
def test_readme_commands_run_dry(line, tmp_path, monkeypatch, capsys):
    """With images for a batch and to hold out, checkpoints and so on, where the reader would have them."""
    monkeypatch.chdir(tmp_path)
    for i in range(300):
        write_image(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", size=(4, 4), seed=i)
    write_checkpoint(tmp_path / "model.pt", **DiT_models["DiT-XL/2"].keywords)
    digits = dict(input_size=8, in_channels=1, hidden_size=64, depth=2, num_heads=4, num_classes=10)
    write_checkpoint(tmp_path / "results/000-DiT-S-2-digits/checkpoints/0002000.pt", **digits)
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if re.fullmatch(SCRIPTS, word))
    if words[script] != "extract_features.py":  # else it is yet to be written
        write_cache(tmp_path / "features")
    write_evaluated(tmp_path)
    here = {"/path/to/imagenet/train": "images", "/path/to/images": "images", "/path/to/model.pt": "model.pt"}
    if words[script] == "train.py":  # else it is yet to be written
        here["reference.npz"] = "my_reference.npz"
    argv = [here.get(word, word) for word in words[script + 1 :]]
    module = importlib.import_module(words[script].removesuffix(".py"))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", [words[script], *argv, "--dry-run"])
    launch(module.main, module.build_parser())
    assert "nothing was written" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before


def test_conda_environment_is_the_same_list():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip == project["project"]["dependencies"]
    assert f"python{project['project']['requires-python']}" in conda
    for dependency in pip:
        assert re.fullmatch(r"[a-z-]+>=[\d.]+,<[\d.]+", dependency), (
            f"{dependency}: a range with an upper bound"
        )


def test_assets_carry_their_licence():
    assert "CC BY 4.0" in (ROOT / "assets" / "README.md").read_text()
    assert "MIT License" in (ROOT / "LICENSE").read_text()
