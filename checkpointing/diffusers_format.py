"""The same weights in diffusers' form: a DiTPipeline folder, read and written.

diffusers computes its timestep features with frequencies 10000^(-i/127) where DiT has 10000^(-i/128), one
part in 127 of the exponent, and offers no option for it. So the same weights give slightly other pictures
there: a model of the digits (50 steps of DDIM, guidance 2) gives pixels that differ by 1.8 of 255 on average,
by more than 8 in one of twenty, by 33 at most.

Its pipeline guides all channels of the latents, where the published code, and sample.py, guide the first
three of four. Its null label is 1000, whatever the model: one of other than 1000 classes cannot be guided
there. And it knows the scale of a VAE's latents, but no shift, nor statistics of the channels.
"""

import json
import os

import torch

from models import DiT
from runtime.autoencoder import channel_statistics, load_autoencoder
from runtime.class_names import class_names
from runtime.cli import UserError, user_errors

# What DiTTransformer2DModel must be told, or must say, to be the network of the paper:
FIXED = dict(norm_type="ada_norm_zero", activation_fn="gelu-approximate", attention_bias=True)
# Of every block and of the whole: ours, theirs. The two of diffusers' embedders are in every block again.
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
WHOLE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
SCHEDULES = ("linear", "squaredcos_cap_v2")
# What diffusers' pipeline takes for the null label, of any model:
PIPELINE_NULL_LABEL = 1000


def is_diffusers(folder):
    """Whether a folder is a pipeline, or a model, that diffusers saved."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("model_index.json", "config.json"))


def to_diffusers(state, depth):
    """A DiT's state dict under the names of DiTTransformer2DModel; tensors are shared where they can be."""
    out = {}
    for kind in ("weight", "bias"):
        out.update({f"{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in WHOLE.items()})
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            out.update({f"{theirs}.{b}.{kind}": state[f"{ours}.{a}.{kind}"] for a, b in BLOCK.items()})
            parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            out.update({f"{theirs}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts)})
    for i in range(depth):
        for ours, theirs in EMBEDDERS.items():
            # Copies, since files of safetensors share nothing:
            out[f"transformer_blocks.{i}.norm1.emb.{theirs}"] = state[ours].clone()
    return out


def from_diffusers(state, depth, pos_embed):
    """The other way, bitwise. Raises ValueError where the blocks' copies of the embedders differ."""
    out = dict(pos_embed=pos_embed)
    for kind in ("weight", "bias"):
        out.update({f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in WHOLE.items()})
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            out.update({f"{ours}.{a}.{kind}": state[f"{theirs}.{b}.{kind}"] for a, b in BLOCK.items()})
            parts = [state[f"{theirs}.attn1.to_{name}.{kind}"] for name in "qkv"]
            out[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
    for ours, theirs in EMBEDDERS.items():
        out[ours] = state[f"transformer_blocks.0.norm1.emb.{theirs}"]
        for i in range(1, depth):
            if not torch.equal(state[f"transformer_blocks.{i}.norm1.emb.{theirs}"], out[ours]):
                raise ValueError(f"block {i} has an embedder of its own ({theirs}), which no DiT has")
    return out


def load_diffusers(folder, flag="--ckpt"):
    """(state dict, config) of a pipeline's or a transformer's folder, as checkpoint.py keeps them.

    Raises UserError, naming the flag, for another kind of model."""
    from diffusers import DiTTransformer2DModel

    index = _read_json(os.path.join(folder, "model_index.json"))
    part = os.path.join(folder, "transformer") if index else folder
    found = _read_json(os.path.join(part, "config.json"))
    wrong = [name for name, value in FIXED.items() if found.get(name, value) != value]
    if wrong or "num_embeds_ada_norm" not in found:
        raise UserError(f"{flag} {folder}: not a DiT that diffusers saved ({wrong or 'no labels'})")
    with user_errors(
        f"{flag} {folder}",
        "its weights cannot be loaded",
        (OSError, ValueError, RuntimeError, KeyError, TypeError),
    ):
        peer = DiTTransformer2DModel.from_pretrained(part)
    c = peer.config
    model_config = dict(
        input_size=c.sample_size, patch_size=c.patch_size, in_channels=c.in_channels,
        hidden_size=c.num_attention_heads * c.attention_head_dim, depth=c.num_layers,
        num_heads=c.num_attention_heads, num_classes=c.num_embeds_ada_norm,
        learn_sigma=(c.out_channels or c.in_channels) == 2 * c.in_channels,
    )  # fmt: skip
    with user_errors(f"{flag} {folder}"):
        small = DiT(**{**model_config, "depth": 1})  # for its position embedding
        state = from_diffusers(peer.state_dict(), c.num_layers, small.pos_embed.detach())
        config = dict(
            model={**small.config, "depth": c.num_layers},
            process=_process(_read_json(os.path.join(folder, "scheduler", "scheduler_config.json")), small),
        )
    if index:
        config["autoencoder"] = dict(vae=os.path.abspath(os.path.join(folder, "vae")))
        names = index.get("id2label") or {}
        with user_errors(f"{flag} {folder}: id2label"):
            config["data"] = dict(classes=[names[key] for key in sorted(names, key=int)])
    return state, config


def _process(scheduler, model):
    """The process of a scheduler's config, for a model; ValueError for one that is not here."""
    schedule = scheduler.get("beta_schedule", "linear")
    ends = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    if schedule not in SCHEDULES or (schedule == "linear" and ends != (1e-4, 0.02)):
        raise ValueError(f"its noise schedule is {schedule} {ends}; only {' and '.join(SCHEDULES)} are known")
    if schedule == "linear" and scheduler.get("num_train_timesteps", 1000) != 1000:
        raise ValueError("a linear noise schedule of other than 1000 steps is another one here")
    for name in ("trained_betas", "rescale_betas_zero_snr"):
        if scheduler.get(name):
            raise ValueError(f"its scheduler has {name}, which is not known here")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "sample"):
        raise ValueError(f"it predicts {prediction}; only epsilon and sample are known")
    is_small = not model.learn_sigma and scheduler.get("variance_type", "").startswith("fixed_small")
    return dict(
        objective="diffusion", noise_schedule=schedule, predict_xstart=prediction == "sample",
        learn_sigma=model.learn_sigma, sigma_small=is_small,
        diffusion_steps=scheduler.get("num_train_timesteps", 1000),
    )  # fmt: skip


def _read_json(path):
    if not os.path.isfile(path):
        return {}
    with open(path) as file, user_errors(path, "is damaged; fetch or save the folder again"):
        return json.load(file)


def save_diffusers(folder, state, model_config, process_config, kept, classes=None, any_classes=False):
    """Write a DiTPipeline folder: transformer, VAE, a DDIM scheduler and the names of the classes.

    kept          a checkpoint's config of its autoencoder; diffusers' pipeline has no pixels
    any_classes   also of a model of other than 1000 classes, which cannot be guided there
    Raises UserError for a model that the pipeline cannot hold.
    """
    import diffusers
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    check_exportable(model_config, process_config, kept, any_classes)
    vae = kept["vae"]
    autoencoder = load_autoencoder(vae, torch.device("cpu"))
    if not hasattr(diffusers, type(autoencoder.model).__name__):
        raise UserError(
            f"--out: diffusers has no {type(autoencoder.model).__name__}, the class of {vae}; give --out"
            " FILE.safetensors"
        )
    if autoencoder.shift:
        raise UserError(
            f"--out: diffusers' DiTPipeline ignores the shift of a VAE's latents, {autoencoder.shift:g} for"
            f" {vae}, and would decode others; give --out FILE.safetensors"
        )
    heads, channels = model_config["num_heads"], model_config["in_channels"]
    peer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=model_config["hidden_size"] // heads,
        in_channels=channels, out_channels=channels * (2 if model_config["learn_sigma"] else 1),
        num_layers=model_config["depth"], sample_size=model_config["input_size"][0],
        patch_size=model_config["patch_size"], num_embeds_ada_norm=model_config["num_classes"],
        norm_eps=1e-6,
    )  # fmt: skip
    peer.load_state_dict(to_diffusers(state, model_config["depth"]), strict=False, assign=True)
    scheduler = DDIMScheduler(
        num_train_timesteps=process_config.get("diffusion_steps", 1000), beta_start=1e-4, beta_end=0.02,
        beta_schedule=process_config.get("noise_schedule", "linear"), clip_sample=False,
        prediction_type="sample" if process_config.get("predict_xstart") else "epsilon",
    )  # fmt: skip
    DiTPipeline(peer, autoencoder.model, scheduler).save_pretrained(folder)
    path = os.path.join(folder, "model_index.json")
    index = _read_json(path)
    names = class_names(model_config["num_classes"], classes)
    index["id2label"] = {str(label): name for label, name in enumerate(names)}
    with open(path, "w") as file:
        json.dump(index, file, indent=2)


def pipeline_differences(model_config):
    """What a model's samples in diffusers' DiTPipeline differ by from those of sample.py, a line each."""
    lines = [
        "its timesteps have frequencies 10000^(-i/127), DiT's 10000^(-i/128): pixels differ by 2 of 255 or so"
    ]
    if model_config["in_channels"] == 4:
        lines.append("it guides all 4 channels of the latents; so does sample.py with --cfg-channels all")
    if model_config["num_classes"] != PIPELINE_NULL_LABEL:
        lines.append(
            f"its null label is {PIPELINE_NULL_LABEL}, this model's {model_config['num_classes']}: give it"
            " guidance_scale=1, since it cannot guide"
        )
    return lines


def check_exportable(model_config, process_config, kept, any_classes=False):
    """Raise UserError for a model that diffusers' pipeline cannot hold."""
    height, width = model_config["input_size"]
    reasons = {
        "pixel models": kept["vae"] == "none",
        "latents normalised by channel": bool(channel_statistics(kept)),
        "rectangular models": height != width,
        "unconditional models": not model_config["num_classes"],
        "conditions other than classes": model_config.get("condition", "class") != "class",
        "models trained without label dropout": model_config["class_dropout_prob"] == 0,
        "models of another mlp_ratio than 4": model_config["mlp_ratio"] != 4,
        f"{model_config['block']} blocks": model_config["block"] != "adaln-zero",
        f"{model_config['ffn']} FFN": model_config["ffn"] != "mlp",
        "learned position embedding": model_config["pos_embed"] != "sincos",
        "registers": model_config["registers"] > 0,
        "QK-norm": model_config["qk_norm"],
        "linear schedule of other than 1000 steps": process_config.get("noise_schedule", "linear") == "linear"
        and process_config.get("diffusion_steps", 1000) != 1000,
        "this noise schedule": process_config.get("noise_schedule", "linear") not in SCHEDULES,
        "this objective": process_config.get("objective", "diffusion") != "diffusion",
    }
    for what, holds in reasons.items():
        if holds:
            raise UserError(f"--out: diffusers' DiTPipeline has no {what}; give --out FILE.safetensors")
    classes = model_config["num_classes"]
    if classes != PIPELINE_NULL_LABEL and not any_classes:
        raise UserError(
            f"--out: diffusers' DiTPipeline, whose null label is {PIPELINE_NULL_LABEL}, cannot guide a"
            f" model of {classes} classes; give --any-classes to export it for guidance_scale=1, or give"
            " --out FILE.safetensors"
        )
