"""Checkpoints: tensors and plain data in, tensors and plain data out; nothing loaded can execute code.

A training checkpoint is one file, results/…/checkpoints/0050000.pt, with the published training script's keys
and more:

    model, ema   state dicts                  opt      optimiser state
    args         the command's options        step     optimiser steps taken
    config       model, process, autoencoder, data, sampling: plain dicts that rebuild each
    timestep_sampler   state of a learned timestep distribution
    meter, device      running means of the log; the GPU or processor
    aux_loss           state dict of an auxiliary loss's weights, where there is one

training/run.py, Run.save, puts it together.

`load` also takes the published weights and any bare state dict, as .pt or .safetensors, and what diffusers
saved, a DiTPipeline or its transformer alone.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import dataclass, field

import torch

from checkpointing import sharded
from checkpointing.diffusers_format import is_diffusers, load_diffusers, pipeline_differences, save_diffusers
from models import DiT, DiT_models
from runtime.cli import UserError, atomic_write, is_utf8, torch_defaults, user_errors


def save(path, contents):
    """Write a dict of tensors and plain data; the file is either complete or not there, also after a power
    cut.

    Raises UserError where it cannot be written, a full disk say; what was there before still stands.
    """
    # torch's own writer raises RuntimeErrors:
    with user_errors(path, sharded.UNWRITTEN, (OSError, RuntimeError)):
        with atomic_write(path, "wb") as file:
            torch.save(contents, file)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def numbered(folder):
    """The checkpoints of a folder, {step: path}, by step."""
    names = sorted(_names(folder), reverse=True)
    # Where a folder of shards has been exported beside itself, the folder is the run's, and comes last:
    found = {int(name.removesuffix(".pt")): name for name in names}
    return {step: os.path.join(folder, found[step]) for step in sorted(found)}


def _names(folder):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return list(filter(re.compile(r"\d+(\.pt)?").fullmatch, names))


def step_of(path):
    """The step in a checkpoint's name."""
    return int(os.path.basename(os.path.normpath(path)).removesuffix(".pt"))


def latest(folder):
    """The path of the checkpoint of the highest step in a folder that is whole, or None where there is none.

    Raises UserError where there are some, but none can be read.
    """
    found = numbered(folder)
    for path in reversed(found.values()):
        with contextlib.suppress(UserError):
            if os.path.isdir(path) and sharded.is_complete(path):
                return path
            load(path)
            return path
    if found:
        raise UserError(
            f"{folder}: none of its {len(found)} checkpoints can be read; mend or remove that run"
        )
    return None


def set_aside(folder, step):
    """Rename the checkpoints after a step, damaged or no longer wanted, so that nothing counts them; returns
    their names."""
    later = [name for name in _names(folder) if step_of(name) > step]
    for name in later:
        aside = os.path.join(folder, f"{name}.unused")
        if os.path.isdir(aside):  # of an earlier time; a file is replaced, a folder is not
            _remove(aside)
        os.replace(os.path.join(folder, name), aside)
    return later


def retain(folder, count):
    """Delete all but the last count checkpoints of a folder, and what a crash left of an unfinished one."""
    for path in list(numbered(folder).values())[:-count] if count else []:
        _remove(path)
    for name in os.listdir(folder):
        if name.endswith(".tmp"):
            _remove(os.path.join(folder, name))


def _remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


@dataclass
class Checkpoint:
    """What a file held. A bare state dict stands under "ema" and "model" alike, with an empty config."""

    path: str
    contents: dict
    config: dict = field(default_factory=dict)

    def state_dict(self, weights="ema"):
        """The model's state dict: "ema" averaged, "raw" as trained last; UserError where it has no such."""
        state = self.contents["ema" if weights == "ema" else "model"]
        if state is None:
            raise UserError(f"--weights raw: {self.path} holds averaged weights alone; leave --weights out")
        # A run that compiled or wrapped its model in DDP by other code may have saved the wrapper's prefix:
        return {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}

    def model_config(self, *, model=None, image_size=None, num_classes=None, factor=8):
        """The arguments of DiT for this checkpoint: those it keeps, else read off its tensors.

        model ("DiT-XL/2"), image_size (pixels, factor times the model's) and num_classes are what the user
        says it must be; None leaves it to the checkpoint. Raises UserError where they differ."""
        config = self.config.get("model") or infer_model_config(self.state_dict(), self.path, model)
        wrong = user_errors(f"--ckpt {self.path}", "its model is not one of these", (TypeError, ValueError))
        with wrong, torch.device("meta"):
            config = DiT(**config).config
        if model is not None:
            wanted = DiT_models[model].keywords
            if any(config[name] != value for name, value in wanted.items()):
                raise UserError(
                    f"--model {model}: {self.path} holds {describe_model(config)}; leave --model out"
                )
        height, width = (side * factor for side in config["input_size"])
        if image_size is not None and not image_size == height == width:
            raise UserError(
                f"--image-size {image_size}: {self.path} is for {height}x{width}; leave --image-size out"
            )
        if num_classes is not None and num_classes != config["num_classes"]:
            raise UserError(
                f"--num-classes {num_classes}: {self.path} has {config['num_classes']};"
                " leave --num-classes out"
            )
        return config


def load(path, flag="--ckpt"):
    """Read a checkpoint into memory-mapped CPU tensors. Raises UserError, naming the flag, for anything
    else."""
    with torch_defaults():
        return _load(path, flag)


def _load(path, flag):
    if os.path.isdir(path) and os.path.exists(os.path.join(path, sharded.PLAIN)):
        return _load_shards(path, flag)
    if os.path.isdir(path) and is_diffusers(path):
        state, config = load_diffusers(path, flag)
        return Checkpoint(path, dict(ema=state, model=state, config=config), config)
    if os.path.isdir(path):
        paths = list(numbered(os.path.join(path, "checkpoints")).values())
        hint = f"; give a checkpoint of that run, as {paths[-1]}" if paths else ""
        raise UserError(f"{flag} {path}: a folder without weights{hint}")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    if str(path).endswith(".safetensors"):
        if not is_utf8(path):
            raise UserError(f"{flag} {path}: safetensors reads names in UTF-8 only; rename it")
        contents = _load_safetensors(path, flag)
    else:
        contents = _load_pickle(path, flag)
    if not isinstance(contents, dict) or not contents:
        raise UserError(f"{flag} {path}: not a checkpoint (it holds a {type(contents).__name__})")
    if _is_state_dict(contents):
        contents = dict(ema=contents, model=contents)
    states = {name: contents[name] for name in ("model", "ema") if contents.get(name) is not None}
    if not states or not all(map(_is_state_dict, states.values())):
        raise UserError(f"{flag} {path}: neither a training checkpoint nor a state dict")
    contents = {**contents, "ema": states.get("ema", states.get("model")), "model": states.get("model")}
    config = contents.get("config")
    return Checkpoint(path, contents, config if isinstance(config, dict) else {})


def _is_state_dict(value):
    return (
        isinstance(value, dict) and value and all(isinstance(part, torch.Tensor) for part in value.values())
    )


def _load_shards(path, flag):
    # What reading a damaged file raises has no common class:
    with user_errors(f"{flag} {path}", "its shards are not whole", Exception):
        contents = sharded.load_whole(path, trained_parameters)
    return Checkpoint(path, contents, contents["config"])


def trained_parameters(model_config):
    """The names of a model's trained parameters, in order."""
    with torch.device("meta"):
        return [name for name, p in DiT(**model_config).named_parameters() if p.requires_grad]


def _load_pickle(path, flag):
    try:
        # The published training script saved its options as a Namespace, which holds nothing but data:
        with torch.serialization.safe_globals([argparse.Namespace]):
            mmap = zipfile.is_zipfile(path) and is_utf8(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # what a file that is no pickle makes the unpickler raise has no common class
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{flag} {path}: refused, since loading it would execute code; save its state dict alone"
            ) from error
        raise UserError(
            f"{flag} {path}: not a checkpoint, or cut short; give a complete .pt or .safetensors file"
        ) from error


def _load_safetensors(path, flag):
    from safetensors import SafetensorError, safe_open

    errors = (SafetensorError, ValueError)
    wrong = user_errors(f"{flag} {path}", "not a safetensors file, or cut short", errors)
    with wrong, safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        config = (file.metadata() or {}).get("config")
        return dict(ema=state, model=state, config=json.loads(config)) if config else state


def infer_model_config(state, path, model=None):
    """The arguments of DiT that a state dict fits, read off its shapes; input assumed square.

    The number of heads shows in no shape: it is the registry's for this depth and width, or the model's
    named."""
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        tokens, rows = state["pos_embed"].shape[1], state["final_layer.linear.bias"].shape[0]
        mlp_width = state["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"--ckpt {path}: not the state dict of a DiT (no {error.args[0]})") from error
    except (ValueError, IndexError) as error:
        raise UserError(
            f"--ckpt {path}: not the state dict of a DiT (tensors of other dimensions)"
        ) from error
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    known = {
        (build.keywords["depth"], build.keywords["hidden_size"]): build.keywords
        for build in DiT_models.values()
    }
    heads = DiT_models[model].keywords if model else known.get((depth, hidden_size))
    if heads is None:
        raise UserError(
            f"--ckpt {path}: depth {depth}, width {hidden_size} is none of the registry's; give --model"
        )
    labels = state.get("y_embedder.embedding_table.weight")
    return dict(
        input_size=[int(tokens**0.5) * patch_size] * 2,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=heads["num_heads"],
        mlp_ratio=mlp_width / hidden_size,
        class_dropout_prob=0.1,  # the last row of the table is taken for the null label's
        num_classes=len(labels) - 1 if labels is not None else 0,
        learn_sigma=rows == 2 * in_channels * patch_size**2,
        block=_infer_block(state),
        ffn="conv" if "blocks.0.mlp.conv.weight" in state else "mlp",
        registers=state["registers.tokens"].shape[1] if "registers.tokens" in state else 0,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
    )


def _infer_block(state):
    if "blocks.0.cross_attn.q.weight" in state:
        return "cross-attention"
    if "blocks.0.adaLN_modulation.1.weight" not in state:
        return "in-context"
    rows, width = state["blocks.0.adaLN_modulation.1.weight"].shape
    return "adaln" if rows == 4 * width else "adaln-zero"


def describe_model(config):
    """A model in words: its registry name, or its sizes."""
    return registry_name(config) or (
        "a DiT of depth {depth}, width {hidden_size}, {num_heads} heads, patch {patch_size}".format(**config)
    )


def registry_name(config):
    """The name in DiT_models of a model of these sizes, or None."""
    for name, build in DiT_models.items():
        if all(config[key] == value for key, value in build.keywords.items()):
            return name
    return None


def load_weights(model, state, path, flag="--ckpt"):
    """Load a state dict strictly. Raises UserError that names the first difference."""
    own = model.state_dict()
    for key in [*own, *state]:
        if key not in state or key not in own:
            side = "lacks" if key in own else "has an unknown"
            raise UserError(f"{flag} {path}: does not fit {describe_model(model.config)}: it {side} {key}")
        if own[key].shape != state[key].shape:
            raise UserError(
                f"{flag} {path}: does not fit {describe_model(model.config)}: {key} is"
                f" {tuple(state[key].shape)} there and {tuple(own[key].shape)} here"
            )
    model.load_state_dict(state)
    return model


def build_model(config, state, path):
    """A DiT of this config with these weights, in evaluation mode; refused in one line where they do not
    fit."""
    with torch.device("meta"):  # no time lost on an initialisation that is overwritten
        model = DiT(**config).float()  # whatever default dtype the caller has set
    model.to_empty(device="cpu")
    return load_weights(model, state, path).eval()


def initialize(model, found):
    """Start a model from a checkpoint's averaged weights, for fine-tuning: all that fits is copied, but the
    label table where the class count differs, and position embeddings of another resolution.

    Returns one line on what was taken and what not. Raises UserError where no block fits.
    """
    state, own = found.state_dict("ema"), model.state_dict()
    fits = [key for key, value in own.items() if key in state and state[key].shape == value.shape]
    if not any(key.startswith("blocks.") for key in fits):
        raise UserError(f"--init-from {found.path}: no block of it fits {describe_model(model.config)}")
    # A model without storage, of --dry-run, cannot be copied to:
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict({key: state[key] for key in fits}, strict=False, assign=is_meta)
    anew, unused = [key for key in own if key not in fits], [key for key in state if key not in own]
    return (
        f"Initialised from {found.path}: {len(fits)} of {len(own)} tensors taken"
        + (f"; new: {', '.join(anew)}" if anew else "")
        + (f"; unused: {', '.join(unused)}" if unused else "")
    )


def export(found, out, weights="ema", any_classes=False):
    """Write a Checkpoint in the form that the name says: .pt for all it holds, .safetensors for the weights
    asked for and its config, else a folder for diffusers' DiTPipeline (any_classes: also where it cannot
    guide). UserError where that cannot be. Returns what differs in that form, in lines."""
    state = {name: value.contiguous() for name, value in found.state_dict(weights).items()}
    config = {**found.config, "model": found.model_config()}
    process = config.setdefault("process", dict(learn_sigma=config["model"]["learn_sigma"]))
    # Of weights that name none each command has a default of its own, which a pipeline cannot leave open:
    kept = {"vae": "mse", **config.get("autoencoder", {})}
    classes = config.get("data", {}).get("classes")
    if out.endswith(".pt"):
        if weights == "raw":
            raise UserError("--weights raw: a .pt file keeps both kinds; leave it out, or give .safetensors")
        save(out, {**found.contents, "config": config})
        return []
    with user_errors(f"--out {out}", "could not be written", OSError):
        if out.endswith(".safetensors"):
            _save_safetensors(out, state, config)
            return []
        save_diffusers(out, state, config["model"], process, kept, classes, any_classes)
        return pipeline_differences(config["model"])


def _save_safetensors(path, state, config):
    from safetensors.torch import save as serialize

    with atomic_write(path, "wb") as file:
        file.write(serialize(state, metadata=dict(config=json.dumps(config))))
