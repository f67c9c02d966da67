"""A network as a folder that needs torch and safetensors alone: its source, written from its trace, and its weights.

`network.py` holds a class whose `__init__` makes the layers and whose `forward` is what the traced network did, and a
function `network()` that fills it from `model.safetensors` beside it. Nothing of the code that made the network is
needed, or run, to load it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from trimtab.core.errors import UserError
from trimtab.core.journal import write_atomic
from trimtab.formats.checkpoint import write_safetensors

HEAD = '''"""{title}

    from network import network
    model = network()

Needs torch and safetensors.
"""

import math
from math import inf, nan
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import device, nn


class Network(nn.Module):
    """{title}"""
{facts}
    def __init__(self):
        super().__init__()
{layers}

{forward}

def network():
    """The network with its weights, for inference."""
    model = Network()
    model.load_state_dict(load_file(Path(__file__).parent / "model.safetensors"))
    return model.eval()
'''


def write_network(module: nn.Module, folder: Path, title: str) -> int:
    """Write a network's source and weights into a folder that is there; bytes of its tensors.

    Raises:
        UserError: the forward hangs on values, or has a layer that its text does not make again.
    """
    try:
        traced = fx.symbolic_trace(module)
    except Exception as error:  # the network is the user's own
        raise UserError(
            f"the network's forward cannot be written as source, since it hangs on values "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); let its Python depend on choices alone"
        ) from error
    layers: list[str] = []
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for node in traced.graph.nodes:
        if node.op not in ("call_module", "get_attr") or node.target in names:
            continue
        name = names[node.target] = re.sub(r"\W", "_", f"l_{node.target}" if node.target[0].isdigit() else node.target)
        if node.op == "call_module":
            layer = traced.get_submodule(node.target)
            layers.append(f"        self.{name} = {_layer(layer, node.target)}")
            tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        else:
            value = _attribute(traced, node.target)
            layers.append(
                f"        self.{name} = {_made(value)}" if isinstance(value, nn.Parameter) else _kept(name, value)
            )
            tensors[name] = value
    for node in traced.graph.nodes:
        node.type = None
        if node.op in ("call_module", "get_attr"):
            node.target = names[node.target]
    forward = traced.graph.python_code("self").src
    body = "\n".join(f"    {line}" if line.strip() else "" for line in forward.strip().splitlines())
    height = getattr(module, "_resolution", None)
    facts = f"\n    resolution = {height}  # height of the images that it was chosen for\n" if height else ""
    text = HEAD.format(title=title, facts=facts, layers="\n".join(layers) or "        pass", forward=body + "\n")
    write_atomic(folder / "network.py", lambda p: p.write_text(text, "utf-8"))
    stored = {key: value.detach().contiguous() for key, value in tensors.items()}
    write_safetensors(stored.items(), folder / "model.safetensors")
    return sum(t.numel() * t.element_size() for t in stored.values())


def _layer(layer: nn.Module, path: str) -> str:
    """The call that makes a layer of torch again."""
    for text in _calls(layer) if type(layer).__module__.startswith("torch.nn.") else ():
        try:
            again = _evaluated(text)
        except Exception:  # its text is for readers alone
            continue
        if _state(again) == _state(layer):
            return text
    raise UserError(
        f"{path} is a {type(layer).__name__}, which its text does not make again; use plain layers of torch"
    )


def _calls(layer: nn.Module) -> Iterator[str]:
    """Calls that may make a layer: its own text, and all of its arguments, of which its text leaves some out."""
    if "\n" not in repr(layer):
        yield f"nn.{layer!r}"
    values = {name: getattr(layer, name, ...) for name in inspect.signature(type(layer)).parameters}
    told = ", ".join(f"{n}={v!r}" for n, v in values.items() if isinstance(v, int | float | str | tuple | None))
    yield f"nn.{type(layer).__name__}({told})"


def _evaluated(text: str) -> nn.Module:
    """A layer from its text, which torch itself wrote: a name of `torch.nn` and literal arguments."""
    import ast

    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    with torch.device("meta"):
        return getattr(nn, call.func.attr)(
            *(ast.literal_eval(a) for a in call.args),
            **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords},
        )


def _state(layer: nn.Module) -> dict[str, Any]:
    plain = {k: v for k, v in vars(layer).items() if not k.startswith("_") and k != "training"}
    return {k: str(v) for k, v in plain.items()} | {k: tuple(v.shape) for k, v in layer.state_dict().items()}


def _attribute(module: nn.Module, target: str) -> Tensor:
    holder, _, name = target.rpartition(".")
    return getattr(module.get_submodule(holder), name)


def _made(value: Tensor) -> str:
    return f"nn.Parameter(torch.empty({list(value.shape)}, dtype={value.dtype}))"


def _kept(name: str, value: Tensor) -> str:
    return f'        self.register_buffer("{name}", torch.empty({list(value.shape)}, dtype={value.dtype}))'
