"""`ModelAdapters`: LoRA adapters over one loaded model, each row of a batch through its own or through none.

peft computes the low-rank updates of a mixed batch (`adapter_names`). The rows of single tokens that an adapter trained are put
in here, for peft takes them of one adapter at a time. Invariants: a row without an adapter gets what the model gives without
any; an adapter that does not fit changes nothing; once the last has gone, the model is as it was. It ignores requests.

R = rows, one an answer; T = tokens; D = hidden size; V = vocabulary; K = tokens whose rows an adapter has trained.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from chaccu.engine.adapter_source import AdapterSource
from chaccu.errors import EngineError, MissingDependencyError

_PREFIX = "base_model.model."
_LOW, _HIGH, _ROWS = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"
# What one adapter of a batch would do to the rows of the others, or cannot do for its own alone.
_ODD = ("use_dora", "modules_to_save", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora")
_BASE = "__base__"  # peft's name for no adapter


class ModelAdapters:
    """The adapters of `model`. Everything is called by the thread that owns the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: Any = None
        self._enabled = True
        # peft's own name for each: it must not hold a dot.
        self._keys: dict[str, str] = {}
        self._numbers = itertools.count()
        self._token_rows: dict[str, _TokenRows] = {}
        # Which rows of the batch under way have which adapter.
        self._places: dict[str, list[int]] = {}
        self._hooks: list[Any] = []

    def load(self, adapter: AdapterSource) -> None:
        """Raises `EngineError` when the adapter is of another model, or of a kind that a batch cannot have beside others."""
        if adapter.peft is None:
            raise EngineError(
                f"{adapter.folder} holds no adapter_config.json with adapter_model.safetensors, which transformers needs.",
                remedy="name the output folder of chaccu train",
            )
        try:
            import peft
        except ImportError as error:
            raise MissingDependencyError("peft", extra="train", needed_for="adapters") from error
        config = peft.PeftConfig.from_pretrained(str(adapter.peft))
        odd = [name for name in _ODD if getattr(config, name, None)]
        if config.peft_type != peft.PeftType.LORA or getattr(config, "bias", "none") != "none" or odd:
            what = ", ".join(odd) or f"{config.peft_type.value} with bias {getattr(config, 'bias', None)}"
            raise EngineError(f"{adapter.folder} uses {what}, which is not served beside others.", remedy="merge it")
        self._check_fits(adapter)
        rows = _TokenRows.read(adapter, config.trainable_token_indices, self._model)
        config.trainable_token_indices = None
        config.inference_mode = True
        key = f"adapter{next(self._numbers)}"
        try:
            with warnings.catch_warnings():
                # Between two libraries: peft asks transformers by an old name, and speaks of the rows that are put in here.
                warnings.simplefilter("ignore")
                self._add(config, adapter, key)
        except Exception as error:  # peft raises bare exceptions for whatever is wrong with the files
            self._remove(key)
            raise EngineError(f"peft cannot load {adapter.folder}: {error}", remedy="check the folder's files") from error
        self._keys[adapter.name] = key
        if rows is not None:
            self._token_rows[adapter.name] = rows
            self._hook()

    def unload(self, name: str) -> None:
        """Forget an adapter that no row will have any more."""
        self._token_rows.pop(name, None)
        self._remove(self._keys.pop(name))
        if not self._token_rows:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def forward(self, names: Sequence[str | None], **inputs: Any) -> Any:
        """The model's output, with the adapter that each of the R rows names."""
        if self._peft is None:
            return self._model(**inputs)
        if all(name is None for name in names):
            # By peft's way of mixing, a step would take a sixth longer for nothing.
            self._enable(False)
            return self._model(**inputs)
        self._enable(True)
        with self._placed(names):
            return self._peft(**inputs, adapter_names=[_BASE if name is None else self._keys[name] for name in names])

    @contextlib.contextmanager
    def through(self, name: str | None) -> Iterator[None]:
        """Whatever is asked of the model in this block goes through one adapter, or none; it must be a batch of one row."""
        if self._peft is None:
            yield
            return
        self._enable(name is not None)
        if name is not None:
            self._peft.set_adapter(self._keys[name], inference_mode=True)
        with self._placed([name]):
            yield

    def _enable(self, enabled: bool) -> None:
        """Let the model's layers have their adapters, or be as they were."""
        if enabled != self._enabled:
            layers = self._peft.base_model
            (layers.enable_adapter_layers if enabled else layers.disable_adapter_layers)()
            self._enabled = enabled

    @contextlib.contextmanager
    def _placed(self, names: Sequence[str | None]) -> Iterator[None]:
        self._places = {
            name: [row for row, one in enumerate(names) if one == name] for name in self._token_rows if name in names
        }
        try:
            yield
        finally:
            self._places = {}

    def _add(self, config: Any, adapter: AdapterSource, key: str) -> None:
        import peft

        if self._peft is None:
            self._enabled = True
            self._peft = peft.PeftModelForCausalLM(self._model, config, adapter_name=key)
        else:
            self._enable(True)
            self._peft.add_adapter(key, config)
        loaded = self._peft.load_adapter(str(adapter.peft), key, torch_device=str(self._model.device))
        left = [name for name in loaded.unexpected_keys if "token_adapter" not in name]
        if left:
            raise EngineError(f"its configuration has no place for {left[0]}.")
        self._peft.eval()

    def _remove(self, key: str) -> None:
        if self._peft is None or key not in self._peft.peft_config:
            return
        if len(self._peft.peft_config) == 1:
            self._peft.unload()
            self._peft = None
            return
        self._enable(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another adapter that is the active one now
            self._peft.delete_adapter(key)

    def _check_fits(self, adapter: AdapterSource) -> None:
        """Raise `EngineError` unless the model has every layer that the adapter changes, in its shape."""
        assert adapter.peft is not None
        with safe_open(adapter.peft / "adapter_model.safetensors", framework="pt") as source:
            shapes = {name.removeprefix(_PREFIX): source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            if name.endswith(_ROWS):
                continue
            ending = _LOW if name.endswith(_LOW) else _HIGH
            layer = self._find_layer(name.removesuffix(ending))
            if not name.endswith(ending) or getattr(layer, "weight", None) is None:
                raise EngineError(
                    f"the adapter in {adapter.folder} has {name}, for which this model has no layer.",
                    remedy="name an adapter that was trained on this very base",
                )
            rows, columns = layer.weight.shape
            if hasattr(layer, "nf"):  # GPT-2's Conv1D: the weights are stored as in × out
                rows, columns = columns, rows
            wanted, found = (shape[1], columns) if ending == _LOW else (shape[0], rows)
            if wanted != found:
                raise EngineError(
                    f"{name} in {adapter.folder} is for a layer of {wanted}, and that of this model has {found}.",
                    remedy="name an adapter that was trained on this very base",
                )

    def _find_layer(self, name: str) -> Any:
        try:
            layer = self._model.get_submodule(name)
        except AttributeError:
            return None
        return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer

    def _hook(self) -> None:
        """Let the embedding and the projection ask for the rows of tokens, once there are any."""
        if not self._hooks:
            embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
            self._hooks = [
                embedding.register_forward_hook(self._put_into_embedding),
                head.register_forward_hook(self._put_into_logits),
            ]

    def _put_into_embedding(self, module: Any, inputs: tuple[torch.Tensor], embedded_RTD: torch.Tensor) -> torch.Tensor:
        for name, rows in self._places.items():
            embedded_RTD[rows] = self._token_rows[name].embed(inputs[0][rows], embedded_RTD[rows], module)
        return embedded_RTD

    def _put_into_logits(self, _: Any, inputs: tuple[torch.Tensor], logits_RTV: torch.Tensor) -> torch.Tensor:
        for name, rows in self._places.items():
            logits_RTV[rows] = self._token_rows[name].project(inputs[0][rows], logits_RTV[rows])
        return logits_RTV


class _TokenRows:
    """Rows of the embedding and of the projection that an adapter has in place of the model's; None: it has none there."""

    def __init__(
        self, embedding: tuple[torch.Tensor, torch.Tensor] | None, head: tuple[torch.Tensor, torch.Tensor] | None, size: int
    ) -> None:
        self._embedding = embedding
        self._head = head
        self._index_V: torch.Tensor | None = None
        if embedding is not None:
            # Where a token's row is among those trained; -1: the model's own.
            self._index_V = torch.full((size,), -1, device=embedding[0].device)
            self._index_V[embedding[0]] = torch.arange(len(embedding[0]), device=embedding[0].device)

    @classmethod
    def read(cls, adapter: AdapterSource, indices: Any, model: Any) -> _TokenRows | None:
        """Those of `adapter`; `indices`: tokens by module's name, as peft's configuration has them."""
        if not indices:
            return None
        assert adapter.peft is not None
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, tensor in load_file(adapter.peft / "adapter_model.safetensors").items():
            if not name.endswith(_ROWS):
                continue
            path = name.removeprefix(_PREFIX).removesuffix(_ROWS)
            module = next((one for place, one in model.named_modules() if place == path), None)
            tokens = indices.get(path.rpartition(".")[2]) if isinstance(indices, dict) else indices
            if module not in (embedding, head) or tokens is None or tensor.shape != (len(tokens), module.weight.shape[1]):
                raise EngineError(
                    f"{name} in {adapter.folder} does not fit this model.",
                    remedy="name an adapter that was trained on this very base",
                )
            ids_K = torch.tensor(tokens, device=model.device)
            found[module] = (ids_K, tensor.to(device=model.device, dtype=module.weight.dtype))
        if embedding.weight is head.weight and embedding in found:
            found[head] = found[embedding]
        return cls(found.get(embedding), found.get(head), embedding.weight.shape[0])

    def embed(self, ids_RT: torch.Tensor, embedded_RTD: torch.Tensor, module: Any) -> torch.Tensor:
        if self._embedding is None or self._index_V is None:
            return embedded_RTD
        index_RT = self._index_V[ids_RT]
        # Gemma's embedding scales what it gives.
        rows_KD = self._embedding[1] * getattr(module, "embed_scale", 1.0)
        return torch.where((index_RT >= 0)[..., None], rows_KD[index_RT.clamp(min=0)], embedded_RTD)

    def project(self, hidden_RTD: torch.Tensor, logits_RTV: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            return logits_RTV
        ids_K, rows_KD = self._head
        logits_RTV[..., ids_K] = hidden_RTD @ rows_KD.T
        return logits_RTV
