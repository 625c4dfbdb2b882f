"""What the options of the network and the objective do to the quick start: the table of
docs/design-space.md.

    python experiments/variants.py                                # about an hour on two CPU cores
    python experiments/variants.py --only adaln flow --seeds 1 --max-steps 200 --per-class 10"""

import json
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.digits import Judge, add_output_arguments, train, write
from runtime.cli import Parser, int_at_least, launch
from sampler import Sampler

# What is added to the quick start's command:
VARIANTS = {
    "adaln-zero": [],
    "adaln": ["--block", "adaln"],
    "in-context": ["--block", "in-context"],
    "cross-attention": ["--block", "cross-attention"],
    "registers": ["--registers", "4"],
    "conv": ["--ffn", "conv"],
    "learned": ["--pos-embed", "learned"],
    "flow": ["--objective", "flow"],
    "flow-logit-normal": ["--objective", "flow", "--timestep-sampler", "logit-normal"],
}


def main(args):
    """Train each variant with every seed, sample it, write the table."""
    judge, rows = Judge(), []
    for seed in range(args.seeds):
        for name in args.only:  # they take turns, so that a slow hour of the machine meets all of them
            folder = os.path.join(args.out, f"{name}-{seed}")
            rows.append(measure(folder, judge, name, seed, args.per_class, "--max-steps", args.max_steps))
            print(rows[-1], flush=True)
    write(args.out, "variants", table(rows), rows)


def measure(folder, judge, name, seed=0, per_class=100, *options):
    """Train a variant in a folder and sample it: a dict of name, seed, parameters, the seconds of the run and
    of a step (the log's median), and the shares read as asked without guidance and with that of 2."""
    _, seconds, path = train(folder, *VARIANTS[name], *options, seed=seed)
    sampler = Sampler.from_checkpoint(path)
    with open(os.path.join(os.path.dirname(path), "..", "metrics.jsonl")) as file:
        speeds = [json.loads(line)["steps_per_sec"] for line in file]
    return dict(
        name=name, seed=seed, seconds=seconds, step_seconds=1 / statistics.median(speeds),
        parameters=sum(p.numel() for p in sampler.model.parameters() if p.requires_grad),
        read=judge.measure(sampler, per_class, cfg_scale=1.0)["read"],
        read_guided=judge.measure(sampler, per_class, cfg_scale=2.0)["read"],
    )  # fmt: skip


def table(rows):
    """The table in markdown; times as multiples of the first variant's with the same seed."""
    lines = [
        "| `python train.py --preset digits` and | read as asked | guided by 2 | parameters | time a step |",
        "|---|---:|---:|---:|---:|",
    ]
    first = {row["seed"]: row["step_seconds"] for row in rows if row["name"] == rows[0]["name"]}
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        time = statistics.median(row["step_seconds"] / first[row["seed"]] for row in mine)
        option = f"`{' '.join(VARIANTS[name])}`" if VARIANTS[name] else "nothing else"
        shown = " | ".join(spread([row[column] for row in mine]) for column in ("read", "read_guided"))
        lines.append(f"| {option} | {shown} | {mine[0]['parameters']:,} | {time:.2f} |")
    return "\n".join(lines)


def spread(shares):
    """The mean, and the lowest and the highest, of shares."""
    mean, low, high = (100 * share for share in (statistics.mean(shares), min(shares), max(shares)))
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def build_parser():
    """The command-line options."""
    parser = Parser(description=__doc__)
    add_output_arguments(parser, VARIANTS, per_class=100)
    parser.add_argument("--seeds", type=int_at_least(1), default=3, metavar="N",
                        help="trainings of each variant (default: 3)")  # fmt: skip
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
