"""What `adapter_matrix` asks of one environment about one base. It has torch, transformers and PEFT, nothing of ours.

    python -m benchmarks.compat.adapter_process FOLDER

FOLDER holds `job.json` and `batch.safetensors`, the model's inputs. The answer goes there too: `answer.json`, and as
safetensors the logits [B, T, V] of the base and of every adapter (`NAME.logits`: `own`, and `given` where the batch has
positions for those who don't work them out), and what PEFT holds once it has loaded one (`NAME.tensors`).
"""

import argparse
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

Document = dict[str, Any]


def main() -> None:
    """Loads the base, loads the adapters of the job, makes others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    transformers.utils.logging.disable_progress_bar()
    job = json.loads((folder / "job.json").read_text())
    batch = load_file(folder / "batch.safetensors")
    answer: Document = {"versions": {module.__name__: module.__version__ for module in (transformers, peft, torch)}}
    try:
        answer["base"] = {"astray": save_base(job["base"], folder, batch)}
        answer["adapters"] = {
            **{name: attempted(load, job, name, folder, batch) for name in job["load"]},
            **{name: attempted(make, job, name, folder, batch) for name in job["make"]},
        }
    except Exception as error:  # a version that can't load the base is a result, whatever it raises
        answer["base"] = {"error": in_one_line(error)}
    (folder / "answer.json").write_text(json.dumps(answer))


def save_base(directory: str, folder: Path, batch: dict[str, torch.Tensor]) -> Document:
    """The base's logits; returns the keys that found no place, by kind."""
    loader: Any = transformers.AutoModelForImageTextToText
    model, info = loader.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    save_file(logits(model.eval(), batch), folder / "base.logits")
    return {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys and kind.endswith("_keys")}


def attempted(work: Any, job: Document, name: str, folder: Path, batch: dict[str, torch.Tensor]) -> Document:
    """The answer of `work`, and PEFT's warnings; or its error."""
    base = transformers.AutoModelForImageTextToText.from_pretrained(
        job["base"], dtype=torch.float32, trust_remote_code=False
    ).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found: Document = work(base, job, name, folder, batch)
        except Exception as error:  # so is an adapter that it can't load
            found = {"error": in_one_line(error)}
    # Others speak of their own code, not of the adapter.
    spoken = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return found | {"warnings": sorted(set(spoken))}


def load(base: Any, job: Document, name: str, folder: Path, batch: dict[str, torch.Tensor]) -> Document:
    """Loads an adapter; what PEFT holds then is for the caller to compare."""
    model = peft.PeftModel.from_pretrained(base, job["load"][name]).eval()
    held = {key: value.detach().contiguous() for key, value in model.named_parameters() if "lora_" in key}
    save_file(held, folder / f"{name}.tensors")
    save_file(logits(model, batch), folder / f"{name}.logits")
    return {}


def make(base: Any, job: Document, name: str, folder: Path, batch: dict[str, torch.Tensor]) -> Document:
    """Makes an adapter with drawn weights, and saves it as PEFT does."""
    model = peft.get_peft_model(base, peft.LoraConfig(**job["make"][name]["settings"])).eval()
    generator = torch.Generator().manual_seed(job["seed"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0.0, job["deviation"], generator=generator)
    save_file(logits(model, batch), folder / f"{name}.logits")
    model.save_pretrained(job["make"][name]["directory"])
    return {}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits [B, T, V] with the model's own positions, and with those of the batch."""
    forward = (model.get_base_model() if isinstance(model, peft.PeftModel) else model).forward
    # Some versions find out which tokens are pictures from the tokens themselves.
    taken = {name for name in batch if name in inspect.signature(forward).parameters or name != "mm_token_type_ids"}
    inputs = {"own": taken - {"position_ids"}} | ({"given": taken} if "position_ids" in batch else {})
    with torch.no_grad():
        return {kind: model(**{name: batch[name] for name in names}).logits for kind, names in inputs.items()}


def in_one_line(error: Exception) -> str:
    """The error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
