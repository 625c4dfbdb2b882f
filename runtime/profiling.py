"""Where the time of a step goes."""

import re

from torch.profiler import ProfilerActivity, profile

# Kinds of work, by what the names of their kernels or operations hold; the first that fits counts:
KINDS = {
    "compiled": "^triton_",
    "attention": "flash|fmha|sdpa|attention|dot_do_o|convert_dq",
    "optimizer and EMA": "adam|multi_tensor|_foreach",
    "matrix products": "gemm|nvjet|cutlass|addmm|mkldnn_linear|::mm|::bmm|convolution|implicit|scaled_mm",
    "copies": "memcpy|memset|copy_",
    "other": "",
}


def profile_step(run, steps, device, seconds):
    """Milliseconds of a step by kind of work, a dict.

    run      does so many steps, to their end
    seconds  that a step takes without a profiler: what a GPU's kernels leave of them is "idle"
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        run()
    kinds = dict.fromkeys(KINDS, 0.0)
    for event in found.key_averages():
        kind = next(kind for kind, names in KINDS.items() if re.search(names, event.key.lower()))
        kinds[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / steps
    if on_gpu:
        kinds["idle"] = max(0.0, 1e3 * seconds - sum(kinds.values()))
    return kinds
