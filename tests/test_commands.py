"""The commands and documents: help on every option; commands, options, files and links of the documents are
there; the lists of dependencies."""

import hashlib
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
from images import write_image

from evaluation.features import SmallCNN
from experiments.classifier import save as save_classifier
from models import DiT, DiT_models
from runtime.cli import launch

STARTS = "launch(main, build_parser("
COMMANDS = sorted(path.stem for path in ROOT.glob("*.py") if STARTS in path.read_text())
EXPERIMENTS = sorted(
    f"experiments.{path.stem}" for path in ROOT.glob("experiments/*.py") if STARTS in path.read_text()
)
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
    if path.exists()
}
SCRIPTS = rf"({'|'.join(COMMANDS)})\.py"
# Options in the documents that are torchrun's or uv's:
FOREIGN_OPTIONS = {
    "--nnodes",
    "--nproc_per_node",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--max-restarts",
    "--shutdown-timeout",
    "--group",
    "--isolated",
    "--resolution",
    "--python",
}


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


def documented_commands(*names):
    """Every command in the bash blocks of these documents (default: all), once, continued lines joined."""
    texts = [DOCUMENTS[name] for name in names or DOCUMENTS]
    blocks = re.findall(r"^```bash\n(.*?)^```", "\n".join(texts), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [" ".join(line.split("#")[0].split()) for line in lines]
    return list(dict.fromkeys(line for line in lines if re.search(rf"(^|\s){SCRIPTS}(\s|$)", line)))


def test_readme_has_the_commands():
    found = "\n".join(documented_commands("README.md"))
    for expected in ("uv run train.py --preset digits", "uv run sample.py --ckpt", "torchrun --nnodes=1"):
        assert expected in found
    assert DOCUMENTS["README.md"].count("\n") <= 150


def test_documented_options_exist():
    parsers = [importlib.import_module(name).build_parser() for name in COMMANDS + EXPERIMENTS]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for name, text in DOCUMENTS.items():
        if name == "CONTRIBUTING.md":  # which has other tools' options
            continue
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert used <= known | FOREIGN_OPTIONS, f"{name}: {sorted(used - known - FOREIGN_OPTIONS)}"


def test_documented_files_exist():
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name, text in DOCUMENTS.items():
        for file in set(re.findall(r"(?<![\w./])(?:\w+/)*\w+\.py\b", text)):
            assert any(f"/{path}".endswith(f"/{file}") for path in there), f"{name}: there is no {file}"


def anchors(text):
    """The link targets that GitHub makes of a document's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_documents(name):
    text, folder = DOCUMENTS[name], (ROOT / name).parent
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (folder / file).resolve() if file else ROOT / name
        assert path.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{name}: {target}"
    if name.startswith("docs/"):
        assert name in re.findall(r"\(([^)\s]+)\)", DOCUMENTS["README.md"]) and "../README.md" in targets
        contents = re.search(r"\A# .+\n\n(Contents: .+?)\n\n", text, re.DOTALL)[1]
        sections = re.findall(r"^## .+$", text, re.MULTILINE)
        assert re.findall(r"\(#([^)]+)\)", contents) == [anchors(section)[0] for section in sections]


def write_checkpoint(path, **config):
    """A checkpoint of the right shapes whose tensors are one number, repeated without taking space."""
    with torch.device("meta"):
        model = DiT(**config)
    state = {key: torch.zeros(1).expand(value.shape) for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = dict(vae="none", factor=1) if model.in_channels == 1 else {}
    torch.save(dict(ema=state, model=state, config=dict(model=model.config, autoencoder=pixels)), path)


def write_cache(folder):
    """A cache of 256 latents, in little space."""
    folder.mkdir()
    np.save(folder / "moments.npy", np.zeros((256, 2, 8, 1, 1), np.float16))
    np.save(folder / "labels.npy", np.arange(256) % 10)
    vae = dict(vae="stabilityai/sd-vae-ft-ema", channels=4, factor=8, scale=0.18215, shift=0.0)
    moments = (folder / "moments.npy").read_bytes()
    sha256 = hashlib.sha256(moments).hexdigest()
    shards = [dict(moments="moments.npy", labels="labels.npy", bytes=len(moments), sha256=sha256)]
    manifest = dict(
        complete=True,
        vae=vae,
        image_size=256,
        classes=list("0123456789"),
        count=256,
        shard_size=256,
        shards=shards,
        latents=dict(mean=0.0, std=1.0, channel_mean=[0.0] * 4, channel_std=[1.0] * 4),
    )
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_evaluated(folder):
    """Images to evaluate, and statistics to compare them with."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(folder / "samples.npz", images)
    statistics = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    for name in ("VIRTUAL_imagenet256_labeled.npz", "my_reference.npz"):
        np.savez_compressed(folder / name, images, **statistics)
    np.savez(folder / "labelled.npz", images, np.arange(4))
    sizes = dict(num_classes=4, widths=[2], hidden=2)
    weights = str(folder / "classifier.safetensors")
    save_classifier(SmallCNN(*sizes.values()), weights, dict(sizes, image_size=8))


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory):
    """Images for a batch and to hold out, checkpoints and so on, where a reader of the documents has them."""
    folder = tmp_path_factory.mktemp("reader")
    for i in range(300):
        write_image(folder / "images" / "ab"[i % 2] / f"{i}.png", size=(4, 4), seed=i)
    write_checkpoint(folder / "model.pt", **DiT_models["DiT-XL/2"].keywords)
    digits = dict(input_size=8, in_channels=1, hidden_size=64, depth=2, num_heads=4, num_classes=10)
    write_checkpoint(folder / "results/000-DiT-S-2-digits/checkpoints/0002000.pt", **digits)
    write_cache(folder / "features")
    write_evaluated(folder)
    return folder


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_run_dry(line, readers_folder, monkeypatch, capsys):
    """Those without --dry-run are parsed."""
    monkeypatch.chdir(readers_folder)
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if re.fullmatch(SCRIPTS, word))
    here = {"/path/to/imagenet/train": "images", "/path/to/images": "images", "/path/to/model.pt": "model.pt"}
    if words[script] == "train.py":  # else they are yet to be written
        here |= {"reference.npz": "my_reference.npz", "features-mse": "features"}
    if words[script] == "extract_features.py":  # the same
        here |= {"features": "cache", "features-mse": "cache"}
    argv = [here.get(word, word) for word in words[script + 1 :]]
    if words[0] == "torchrun" and "--shard" in argv:  # which this one process has nobody to share with
        argv.remove("--shard")
    module = importlib.import_module(words[script].removesuffix(".py"))
    parser = module.build_parser()
    if "--dry-run" not in parser._option_string_actions:
        parser.parse_args(argv)
        return
    before = sorted(readers_folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", [words[script], *argv, "--dry-run"])
    launch(module.main, parser)
    assert "nothing was written" in capsys.readouterr().out
    assert sorted(readers_folder.rglob("*")) == before


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
