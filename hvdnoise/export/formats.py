"""Writing a network in each form, and reading it again as another program would.

A form is read into a function: examples (b, *shape) as `Source.inputs` has them -> logits
(b, classes); and the facts beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdnoise.export.source import Source

Predict = Callable[[Tensor], Tensor]
FACTS = "hvdnoise.json"  # in a .pt2 file
_NORMALISATION = "normalization"


def write(form: str, source: Source, path: Path) -> dict[str, str]:
    """Write the network to ``path``; the facts that are in the file.

    Raises:
        Exception: whatever torch or a package raises for a network that it cannot write.
    """
    with _quiet():
        return {"torch": _write_torch, "onnx": _write_onnx,
                "safetensors": _write_safetensors}[form](source, path)


def read(form: str, path: Path, blank: Callable[[], nn.Module]) -> tuple[Predict, dict[str, str]]:
    """What is in a file: the network and the facts.

    Args:
        blank: makes a model of the run's kind, for a file that has weights alone.
    """
    with _quiet():
        if form == "torch":
            return _read_torch(path)
        return _read_onnx(path) if form == "onnx" else _read_safetensors(path, blank)


def _write_torch(source: Source, path: Path) -> dict[str, str]:
    facts = {**source.facts, _NORMALISATION: source.normalization(inside=True)}
    program = torch.export.export(source.network, (source.example,),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()  # torch ends the process where a file cannot be written to its end
    torch.export.save(program, content, extra_files={FACTS: json.dumps(facts, indent=1)})
    path.write_bytes(content.getbuffer())
    return facts


def _read_torch(path: Path) -> tuple[Predict, dict[str, str]]:
    extra: dict[str, Any] = {FACTS: ""}
    program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    return program.module(), json.loads(extra[FACTS])


def _write_onnx(source: Source, path: Path) -> dict[str, str]:
    facts = {**source.facts, _NORMALISATION: source.normalization(inside=True)}
    program = torch.onnx.export(source.network, (source.example,), dynamo=True, verbose=False,
                                dynamic_shapes=({0: torch.export.Dim("batch")},),
                                input_names=["images"], output_names=["logits"])
    assert program is not None
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)
    return facts


def _read_onnx(path: Path) -> tuple[Predict, dict[str, str]]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)
    return predict, session.get_modelmeta().custom_metadata_map


def _write_safetensors(source: Source, path: Path) -> dict[str, str]:
    from safetensors.torch import save
    facts = {"format": "pt", **source.facts,
             _NORMALISATION: source.normalization(inside=False)}
    state = source.model.state_dict()
    path.write_bytes(save({name: value.contiguous().clone() for name, value in state.items()},
                          facts))  # its own save_file makes a file that others cannot read
    return facts


def _read_safetensors(path: Path, blank: Callable[[], nn.Module]
                      ) -> tuple[Predict, dict[str, str]]:
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}
    model = blank().eval()
    model.load_state_dict(state)
    mean, std = (torch.tensor(json.loads(facts[name])) for name in ("mean", "std"))

    def predict(examples: Tensor) -> Tensor:
        if not examples.is_floating_point():
            return model(examples)
        each = -1, *[1] * (examples.ndim - 2)
        return model((examples - mean.view(each)) / std.view(each))
    return predict, facts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and the progress of the exporters, which are about themselves."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
