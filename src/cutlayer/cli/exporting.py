"""`cutlayer export`: the weights of the whole model in one file."""

from __future__ import annotations

from pathlib import Path

from cutlayer.cli.console import Output

__all__ = ["export_model"]


def export_model(run_folder: Path, path: Path, output: Output) -> None:
    """Write the uncut model's weights as safetensors. Raises as `run.export.assemble` does."""
    from cutlayer.run.export import export

    tensors = export(run_folder, path)
    size = path.stat().st_size
    output.document({"file": str(path), "tensors": tensors, "bytes": size})
    output.say("load it with model.load_state_dict(safetensors.torch.load_file(...), strict=True)")
    output.last(f"{path}: {tensors} tensors, {size:,} bytes")
