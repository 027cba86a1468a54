"""ONNX: the network's own graph, with the operations, the layout and the names that ONNX Runtime is fast with."""

import json
from pathlib import Path
from typing import Any

from xception_flax.export.graph import Graph
from xception_flax.export.options import Options
from xception_flax.export.program import Program

OPSET = 17  # ONNX Runtime has it since 1.12
IR_VERSION = 8  # the oldest with that opset

RUNNER = """\
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = numpy.load(sys.argv[2])
parts = [images[i : i + 8] for i in range(0, len(images), 8)]
numpy.save(sys.argv[3], numpy.concatenate([session.run(None, {"images": part})[0] for part in parts]))
"""


def write(program: Program, path: Path, metadata: dict[str, Any], options: Options) -> None:
    """Writes the program for any number of images; the metadata are the file's `metadata_props`, values in JSON.

    Raises:
      UserError: the network has an operation that is not written yet.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = Graph(program)
    height, width, channels = program.image_shape
    size = ("height", "width") if options.any_size else (height, width)
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *size, channels])
    outputs = helper.make_tensor_value_info(program.outputs, TensorProto.FLOAT, ["batch", program.size])
    made = helper.make_graph(graph.nodes, metadata["model"]["name"], [images], [outputs], graph.initializers)
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="xception_flax",
        producer_version=metadata["versions"]["xception_flax"],
    )
    set_metadata(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def describe(path: Path, metadata: dict[str, Any]) -> None:
    """Gives a file other metadata."""
    import onnx

    model = onnx.load(path)
    set_metadata(model, metadata)
    onnx.save(model, path)


def set_metadata(model: Any, metadata: dict[str, Any]) -> None:
    """Makes the metadata the `metadata_props` of an `onnx.ModelProto`, in place of those that it has."""
    from onnx import helper

    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
