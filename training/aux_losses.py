"""Auxiliary losses on an inner layer, added to the process's own: --aux-loss, --aux-weight, --aux-layer.

A row is a function aux_loss(features, batch) -> (N,), or a class of modules (hidden_size) -> module with that
call, whose weights are then trained too, as a projection head's.

features  a block's output at the patches, float32 (N, T, hidden_size)
batch     a dict of the rows: images (N, …), float32 in [-1, 1], or what a cache of latents holds; labels
          (N,), x_start and noise (N, C, H, W), t (N,)

The loss of a row must not depend on the other rows, which are split among processes and parts in many ways.

    def small_features(features, batch):
        return features.square().mean(dim=(1, 2))

    AUX_LOSSES["small-features"] = small_features
"""

from torch import nn

from models import disable_autocast

AUX_LOSSES = {}


class ModelWithAuxLoss(nn.Module):
    """A DiT and an auxiliary loss on the output of its block number `layer` (from 1), in one module, so that
    DDP and FSDP exchange the gradients of both."""

    def __init__(self, model, name, layer):
        super().__init__()
        row = AUX_LOSSES[name]
        self.model, self.layer = model, layer
        self.aux_loss = row(model.config["hidden_size"]) if isinstance(row, type) else row

    def forward(self, x, t, batch, **model_kwargs):
        """(the model's output, the loss of every row (N,))."""
        output, features = self.model(x, t, features_of=self.layer, **model_kwargs)
        with disable_autocast(x):
            return output, self.aux_loss(features.float(), batch)

    @property
    def head(self):
        """The module with weights of its own, or None."""
        return self.aux_loss if isinstance(self.aux_loss, nn.Module) else None


class RecordAuxLoss:
    """The network as a process calls it, which keeps the auxiliary loss of the last call as `loss` (N,)."""

    def __init__(self, network, batch):
        self.network, self.batch, self.loss = network, batch, None

    def __call__(self, x, t, **model_kwargs):
        output, self.loss = self.network(x, t, self.batch, **model_kwargs)
        return output
