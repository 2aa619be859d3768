"""Write the subsampled training curves of the emoji model as a result for the documentation.

    python train/emoji/log_summary.py --vae runs/emoji/vae/log.jsonl \\
        --model runs/emoji/model/log.jsonl runs/emoji/mixed/log.jsonl runs/emoji/final/log.jsonl
    python train/emoji/log_summary.py --second runs/emoji/second/log.jsonl    # the other curves stay as they are
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffuse_jax.writing import path_text

ABOUT = (
    "Means over the last steps before each point, on training images. `loss` is the minimised loss (autoencoder:"
    " pixels + edges + 0.0001 KL; UNet: the error weighted by Min-SNR, in the second training `mse`), `mse` the"
    " plain squared error (of pixels in [-1, 1], and of the velocity). One training step has 16 crops of 32x32 and 64"
    " images, respectively."
)


PARTS = {
    "vae": ("autoencoder", "log.jsonl of train/vae.py"),
    "model": ("UNet", "log.jsonl of each run of train/text_to_image.py, in order"),
    "second": ("UNet, second training", "the same for the training that began from the result of the first"),
}
"""Flag -> the curve that it is, and what to give."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (_, about) in PARTS.items():
        parser.add_argument(f"--{name}", type=path_text, nargs="+", help=about)
    parser.add_argument("--output", type=path_text, default="docs/results/emoji_training.json", help="file to write")
    args = parser.parse_args()
    output = Path(args.output)
    before = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.exists() else []
    rows: list[dict[str, object]] = []
    for name, (part, _) in PARTS.items():
        logs = getattr(args, name)
        kept = [row for row in before if row["part"] == part]
        rows += curve(part, logs, 8 if name == "vae" else 16) if logs else kept
    result = {
        "title": "Training of the shipped model",
        "about": ABOUT,
        "machine": {"device": "2 CPU cores"},
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def curve(part: str, logs: list[str], points: int) -> list[dict[str, object]]:
    """About ``points`` evenly spaced records; where a resumed run repeated a step, the later one counts."""
    lines = [line for log in logs for line in Path(log).read_text(encoding="utf-8").splitlines()]
    records = {r["step"]: r for r in map(json.loads, lines)}
    last = max(records)
    steps = [min(records, key=lambda s: abs(s - last * i / points)) for i in range(1, points + 1)]
    names = ("loss", "mse", "learning_rate")
    return [{"part": part, "step": s} | {name: records[s][name] for name in names} for s in steps]


if __name__ == "__main__":
    main()
