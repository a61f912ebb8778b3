"""predict.onnx as a torch module, so that gradients exist for any artefact, whatever network it came from.

Only for what needs gradients, such as an adversarial patch: everything else goes through ONNX Runtime. Each operator of
the exported graphs is one line below; a graph with another one is refused by its name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from model.session import open_session

LOGIT_TOLERANCE = 1e-3  # of the replay against ONNX Runtime, on pixels: a gradient needs no more
Operator = Callable[..., Any]


class Unreplayable(RuntimeError):
    pass


class Replay:
    """Tiles (N, S, S, 3), floats from 0 to 255 that may carry gradients, to logits (N, K)."""

    def __init__(self, graph: Path) -> None:
        proto = onnx.load(graph).graph
        self.nodes = list(proto.node)
        self.constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.initializer}
        unknown = sorted({node.op_type for node in self.nodes} - OPERATORS.keys())
        if unknown:
            raise Unreplayable(f"{graph.name} has operators that training/replay.py doesn't know: {', '.join(unknown)}")
        self.check(graph)

    def __call__(self, tiles: Tensor) -> Tensor:
        values: dict[str, Tensor] = self.constants | {"tiles": tiles}
        for node in self.nodes:
            inputs = [values[name] if name else None for name in node.input]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            values[node.output[0]] = OPERATORS[node.op_type](*inputs, **attributes)
            if node.output[0] == "logits":
                break
        return values["logits"]

    @torch.no_grad()
    def check(self, graph: Path) -> None:
        session = open_session(graph, threads=0)
        side = session.get_inputs()[0].shape[1]
        tiles = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
        expected = session.run(["logits"], {"tiles": tiles})[0]
        difference = np.abs(self(torch.from_numpy(tiles).float()).numpy() - expected).max()
        if not difference <= LOGIT_TOLERANCE:
            raise Unreplayable(f"replayed, {graph.name} gives logits that differ by {difference:.2g}")


def reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape.tolist())])


def cut(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    places = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), places, strides, strict=True):
        index = [slice(None)] * x.ndim
        size = x.shape[axis]
        index[axis] = slice(max(start, -size), min(end, size), step)  # the ends of 64 bits mean all there is
        x = x[tuple(index)]
    return x


def gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    axis %= x.ndim
    return x.index_select(axis, indices.reshape(-1)).reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def squeeze(x: Tensor, axes: Tensor) -> Tensor:
    return x.squeeze(tuple(axes.tolist()))


def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def pad(x: Tensor, pads: list[int], value: float) -> Tensor:
    """ONNX lists what is added before each axis, then what after; torch pairs, from the last axis on."""
    if not any(pads):
        return x
    half = len(pads) // 2
    paired = [pads[i + side * half] for i in reversed(range(half)) for side in (0, 1)]
    return F.pad(x, paired, value=value)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, pads: list[int], strides: list[int], **rest: Any
) -> Tensor:
    out: Tensor = F.conv2d(
        pad(x, pads, 0), weight, bias, tuple(strides), dilation=tuple(rest["dilations"]), groups=rest["group"]
    )
    return out


def pool(x: Tensor, *, kernel_shape: list[int], strides: list[int], pads: list[int], **rest: Any) -> Tensor:
    return F.max_pool2d(pad(x, pads, -torch.inf), kernel_shape, strides)


def pool_mean(x: Tensor, *, kernel_shape: list[int], strides: list[int], pads: list[int], **rest: Any) -> Tensor:
    assert not any(pads)
    return F.avg_pool2d(x, kernel_shape, strides)


def mean(x: Tensor, axes: Tensor, *, keepdims: int = 1, **rest: Any) -> Tensor:
    return x.mean(dim=axes.tolist(), keepdim=bool(keepdims))


def add_up(x: Tensor, axes: Tensor, *, keepdims: int = 1, **rest: Any) -> Tensor:
    return x.sum(dim=axes.tolist(), keepdim=bool(keepdims))


def normalise_layer(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float, **rest: Any) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def multiply_add(a: Tensor, b: Tensor, c: Tensor | None = None, *, transB: int = 0, **rest: Any) -> Tensor:
    product = a @ (b.T if transB else b)
    return product if c is None else product + c


def cast(x: Tensor, to: int) -> Tensor:
    """Pixels come as floats already, with their gradient; whole numbers are sizes, or places in a table."""
    if to in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
        return x.to(torch.int64)
    return x if x.is_floating_point() else x.to(torch.float32)


def shape(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end])


OPERATORS: dict[str, Operator] = {
    "Add": torch.add,
    "AveragePool": pool_mean,
    "BatchNormalization": lambda x, w, b, m, v, *, epsilon, **_: F.batch_norm(x, m, v, w, b, eps=epsilon),
    "Cast": cast,
    "Clip": torch.clamp,
    "Concat": lambda *xs, axis: torch.cat(xs, axis),
    "Conv": convolve,
    "Div": torch.div,
    "Expand": lambda x, size: x * torch.ones(size.tolist()),  # either may be the wider one
    "Floor": torch.floor,
    "Gather": gather,
    "Gelu": lambda x, approximate=b"none": F.gelu(x, approximate=approximate.decode()),
    "Gemm": multiply_add,
    "GlobalAveragePool": lambda x: x.mean(dim=(2, 3), keepdim=True),
    "Identity": lambda x: x,
    "InstanceNormalization": lambda x, w, b, *, epsilon: F.instance_norm(x, weight=w, bias=b, eps=epsilon),
    "LayerNormalization": normalise_layer,
    "MatMul": torch.matmul,
    "MaxPool": pool,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "ReduceMean": mean,
    "ReduceSum": add_up,
    "Relu": F.relu,
    "Reshape": reshape,
    "Shape": shape,
    "Sigmoid": torch.sigmoid,
    "Slice": cut,
    "Softmax": lambda x, axis=-1: x.softmax(axis),
    "Sqrt": torch.sqrt,
    "Squeeze": squeeze,
    "Sub": torch.sub,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": unsqueeze,
}
