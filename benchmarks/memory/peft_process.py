"""One PEFT process as light as a user's can be, for `lanes_beside_processes`.

It imports no JAX. It trains a few steps, prints a line, and waits with everything in memory until its stdin is closed.

    python -m benchmarks.memory.peft_process FOLDER

FOLDER holds `adapter/` in PEFT's format, `batch.pt` (inputs of the model and labels) and `base.txt`, the checkpoint's
path.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlavaOnevisionForConditionalGeneration

STEPS = 4


def main() -> None:
    """Trains a few steps; prints a line then, and keeps everything until its stdin is closed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    base = (folder / "base.txt").read_text()
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    model.eval().requires_grad_(False)
    adapted = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).eval()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], fused=True)
    batch = torch.load(folder / "batch.pt", weights_only=True)
    for _ in range(STEPS):
        adapted(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("trained", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
