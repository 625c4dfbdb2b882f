"""checkpoint.py: written whole or not at all, and nothing loaded that can execute code."""

import argparse
import os
import re

import pytest
import torch
from conftest import build_tiny, load_rule_weights

from checkpointing import files as checkpoints
from models import DiT_models
from runtime.cli import UserError


def small(name="DiT-S/8", **overrides):
    with torch.device("meta"):
        model = DiT_models[name](**overrides)
    model = model.to_empty(device="cpu")
    model.pos_embed.data.zero_()  # the weights' rule leaves it
    return model


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as refused:
        call(*args, **kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "0000001.pt"
    checkpoints.save(path, dict(model=dict(a=torch.ones(3))))

    def full(*args, **kwargs):
        args[1].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = refusal(checkpoints.save, path, dict(model=dict(a=torch.zeros(3))))
    assert "could not be written; earlier checkpoints stand; make room" in message
    assert message.endswith("(No space left on device)")
    assert os.listdir(tmp_path) == [path.name]
    assert checkpoints.load(path).state_dict()["a"].tolist() == [1, 1, 1]


def test_setting_aside_again(tmp_path):
    for what in (b"first", b"second"):  # folders of shards, and one exported beside itself
        for step in ("0000004", "0000008", "0000012"):
            (tmp_path / step).mkdir(exist_ok=True)
            (tmp_path / step / "shard").write_bytes(what)
        (tmp_path / "0000012.pt").write_bytes(what)
        checkpoints.set_aside(str(tmp_path), 4)
        assert list(checkpoints.numbered(tmp_path)) == [4]
        assert sorted(os.listdir(tmp_path)) == [
            "0000004", "0000008.unused", "0000012.pt.unused", "0000012.unused"
        ]  # fmt: skip
        assert (tmp_path / "0000008.unused" / "shard").read_bytes() == what


def test_a_training_checkpoint_keeps_both_weights(tmp_path):
    path = tmp_path / "c.pt"
    checkpoints.save(
        path, dict(model=dict(a=torch.ones(1)), ema=dict(a=torch.zeros(1)), config=dict(model=dict(depth=2)))
    )
    found = checkpoints.load(path)
    assert found.state_dict("ema")["a"] == 0 and found.state_dict("raw")["a"] == 1
    checkpoints.save(str(tmp_path / "best.pt"), dict(ema=dict(a=torch.zeros(1)), step=3))
    best = checkpoints.load(str(tmp_path / "best.pt"))
    assert best.state_dict()["a"] == 0
    with pytest.raises(UserError, match="--weights raw: .*best.pt holds averaged weights alone"):
        best.state_dict("raw")
    assert found.config == dict(model=dict(depth=2))


def test_the_published_script_s_checkpoint_loads(tmp_path):
    """It holds an argparse.Namespace, which torch refuses unless told that it is data."""
    path, model = tmp_path / "c.pt", build_tiny()
    torch.save(
        dict(model=model.state_dict(), ema=model.state_dict(), opt={}, args=argparse.Namespace(model="x")),
        path,
    )
    assert set(checkpoints.load(path).state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_bare_state_dict_loads_strictly(tmp_path, suffix):
    """The published layout: no config, so the model is read off the shapes."""
    from safetensors.torch import save_file

    model = load_rule_weights(small("DiT-S/8", num_classes=7, input_size=16), 0.05)
    path = str(tmp_path / f"weights.{suffix}")
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
    found = checkpoints.load(path)
    config = found.model_config(model="DiT-S/8", image_size=128, num_classes=7)
    assert config == model.config == found.model_config()
    again = checkpoints.build_model(config, found.state_dict(), path)
    assert not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(model="DiT-S/4"), "--model DiT-S/4: {path} holds DiT-S/8; leave --model out"),
        (dict(image_size=512), "--image-size 512: {path} is for 256x256; leave --image-size out"),
        (dict(num_classes=10), "--num-classes 10: {path} has 1000; leave --num-classes out"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_another_model_than_said(tmp_path, options, message, with_config):
    path, model = str(tmp_path / "c.pt"), small()
    torch.save(
        dict(model=model.state_dict(), config=dict(model=model.config))
        if with_config
        else model.state_dict(),
        path,
    )
    assert refusal(checkpoints.load(path).model_config, **options) == message.format(path=path)


def test_weights_that_do_not_fit(tmp_path):
    model, state = build_tiny(), build_tiny(num_classes=12).state_dict()
    message = refusal(checkpoints.load_weights, model, state, "c.pt")
    assert re.search(
        r"does not fit a DiT of depth 2.*embedding_table.weight is \(13, 64\) there and \(11, 64\) here",
        message,
    )
    state = build_tiny(depth=3).state_dict()
    assert "it has an unknown blocks.2." in refusal(checkpoints.load_weights, model, state, "c.pt")
    state = build_tiny(depth=1).state_dict()
    assert "it lacks blocks.1." in refusal(checkpoints.load_weights, model, state, "c.pt")


class Payload:
    """What a hostile file would hold: something that runs when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=Payload()), "c.pt")
    assert "refused, since loading it would execute code" in refusal(checkpoints.load, "c.pt")
    assert not os.path.exists("executed")


def test_files_that_are_no_checkpoint(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    assert refusal(checkpoints.load, "nowhere.pt") == "--ckpt nowhere.pt: no such file"
    for content in (b"", b"junk", b"PK\x03\x04 junk", b"\x80\x02}q\x00"):
        assert "not a checkpoint" in refusal(checkpoints.load, write("c.pt", content))
    assert "not a safetensors file" in refusal(checkpoints.load, write("c.safetensors", b"junk"))
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert "it holds a Tensor" in refusal(checkpoints.load, str(tmp_path / "tensor.pt"))
    torch.save(dict(a=1), tmp_path / "numbers.pt")
    assert "neither a training checkpoint nor a state dict" in refusal(
        checkpoints.load, str(tmp_path / "numbers.pt")
    )
    torch.save(dict(a=torch.ones(2)), tmp_path / "other.pt")
    other = checkpoints.load(str(tmp_path / "other.pt"))
    assert "not the state dict of a DiT (no x_embedder.proj.weight)" in refusal(other.model_config)


def test_a_run_s_folder(tmp_path):
    message = refusal(checkpoints.load, str(tmp_path))
    assert message == f"--ckpt {tmp_path}: a folder without weights"
    (tmp_path / "checkpoints").mkdir()
    for name in ("0000010.pt", "0000020.pt"):
        (tmp_path / "checkpoints" / name).touch()
    newest = tmp_path / "checkpoints" / "0000020.pt"
    assert f"; give a checkpoint of that run, as {newest}" in refusal(checkpoints.load, str(tmp_path))


def test_a_file_cut_short(tmp_path):
    path = tmp_path / "c.pt"
    checkpoints.save(path, dict(model=build_tiny().state_dict()))
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "not a checkpoint, or cut short" in refusal(checkpoints.load, str(path))
