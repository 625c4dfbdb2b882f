"""Samplers, steps and guidance on the quick start's digits: the tables of docs/sampling.md.

    python experiments/samplers.py                                # about 15 minutes on two CPU cores
    python experiments/samplers.py --only guidance --max-steps 200 --per-class 5

"guidance": what sampler, steps and guidance do to the distance to real digits, to legibility and to time.
"steps": every sampler with 10, 25 and 50 steps, on a model of each noise schedule and a flow."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.digits import Judge, add_output_arguments, train, write
from runtime.cli import Parser, launch
from sampler import Sampler

# Sampler, steps and guidance interval; the latter costs less than twice the time of no guidance.
GUIDED = [
    ("ddpm", 250, None), ("ddim", 50, None), ("ddim", 20, None), ("ddim", 5, None), ("dpm++", 20, None),
    ("dpm++", 20, (0.38, 3.22)), ("dpm++", 10, None), ("euler", 20, None), ("heun", 10, None),
]  # fmt: skip
SCALES = (1.0, 1.5, 2.0, 4.0)
# Options of the training whose model every sampler is tried on:
MODELS = {"cosine": [], "linear": ["--noise-schedule", "linear"], "flow": ["--objective", "flow"]}
STEPS = (10, 25, 50)


def main(args):
    """Train what is asked for, sample it, write the tables."""
    judge, paths = Judge(), {}

    def trained(name):
        if name not in paths:
            print(f"Training the quick start: {name}", flush=True)
            options = [*MODELS[name], "--max-steps", args.max_steps, "--sample-every", 0]
            paths[name] = train(os.path.join(args.out, name), *options)[2]
        return Sampler.from_checkpoint(paths[name])

    reference = f"500 real digits to the others: {judge.real_distance():.2f}"
    if "guidance" in args.only:
        rows = compare_guidance(trained("cosine"), judge, args.per_class)
        write(args.out, "guidance", f"{guidance_table(rows)}\n\n{reference}", rows)
    if "steps" in args.only:
        rows = [
            dict(row, model=name)
            for name in MODELS
            for row in compare_steps(trained(name), judge, args.per_class)
        ]
        write(args.out, "steps", f"{steps_table(rows)}\n\n{reference}", rows)


def compare_guidance(sampler, judge, per_class=50):
    """A dict of the settings, and of distance, read and seconds, for each cell of the table."""
    sampler.sample(10, steps=2)  # warm up
    rows = []
    for name, steps, interval in GUIDED:
        for scale in SCALES if interval is None else SCALES[1:]:  # without guidance there is no interval
            setting = dict(sampler=name, steps=steps, cfg_interval=interval, cfg_scale=scale)
            rows.append({**setting, **judge.measure(sampler, per_class, **setting)})
            print(rows[-1], flush=True)
    return rows


def guidance_table(rows):
    """The table in markdown, the closest at 1.5 first."""
    lines = {}
    for row in rows:
        lines.setdefault((row["sampler"], row["steps"], row["cfg_interval"]), {})[row["cfg_scale"]] = row
    table = [
        f"| sampler, steps | guidance {' | '.join(map(str, SCALES))} | seconds at 1.5 |",
        f"|---|{'---:|' * (len(SCALES) + 1)}",
    ]
    for (name, steps, interval), cells in sorted(lines.items(), key=lambda line: line[1][1.5]["distance"]):
        shown = [
            f"{cells[scale]['distance']:.2f}, {100 * cells[scale]['read']:.1f} %" if scale in cells else ""
            for scale in SCALES
        ]
        where = ", guided in an interval" if interval else ""
        table.append(f"| `{name}`, {steps}{where} | {' | '.join(shown)} | {cells[1.5]['seconds']:.1f} |")
    return "\n".join(table)


def compare_steps(sampler, judge, per_class=50):
    """The same, without guidance, for every sampler of the model's process."""
    rows = []
    for name in sampler.process.samplers:
        for steps in STEPS:
            setting = dict(sampler=name, steps=steps, cfg_scale=1.0)
            rows.append({**setting, **judge.measure(sampler, per_class, **setting)})
            print(rows[-1], flush=True)
    return rows


def steps_table(rows):
    """The table in markdown: a line a model and sampler."""
    table = [f"| model | sampler | {' | '.join(map(str, STEPS))} steps |", f"|---|---|{'---:|' * len(STEPS)}"]
    for model, name in dict.fromkeys((row["model"], row["sampler"]) for row in rows):
        cells = [row for row in rows if (row["model"], row["sampler"]) == (model, name)]
        shown = [f"{row['distance']:.2f}, {100 * row['read']:.1f} %" for row in cells]
        table.append(f"| {model} | `{name}` | {' | '.join(shown)} |")
    return "\n".join(table)


def build_parser():
    """The command-line options."""
    parser = Parser(description=__doc__)
    add_output_arguments(parser, ("guidance", "steps"), per_class=50)
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
