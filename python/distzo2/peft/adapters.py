"""Adapters around a model whose weights are not loaded yet, and their files.

A run's base is a checkpoint and an adapter's directory: the `CheckpointMap` of both fills the model, names its digests
in the journal's header, and so keeps resumed runs and replays on the same start.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from distzo2.adapter_types import kind_of
from distzo2.checkpoint.layout import Layout
from distzo2.checkpoint.mapping import CheckpointMap, MappedTensor, persistent_buffers
from distzo2.checkpoint.reading import ADAPTER_FILE, ADAPTER_WEIGHTS, CheckpointFiles, adapter_weights
from distzo2.checkpoint.tensor_files import CheckpointError
from distzo2.errors import DistZO2Error, UsageError, blaming
from distzo2.files import write_whole
from distzo2.models.pretrained import meta_model
from distzo2.peft.library import check, peft_library, read_config
from distzo2.streaming.offload import runtime_of

NAME = "default"  # of the adapter in a model that is made here
_TASKS = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS", "masked": None}

Prepare = Callable[[nn.Module, CheckpointMap], tuple[nn.Module, CheckpointMap]]


# ---- what kind of adapter ----------------------------------------------------------------------------------------


def new_config(
    method: str,
    kind: str,
    model: str,
    *,
    r: int,
    alpha: float,
    targets: str | None,
    virtual_tokens: int,
    held: nn.Module | None = None,
) -> Any:
    """The `PeftConfig` of a new adapter: `method` is "lora", "prefix" or "prompt", `kind` that of the model, `model`
    its checkpoint, and `targets` names modules, or parameters as experts are, with commas between (None: what peft has
    for the architecture). `held` is the model on meta, if `model` is not the directory of one.

    Raises:
        UsageError: a target is not in the model. DistZO2Error: peft has no such adapter for this kind of model.
    """
    peft, task = peft_library(), _TASKS[kind]
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if method == "lora":
        held = meta_model(Path(model)) if held is None else held
        if targets is None and held.config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            advice = "name modules by --lora-targets, such as q_proj,v_proj, or all-linear"
            raise DistZO2Error(f"peft has no LoRA targets for models of type {held.config.model_type}: {advice}")
        names = [] if targets in (None, "all-linear") else [n.strip() for n in targets.split(",")]
        tensors = [n for n in names if any(f".{p}".endswith(f".{n}") for p, _ in held.named_parameters())]
        modules = [n for n in names if n not in tensors]
        for name in modules:  # peft passes over a name as long as another one is found
            if not any(f".{m}".endswith(f".{name}") for m, _ in held.named_modules()):
                raise UsageError(f"--lora-targets {name}: {type(held).__name__} has no such module or parameter")
        modules = modules or (None if tensors else targets)
        config = peft.LoraConfig(
            task_type=task, r=r, lora_alpha=alpha, target_modules=modules, target_parameters=tensors or None
        )
    elif kind != "causal":
        raise DistZO2Error(f"--peft {method} is for causal language models, and not for {kind} ones: --peft lora works")
    else:
        make = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
        config = make(task_type=task, num_virtual_tokens=virtual_tokens)
    config.base_model_name_or_path = model
    return config


def known_config(directory: Path, kind: str) -> Any:
    """The `PeftConfig` of an adapter's directory, for a kind of model.

    Raises:
        DistZO2Error: it cannot be used, or is for another kind.
    """
    config = read_config(directory)
    if config.task_type is None and config.is_prompt_learning:
        config.task_type = _TASKS[kind]  # by which peft decides where the prompt goes
    if config.task_type not in (None, _TASKS[kind]) or (config.is_prompt_learning and kind != "causal"):
        raise DistZO2Error(f"{directory}: the adapter is for {config.task_type}, and the model is {kind}")
    return config


def virtual_tokens(config: Any) -> int:
    """How many positions of the model the adapter takes; None: there is none."""
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def tokens_in_front(config: Any) -> int:
    """How many positions stand before an input's in the logits; a prefix has none there."""
    if config is None or config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        return 0
    return virtual_tokens(config)


# ---- around a model ----------------------------------------------------------------------------------------------


def adapter(source: Any, start: str | Path | None = None, *, seed: int = 0, config: Any = None) -> Prepare:
    """Puts an adapter around a model that `distzo2.from_pretrained(path, prepare=distzo2.adapter(...))` loads; it then
    returns a `peft.PeftModel`, whose adapter is trained and whose base is frozen.

    Args:
        source: the directory of an adapter, or a `peft.PeftConfig`, whose adapter peft initialises under `seed`.
        start: the directory where the adapter is written as it starts; base, start and journal are all of a run. It
            may be left out for a directory, which is then used where it is.
        config: of the directory's adapter, if it is not to be read.

    Raises:
        DistZO2Error: peft is missing, or the adapter is of a type that cannot be trained, or not of this model.
    """
    if known := isinstance(source, (str, Path)):
        config = config or read_config(Path(source))
    else:
        check(config := source, type(source).__name__, new=True)
        if start is None:
            raise DistZO2Error("a new adapter needs start=, the directory where it is written as it starts")

    def prepare(model: nn.Module, base: CheckpointMap) -> tuple[nn.Module, CheckpointMap]:
        held = {id(t): name for name, t in [*model.named_parameters(), *persistent_buffers(model)]}
        wrapped = wrap(model, config, seed)
        tensors, place = AdapterTensors(wrapped, base, held), Path(source if start is None else start)
        if start is not None:
            write_adapter(place, wrapped.peft_config[NAME], tensors.read(Path(source)) if known else tensors.first())
        files, keys = tensors.open(place), tensors.keys
        number = {entry.name: i for i, entry in enumerate(files.entries, len(base.tensors))}
        mapped = {}
        for name, tensor in [*wrapped.named_parameters(), *persistent_buffers(wrapped)]:
            if name in keys:
                pieces = Layout.leaf(number[keys[name]], tensor.shape).pieces
                mapped[name] = MappedTensor(name, tensor.dtype, tuple(tensor.shape), pieces)
            elif id(tensor) in held:
                mapped[name] = replace(base.mapped[held[id(tensor)]], name=name)
        base.files.extend(files)
        return wrapped.eval(), replace(base, mapped=mapped, adapter=place)

    return prepare


def wrap(model: nn.Module, config: Any, seed: int = 0) -> Any:
    """The `PeftModel` around a model whose parameters are on meta, with an adapter that peft initialises under `seed`,
    in host memory. Meanwhile parameters are zeros that share one element."""
    peft, config = peft_library(), copy.deepcopy(config)
    base, start = config.base_model_name_or_path, getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start != "gaussian":  # of an adapter whose values come from its file
        config.init_lora_weights = True
    meta = {id(p): p for p in model.parameters()}
    zeros = {key: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape)) for key, p in meta.items()}
    _swap(model, zeros)
    blames, random = blaming(f"{kind_of(config)} on {type(model).__name__}"), torch.random.fork_rng(devices=[])
    with blames, random, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ties and the like, which are known or refused here
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config, NAME)
    for key, p in zeros.items():
        meta[key].requires_grad_(p.requires_grad)
    _swap(wrapped, {id(p): meta[key] for key, p in zeros.items()})
    config.base_model_name_or_path = base
    if start is not None:
        config.init_lora_weights = start
    return wrapped


def _swap(model: nn.Module, others: Mapping[int, nn.Parameter]) -> None:
    """Puts parameters in the place of those with the ids that are given."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if id(p) in others:
                module._parameters[name] = others[id(p)]


def keys_of(model: Any, name: str = NAME) -> dict[str, str]:
    """The names that peft gives the parameters of an adapter in its file, by their names in the `PeftModel`."""
    from peft.utils import get_peft_model_state_dict

    if model.peft_config[name].is_prompt_learning:
        return {f"prompt_encoder.{name}.embedding.weight": "prompt_embeddings"}
    tags = {each: torch.empty(0) for each, _ in model.named_parameters()}
    tag_of = {id(tag): each for each, tag in tags.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model_state_dict(model, tags, name, save_embedding_layers=False)
    return {tag_of[id(tag)]: key for key, tag in found.items()}


# ---- files -------------------------------------------------------------------------------------------------------


class AdapterTensors:
    """The parameters of a model's adapter, and the tensors that they are in the adapter's file.

    Args:
        wrapped: the `PeftModel`.
        base: the map of the model inside.
        held: the names of that model's tensors in `base`, by id.
    """

    def __init__(self, wrapped: Any, base: CheckpointMap, held: Mapping[int, str]) -> None:
        self.params = dict(wrapped.named_parameters(remove_duplicate=False))  # a tied one by each of its names
        self.keys, self._base, self._held = keys_of(wrapped), base, held

    def origin(self, name: str) -> str | None:
        """The tensor of the base that a parameter of the adapter is (a bias) or is a copy of (a head)."""
        return self._held.get(id(self.params.get(name.replace(f".modules_to_save.{NAME}.", ".original_module."))))

    def open(self, directory: Path) -> CheckpointFiles:
        """The tensors of a directory. Beside an adapter on embeddings peft saves these too: they are passed over.

        Raises:
            CheckpointError: they are not those of this adapter, or saved embeddings are not the base's.
        """
        files, params = CheckpointFiles(directory, adapter_weights(directory)), self.params
        found = {entry.name: entry for entry in files.entries}
        (where,) = files.files
        for name, key in self.keys.items():
            if key not in found:
                raise CheckpointError(f"{where}: no tensor {key!r}, which the adapter of this model has")
            if found[key].shape != tuple(params[name].shape):
                shapes = f"{list(found[key].shape)}, and the model needs {list(params[name].shape)}"
                raise CheckpointError(f"{where}: tensor {key!r} has the shape {shapes}")
        for key in sorted(found.keys() - set(self.keys.values())):
            name = self._held.get(id(params.get(key)))
            if name is None:
                raise CheckpointError(f"{where}: nothing in the model's adapter takes tensor {key!r}")
            saved = _read(files, key, torch.empty(found[key].shape, dtype=params[key].dtype))
            if not torch.equal(saved, self._of_base(name, params[key])):
                changed = f"is not that of {self._base.directory}: the base was changed beside the adapter"
                raise CheckpointError(f"{where}: tensor {key!r} {changed}")
        return files

    def read(self, directory: Path) -> dict[str, torch.Tensor]:
        """The tensors of a directory by their names there, in the dtypes of the model."""
        with closing(self.open(directory)) as files:
            empty = {key: torch.empty_like(self.params[name], device="cpu") for name, key in self.keys.items()}
            return {key: _read(files, key, out) for key, out in empty.items()}

    def first(self) -> dict[str, torch.Tensor]:
        """The tensors as peft has initialised them, those of the base with the base's values."""
        values = {}
        for name, key in self.keys.items():
            values[key] = value = self.params[name].detach()
            if (origin := self.origin(name)) is not None:
                values[key] = self._of_base(origin, value).to(value.dtype)
        return values

    def _of_base(self, name: str, like: torch.Tensor) -> torch.Tensor:
        value = torch.empty(like.shape, dtype=self._base.mapped[name].dtype)
        self._base.read(name, value)
        return value


def _read(files: CheckpointFiles, key: str, out: torch.Tensor) -> torch.Tensor:
    number = next(i for i, entry in enumerate(files.entries) if entry.name == key)
    files.read_pieces(Layout.leaf(number, out.shape).pieces, out)
    return out


def write_adapter(directory: str | Path, config: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Writes an adapter's directory as peft does, durably, the configuration last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({key: v.contiguous() for key, v in values.items()}, metadata={"format": "pt"})
    write_whole(directory / ADAPTER_WEIGHTS, data)
    config = copy.deepcopy(config)
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):  # which peft would write in any order
            setattr(config, name, sorted(value))
    config.save_pretrained(str(directory))
    write_whole(directory / ADAPTER_FILE, (directory / ADAPTER_FILE).read_bytes())  # durable


def save_adapter(model: nn.Module, out_dir: str | Path, name: str | None = None) -> None:
    """Writes the adapter of a `PeftModel` that was handed over, with every update made so far, into a directory that
    `peft.PeftModel.from_pretrained` loads. Units without parameters of the adapter are not read.

    Args:
        name: of the adapter; None: the active one.

    Raises:
        DistZO2Error: the model was not handed over, or is no PeftModel.
    """
    runtime = runtime_of(model)
    if not hasattr(model, "get_base_model"):
        raise DistZO2Error(f"{type(model).__name__} is no PeftModel: save it with distzo2.save_pretrained")
    name = name or model.active_adapter
    keys, values = keys_of(model, name), {}
    key_of = {id(p): keys[each] for each, p in model.named_parameters() if each in keys}
    for unit in runtime.units:
        if own := {p.name: key_of[id(p.tensor)] for p in unit.params if id(p.tensor) in key_of}:
            with runtime.access.reading(unit) as views:
                values |= {key: views[each].clone() for each, key in own.items()}
    write_adapter(out_dir, model.peft_config[name], values)
