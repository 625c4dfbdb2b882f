"""Random weights of the Inception network, in the form of the published file: 472 tensors."""

from unittest.mock import patch

import torch


def write_random_weights(path):
    """Save weights that keep the size of activations from layer to layer, so that features differ by image."""
    import torch_fidelity.feature_extractor_inceptionv3 as library

    network = library.FeatureExtractorInceptionV3
    with (
        patch.object(library, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(network, "load_state_dict", lambda *_: None),
        torch.device("meta"),
    ):
        shapes = {k: v.shape for k, v in network("inception", ["2048"]).state_dict().items()}
    generator, state = torch.Generator().manual_seed(0), {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):  # which the published file lacks
            continue
        elif key.endswith("running_var") or key.endswith("bn.weight"):
            state[key] = 1 + 0.1 * noise.abs()
        elif len(shape) > 1:
            state[key] = noise * (2 / shape[1:].numel()) ** 0.5
        else:
            state[key] = 0.1 * noise
    assert len(state) == 472
    torch.save(state, path)
    return path
