"""What a model costs: multiply-adds, activations; and the peak rates of devices."""

import os
import platform
import statistics
import time

import torch
import torch.nn as nn

from runtime.distributed import set_precision, uses_bfloat16

# Dense matrix products, FLOP/s, of the datasheets, by precision and a part of the device's name; the first
# that fits counts:
PEAK_FLOPS = {
    "H200 NVL": dict(fp8=1671e12, bf16=836e12, tf32=418e12),
    "H200": dict(fp8=1979e12, bf16=989e12, tf32=495e12),
    "H100 PCIe": dict(fp8=1513e12, bf16=756e12, tf32=378e12),
    "H100 NVL": dict(fp8=1671e12, bf16=836e12, tf32=418e12),
    "H100": dict(fp8=1979e12, bf16=989e12, tf32=495e12), "A100": dict(bf16=312e12, tf32=156e12),
}  # fmt: skip


def device_name(device):
    """The GPU's or processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def measure_matmul_flops(device, precision):
    """FLOP/s that this device reaches in one large matrix product at this precision."""
    set_precision(precision, device)
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if uses_bfloat16(precision) else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def peak_flops(device, precision):
    """The datasheet's FLOP/s of this device at this precision, or None where it is not known."""
    if device.type != "cuda":
        return None
    return datasheet_flops(torch.cuda.get_device_name(device), precision)


def datasheet_flops(name, precision):
    """The datasheet's FLOP/s of a GPU of this name, or None."""
    return next((peaks.get(precision) for part, peaks in PEAK_FLOPS.items() if part in name), None)


def count_macs(model):
    """Multiply-adds of one forward pass of one input: what the paper's tables call Gflops (in units of 1e9).

    Counted from the operations that run, on a copy without storage. FLOPs are twice this.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        clone = type(model)(**model.config).eval()
        clone(*_one_input(clone))
    return counter.get_total_flops() // 2


def count_activation_bytes(model):
    """Bytes that autograd keeps for the backward pass of one float32 input, weights aside.

    Measured on a copy without storage, with the fused attention of the CPU.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        clone = type(model)(**model.config).eval()
        weights = {weight.untyped_storage()._cdata for weight in clone.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = clone(*_one_input(clone))
        del out
    return sum(size for storage, size in kept.items() if storage not in weights)


def _one_input(model):
    label = model.y_embedder.from_labels(torch.zeros(1, dtype=torch.long)) if model.num_classes else None
    return torch.zeros(1, model.in_channels, *model.input_size), torch.zeros(1), label
