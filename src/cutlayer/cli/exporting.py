"""`cutlayer export`: the weights of the whole model in one file.

| code | error | meaning |
| --- | --- | --- |
| E249 | ConfigError | the file is there already and is not overwritten |
"""

from __future__ import annotations

from pathlib import Path

from cutlayer.cli.console import Output
from cutlayer.errors import ConfigError

__all__ = ["export_model"]


def export_model(run_folder: Path, path: Path, output: Output, *, force: bool) -> None:
    """Write the uncut model's weights as safetensors; `force`: over a file that is there.

    Raises:
        ConfigError: E249, there is one; and as `run.export.assemble` raises.
    """
    if path.exists() and not force:
        raise ConfigError(
            f"{path.name} is there already and is not overwritten",
            where=str(path.absolute()),
            expected="a new name",
            remedy="give another with --out, or --force to write over it",
            code="E249",
        )
    from cutlayer.run.export import export

    tensors = export(run_folder, path)
    size = path.stat().st_size
    output.document({"file": str(path), "tensors": tensors, "bytes": size})
    output.say("load it with model.load_state_dict(safetensors.torch.load_file(...), strict=True)")
    output.last(f"{path}: {tensors} tensors, {size:,} bytes")
