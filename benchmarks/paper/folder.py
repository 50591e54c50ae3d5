"""The folder of one comparison: a manifest of its settings, and a file for each piece of work, whole or not there.

manifest.json                          settings, libraries and hardware; other ones are refused
calibration/KIND-00000.safetensors     a profile of one calibration sample
METHOD/00000.safetensors               a video of the prompt of that number, with what it cost
METHOD/00000.json                      its distances, once they were computed
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Work = TypeVar("Work")
PATIENCE = timedelta(days=30)  # how long a rank waits for the others


class Unit(NamedTuple):
    """One video of one method."""

    video: Tensor  # (F, H, W, 3) uint8
    facts: dict[str, Any]  # prompt, seed, evaluations, seconds and where it was made


class Ranks:
    """This process among those that `torchrun` started; without it, the only one."""

    def __init__(self) -> None:
        self.number, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if self.size > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)

    @property
    def device(self) -> str:
        return f"cuda:{self.local}" if torch.cuda.is_available() else "cpu"

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """Every `size`-th piece, beginning with the one of this rank's number."""
        return work[self.number :: self.size]

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Folder:
    """Where everything of one comparison is."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = self.path / "manifest.json"

    def open(self, manifest: Mapping[str, Any], ranks: Ranks) -> None:
        """Write the manifest, or see that the one there is of the same `settings` and `libraries`.

        Raises ValueError where it is not.
        """
        if ranks.number == 0 and not self.manifest.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        ranks.wait()
        there, mine = self.read(), json.loads(json.dumps(manifest))
        for part in ("settings", "libraries"):
            known, asked = there[part], mine[part]
            other = [name for name in {**known, **asked} if known.get(name) != asked.get(name)]
            if other:
                said = "; ".join(f"{name}: {known.get(name)!r} there, {asked.get(name)!r} here" for name in other)
                raise ValueError(
                    f"{self.path} holds samples of other {part}, which do not compare with these ({said}). Take them "
                    "as there, or name another folder with --out."
                )

    def read(self) -> dict[str, Any]:
        """The manifest. Raises ValueError where there is none."""
        if not self.manifest.is_file():
            raise ValueError(f"{self.path} holds no manifest.json: `python -m benchmarks.paper.sample` writes one.")
        found: dict[str, Any] = json.loads(self.manifest.read_text(encoding="utf-8"))
        return found

    def calibration(self, kind: str, number: int) -> Path:
        return self.path / "calibration" / f"{kind}-{number:05d}.safetensors"

    def unit(self, method: str, number: int) -> Path:
        return self.path / method / f"{number:05d}.safetensors"

    def numbers(self, method: str) -> set[int]:
        """The prompts that a method has a video of."""
        return {int(file.stem) for file in (self.path / method).glob("*.safetensors")}


def save_unit(file: Path, unit: Unit) -> None:
    """Write it under another name first, so that a file of this name is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    save_file({"video": unit.video.contiguous()}, partial, {"facts": json.dumps(unit.facts)})
    os.replace(partial, file)


def load_unit(file: Path) -> Unit:
    """What `save_unit` wrote. Raises ValueError where the file is damaged."""
    try:
        with safe_open(file, "pt") as source:
            return Unit(source.get_tensor("video"), json.loads((source.metadata() or {})["facts"]))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). Remove it, and sample again.") from error


def write_text(file: Path, text: str) -> None:
    """The same for a text."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
