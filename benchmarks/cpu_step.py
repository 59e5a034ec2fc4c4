"""A training step of the demo's size on a CPU: plain against fused attention.

    python -m benchmarks.cpu_step [--rounds 5] [--threads 2]

Each setting runs in a process of its own, in turn; in each round the losses of
both are compared, and the run is refused where they differ by more than bfloat16 rounding.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

SETTINGS = ("fused", "plain")


def steps(setting: str, threads: int, count: int) -> None:
    """Run a warm-up step and `count` timed ones; print the loss of the first and the median seconds as JSON."""
    import torch

    from mmpretrain import ContrastiveLoss, ImageEncoder, MultimodalModel, Padded, TextEncoder
    from mmpretrain.training.cpu import use_plain_attention

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    image = ImageEncoder("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "depth": 4, "num_heads": 3})
    model = MultimodalModel(192, {"image": image, "text": TextEncoder(49408, 77, 192, 3, 3, 49407)})
    if setting != "fused":
        use_plain_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 49406, (256, 16))
    ids[:, -1] = 49407
    batch = {"image": Padded(torch.randint(0, 256, (256, 3, 64, 64), dtype=torch.uint8)), "text": Padded(ids)}
    seconds, losses = [], []
    for _ in range(count + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = ContrastiveLoss()(model(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    print(json.dumps({"loss": losses[0], "seconds": statistics.median(seconds[1:]), "torch": torch.__version__}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return steps(arguments.run, arguments.threads, 5)
    found: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    version = ""
    for _ in range(arguments.rounds):
        losses = {}
        for setting in SETTINGS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.cpu_step",
                "--run",
                setting,
                "--threads",
                str(arguments.threads),
            ]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found[setting].append(result["seconds"])
            losses[setting], version = result["loss"], result["torch"]
        if max(losses.values()) - min(losses.values()) > 0.02:
            raise SystemExit(f"the settings do not compute the same: {losses}")
    print(f"torch {version}, {platform.machine()}, {arguments.threads} threads, {arguments.rounds} rounds, batch 256")
    base = statistics.median(found["fused"])
    for setting, seconds in found.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"{setting:13} {median:.3f} s a step ({spread}), {base / median:.2f} times as fast as fused")
    return None


if __name__ == "__main__":
    main()
