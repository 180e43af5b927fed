"""Checkpoints in the official layout: `config.json`, tensor names, safetensors files. Names of Hugging Face stay here.

A checkpoint that we write has exactly the names and shapes of the released one. What a config may express but this
package does not compute is refused by name, never ignored. Weights are read from safetensors only; pickle is refused.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hymba.config import MAX_LAYERS, HymbaConfig, brief
from hymba.errors import UserError
from hymba.files import write_files
from hymba.model import quant
from hymba.shipped import SHIPPED_FOLDER, SHIPPED_MODEL

if TYPE_CHECKING:
    from hymba.model.hymba import Hymba

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OUR_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# as transformers splits files
MAX_SHARD_BYTES = 5 * 10**9
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# a config has kilobytes, the index of the largest model a megabyte; parsed, JSON may be thirty times larger
MAX_JSON_BYTES = 2**21
OFFICIAL_CODE = "nvidia/Hymba-1.5B-Base"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --------------------------------------------------------------------------------------------------------- config.json

# official key -> field of HymbaConfig, where the value is the same
SAME_VALUE = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
    "mlp_hidden_act": "mlp_activation",
    "mamba_expand": "expand",
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "num_memory_tokens": "n_meta",
    "sliding_window": "window",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_length",
    "orig_max_position_embeddings": "rope_original_length",
    "kq_norm": "qk_norm",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
# keys that a config may leave out, and what the official class puts there
OPTIONAL = {
    "mlp_hidden_act": "silu",
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "kq_norm": "none",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "orig_max_position_embeddings": None,
    "sliding_window": None,
    "rope_theta": 10000.0,
}
# our own keys, for what the official file cannot say; left out where they have the default of the field
OWN = ("mixers", "fusion", "d_head", "d_ssm_head")
# keys by which the released code would take a model for its own
OF_RELEASED_CODE = ("architectures", "auto_map", "conv_dim", "layer_type", "v_head_dim")
# official key -> the values that mean what this package computes; anything else is refused
REQUIRED_VALUE: dict[str, tuple[Any, ...]] = {
    "model_type": ("hymba",),
    "attention_dropout": (0.0,),
    "hidden_act": ("silu",),
    "kv_weight_reuse": (False,),
    "mamba_conv_bias": (True,),
    "mamba_proj_bias": (False,),
    "mamba_inner_layernorms": (True,),
    "memory_tokens_interspersed_every": (0,),
    "num_experts": (1,),
    "num_experts_per_tok": (1,),
    "num_mamba": (1,),
}
# keys that say nothing about what is computed (v_head_dim is read by nobody: value heads are always E / heads wide)
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attn_implementation", "attn_implementation_new", "auto_map",
    "calc_logits_for_entire_prompt", "dtype", "output_router_logits", "router_aux_loss_coef", "seq_length",
    "torch_dtype", "transformers_version", "use_cache", "use_mamba_kernels", "v_head_dim",
}  # fmt: skip
INTERPRETED = {
    "attn_hidden_size", "conv_dim", "global_attn_idx", "kq_head_dim", "kv_reuse_every_i_layer", "kv_reuse_group",
    "layer_type", "mamba_dt_rank", "quantization", "rope", "rope_type",
}  # fmt: skip


def config_from_official(values: dict[str, Any]) -> HymbaConfig:
    """Read the official `config.json`. Raises `UserError` that names the key which is missing or not supported."""
    if not isinstance(values, dict):
        raise UserError(f"{CONFIG_FILE} must hold a JSON object")
    if values.get("model_type") != "hymba":
        raise UserError(f"{CONFIG_FILE}: model_type={brief(values.get('model_type'))} is another model, not 'hymba'")
    for key in sorted(set(values) - {*SAME_VALUE, *REQUIRED_VALUE, *WITHOUT_EFFECT, *INTERPRETED, *OWN}):
        raise UserError(f"{CONFIG_FILE}: unknown setting {brief(key)}; remove it if the model does not need it")
    for key, allowed in REQUIRED_VALUE.items():
        if key in values and (
            values[key] not in allowed or isinstance(values[key], bool) != isinstance(allowed[0], bool)
        ):
            raise UserError(f"{CONFIG_FILE}: {key}={brief(values[key])} is not supported, only {allowed[0]!r}")
    for key in SAME_VALUE:
        if key not in values and key not in OPTIONAL:
            raise UserError(f"{CONFIG_FILE}: {key!r} is missing")
    same = {ours: values.get(key, OPTIONAL.get(key)) for key, ours in SAME_VALUE.items()}
    try:
        config = HymbaConfig(
            **same,
            **{key: tuple(x) if isinstance(x := values[key], list) else x for key in OWN if key in values},
            dt_rank=_dt_rank(values),
            global_layers=_global_layers(values),
            kv_groups=_kv_groups(values),
            rope=_rope(values),
        )
    except UserError as error:
        raise UserError(f"{CONFIG_FILE}: {_in_official_words(str(error))}") from None
    _check_sizes(values, config)
    _quantisation(values)
    return config


def config_to_official(config: HymbaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Write the official `config.json`, with everything that the released modeling code reads.

    What that code does not compute (`HymbaConfig.is_hymba` is false) does not point to it.
    """
    c = config
    official = {
        **{key: getattr(c, ours) for key, ours in SAME_VALUE.items()},
        **{key: allowed[0] for key, allowed in REQUIRED_VALUE.items()},
        "architectures": ["HymbaForCausalLM"],
        "attn_hidden_size": -1,
        "attn_implementation": "flex",
        "attn_implementation_new": "flex",
        # the code is not part of a checkpoint: transformers fetches it from the released repository
        "auto_map": {
            "AutoConfig": f"{OFFICIAL_CODE}--configuration_hymba.HymbaConfig",
            "AutoModelForCausalLM": f"{OFFICIAL_CODE}--modeling_hymba.HymbaForCausalLM",
        },
        "calc_logits_for_entire_prompt": False,
        "conv_dim": {str(i): c.d_inner for i in range(c.n_layers)},
        "global_attn_idx": list(c.global_layers),
        "kq_head_dim": -1,
        "kv_reuse_every_i_layer": -1,
        "kv_reuse_group": [list(group) for group in c.kv_groups] or None,
        "layer_type": ["h"] * c.n_layers,
        "mamba_dt_rank": c.dt_rank,
        "output_router_logits": False,
        "rope": c.rope != "none",
        "rope_type": None if c.rope == "none" else c.rope,
        "router_aux_loss_coef": 0.001,
        "seq_length": c.max_length,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.44.0",  # that the released code was written for
        "use_cache": False,
        "use_mamba_kernels": True,
        "v_head_dim": c.d_value,
    }
    own = {key: getattr(c, key) for key in OWN if getattr(c, key) != getattr(HymbaConfig, key)}
    own = {key: list(x) if isinstance(x, tuple) else x for key, x in own.items()}
    left_out = () if c.is_hymba else OF_RELEASED_CODE
    return {key: x for key, x in official.items() if key not in left_out} | own


def _in_official_words(message: str) -> str:
    names = {ours: key for key, ours in SAME_VALUE.items()}
    names |= {"global_layers": "global_attn_idx", "kv_groups": "kv_reuse_group", "rope": "rope_type"}
    names |= {"dt_rank": "mamba_dt_rank"}
    return re.sub(r"\b[a-z]\w+\b", lambda match: names.get(match[0], match[0]), message)


def _layers(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise UserError(f"{key}: {brief(value)} must be a list of layers")
    return tuple(value)


def _global_layers(values: dict[str, Any]) -> tuple[int, ...]:
    layers = values.get("global_attn_idx")
    if layers is None and values.get("sliding_window") is None:  # then every layer is global
        return ()
    return _layers("global_attn_idx", layers)


def _dt_rank(values: dict[str, Any]) -> int:
    value, width = values.get("mamba_dt_rank", "auto"), values["hidden_size"]
    return -(-width // 16) if value == "auto" and isinstance(width, int) else value


def _kv_groups(values: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    groups, every = values.get("kv_reuse_group"), values.get("kv_reuse_every_i_layer", -1)
    if type(every) is not int:
        raise UserError(f"kv_reuse_every_i_layer={brief(every)} must be an integer; -1 means none")
    if groups is not None:
        if not isinstance(groups, list):
            raise UserError(f"kv_reuse_group={brief(groups)} must be a list of lists of layers")
        # a group of one layer shares with nobody
        return tuple(group for g in groups if len(group := _layers("kv_reuse_group", g)) > 1)
    n = values["num_hidden_layers"]
    if every < 2 or type(n) is not int or n > MAX_LAYERS:  # HymbaConfig refuses the latter two
        return ()
    return tuple(tuple(range(i, min(i + every, n))) for i in range(0, n - 1, every))


def _quantisation(values: dict[str, Any]) -> str | None:
    """How the weights are quantised: our own key, which released checkpoints do not have."""
    try:
        return quant.parse_settings(values["quantization"]) if "quantization" in values else None
    except UserError as error:
        raise UserError(f"{CONFIG_FILE}: {error}") from None


def _rope(values: dict[str, Any]) -> str:
    if values.get("rope", True) is False:
        return "none"
    value = values.get("rope_type")
    return "default" if value is None else value


def _check_sizes(values: dict[str, Any], config: HymbaConfig) -> None:
    """Redundant settings must say what the others say."""
    c = config
    expected = {"attn_hidden_size": c.n_heads * c.d_key, "kq_head_dim": c.d_key}
    for key, size in expected.items():
        value = values.get(key, -1)
        if type(value) is not int or (value > 0 and value != size):
            raise UserError(
                f"{CONFIG_FILE}: {key}={brief(value)} is not supported, only {size} (or -1) with this hidden_size"
            )
    if values.get("layer_type") not in (None, ["h"] * c.n_layers):
        raise UserError(f"{CONFIG_FILE}: layer_type must be 'h' (hybrid heads) for each of {c.n_layers} layers")
    if values.get("conv_dim") not in (None, {str(i): c.d_inner for i in range(c.n_layers)}):
        raise UserError(f"{CONFIG_FILE}: conv_dim must be {c.d_inner} (mamba_expand * hidden_size) for every layer")
    if not isinstance(values.get("rope", True), bool):
        raise UserError(f"{CONFIG_FILE}: rope={brief(values['rope'])} must be true or false")


# -------------------------------------------------------------------------------------------------------- tensor names

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP_NAMES = {
    "meta_tokens": "model.memory_tokens",
    "embedding.weight": EMBEDDING,
    "norm.weight": "model.final_layernorm.weight",
    "lm_head.weight": LM_HEAD,
}
BLOCK_NAMES = {
    "heads_norm.weight": "input_layernorm.weight",
    "heads.in_proj.weight": "mamba.in_proj.weight",
    "heads.out_proj.weight": "mamba.out_proj.weight",
    "heads.attn_norm.weight": "mamba.pre_avg_layernorm1.weight",
    "heads.ssm_norm.weight": "mamba.pre_avg_layernorm2.weight",
    "heads.attention.q_norm.weight": "mamba.self_attn.q_norm.weight",
    "heads.attention.k_norm.weight": "mamba.self_attn.k_norm.weight",
    "heads.mamba.conv_weight": "mamba.conv1d.weight",
    "heads.mamba.conv_bias": "mamba.conv1d.bias",
    "heads.mamba.x_proj.weight": "mamba.x_proj.0.weight",
    "heads.mamba.dt_norm.weight": "mamba.dt_layernorm.weight",
    "heads.mamba.B_norm.weight": "mamba.B_layernorm.weight",
    "heads.mamba.C_norm.weight": "mamba.C_layernorm.weight",
    "heads.mamba.dt_weight": "mamba.dt_proj.0.weight",
    "heads.mamba.dt_bias": "mamba.dt_proj.0.bias",
    "heads.mamba.A_log": "mamba.A_log.0",
    "heads.mamba.D": "mamba.D.0",
    "heads.mamba.norm.weight": "mamba.norm.weight",  # Mamba-2's; there is no official name
    "mlp_norm.weight": "pre_moe_layernorm.weight",
    "mlp.gate_proj.weight": "moe.experts.0.gate_proj.weight",
    "mlp.up_proj.weight": "moe.experts.0.up_proj.weight",
    "mlp.down_proj.weight": "moe.experts.0.down_proj.weight",
}


def official_name(name: str) -> str:
    """Our parameter name -> the official one."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[rest]}"


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """What a checkpoint holds, tied weights once -> (our name, official name, parameter)"""
    for name, parameter in model.named_parameters():
        if parameter.numel():  # a model without meta tokens has no such tensor
            yield name, official_name(name), parameter


def to_official_shape(name: str, x: Tensor) -> Tensor:
    return x.unsqueeze(1) if name.endswith("conv_weight") else x


def from_official_shape(name: str, x: Tensor) -> Tensor:
    return x.squeeze(1) if name.endswith("conv_weight") else x


# --------------------------------------------------------------------------------------------------------------- files


def resolve(path: str | os.PathLike, wanted: Sequence[str] = ("*.json", "*.safetensors", "*.jinja")) -> Path:
    """A folder with a checkpoint: a path, the model that the package ships (`hymba-austen`), or a Hugging Face hub id
    (`owner/name`), which is fetched into its cache.

    wanted: patterns of the files that are fetched
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"{path} is a file; name the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    except OSError as error:  # no permission, a name too long
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if str(path) == SHIPPED_MODEL:
        return SHIPPED_FOLDER
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)):
        raise UserError(f"{path}: no such folder (and neither {SHIPPED_MODEL} nor a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download  # not needed by anyone who loads from a folder

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(wanted)))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise UserError(f"{path}: no such folder, and the hub could not give it ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The gist of an error, in one line."""
    lines = (getattr(error, "strerror", None) or str(error)).splitlines() or [type(error).__name__]
    return lines[0][:200]


def read_json(path: Path) -> Any:
    """What a small JSON file holds. Raises `UserError` if it is missing, too large or no JSON."""
    try:
        if not path.is_file():  # nor a folder or a pipe, on which reading would wait for ever
            raise UserError(f"{path.parent} is no checkpoint: {path.name} is {_absence(path)}")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is too large; it should have a few kilobytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({_reason(error)})") from None


def _absence(path: Path) -> str:
    return "not a file" if path.exists() else "missing"


def load_config(folder: Path) -> tuple[HymbaConfig, torch.dtype | None]:
    """Config of a checkpoint, and the dtype it names."""
    config, dtype, _ = _load_config(folder)
    return config, dtype


def _load_config(folder: Path) -> tuple[HymbaConfig, torch.dtype | None, str | None]:
    """Config, dtype, and the kind of quantisation."""
    values = read_json(folder / CONFIG_FILE)
    config = config_from_official(values)
    name = values.get("torch_dtype", values.get("dtype"))
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        raise UserError(f"{CONFIG_FILE}: torch_dtype={brief(name)} is not supported; choose from {', '.join(DTYPES)}")
    return config, DTYPES.get(name), _quantisation(values)


def parse_dtype(dtype: torch.dtype | str, stored: torch.dtype | None) -> torch.dtype:
    """`auto` is the checkpoint's own."""
    if dtype == "auto":
        return stored or torch.float32
    parsed = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if parsed not in DTYPES.values():
        raise UserError(f"dtype {dtype!r} is not supported; choose from auto, {', '.join(DTYPES)}")
    return parsed


def load_model(path: str | os.PathLike, *, device: str | torch.device, dtype: torch.dtype | str) -> "Hymba":
    """Load a checkpoint. In its own dtype on the CPU the weights stay in the file's memory map, and are never copied.

    Raises `UserError` for whatever is wrong with the checkpoint, before anything large is allocated.
    """
    from hymba.model.hymba import Hymba

    folder = resolve(path)
    config, stored, kind = _load_config(folder)
    dtype = parse_dtype(dtype, stored)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter in a build of PyTorch without CUDA
        raise UserError(f"device {str(device)!r} cannot be used here ({_reason(error)})") from None
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        layers = {match[1] for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        if len(layers) != config.n_layers:
            raise UserError(
                f"{folder}: {CONFIG_FILE} says num_hidden_layers={config.n_layers}, the weights are of {len(layers)}"
            )
        try:
            with torch.device("meta"), _WithoutInit():
                model = Hymba(config).to(dtype)
                if kind:
                    quant.prepare(model, kind, dtype)
        except RuntimeError as error:  # sizes whose product no tensor can have
            raise UserError(f"{folder}: the sizes in {CONFIG_FILE} are too large ({_reason(error)})") from None
        _check_tensors(folder, model, tensors)
        for name, official, parameter in list(stored_parameters(model)):
            x = from_official_shape(name, _read_tensor(folder, tensors, official))
            # A is exponentiated twice: the released model keeps it in float32 whatever its dtype
            kept = torch.float32 if name.endswith("A_log") else dtype
            _assign(model, name, nn.Parameter(x.to(device, kept), requires_grad=parameter.requires_grad))
        for name, matrix in quant.matrices(model):
            official = official_name(name)
            codes, scales = (_read_tensor(folder, tensors, x) for x in (official, official + quant.SCALE_SUFFIX))
            matrix.load_stored(codes, scales, device)
        if config.tie_embeddings and LM_HEAD in tensors:  # some writers keep a copy of the tied weight
            copy, embedding = (_read_tensor(folder, tensors, name) for name in (LM_HEAD, EMBEDDING))
            if copy.dtype != embedding.dtype or not torch.equal(copy, embedding):
                raise UserError(
                    f"{folder}: {LM_HEAD} differs from {EMBEDDING}, though {CONFIG_FILE} says tie_word_embeddings; "
                    "set that to false, or remove the tensor"
                )
    if config.n_meta == 0:
        model.meta_tokens = nn.Parameter(torch.empty(0, config.d_model, device=device, dtype=dtype))
    if config.tie_embeddings and not kind:
        model.lm_head.weight = model.embedding.weight
    return model.eval()


class _WithoutInit(TorchFunctionMode):
    """Leave out `torch.nn.init`: there is nothing to fill on the meta device, but to find that out for normally
    distributed weights PyTorch imports its compiler, which takes a second and 150 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def save_model(model: "Hymba", directory: str | os.PathLike, *, max_shard_bytes: int | None = None) -> None:
    """Write `config.json` and the weights, in one file or in shards of at most `max_shard_bytes` with an index.

    Raises `UserError` if that is not possible; then the checkpoint that was there is as before.
    """
    folder, limit = Path(directory), MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file; name a folder to save into")
    if limit < 1:
        raise UserError(f"max_shard_bytes={limit} must be positive")
    # that of nearly all weights: A_log is always float32
    dtype = model.norm.weight.dtype
    if dtype not in DTYPES.values():
        raise UserError(f"weights of {dtype} cannot be saved; convert them to one of {', '.join(DTYPES)} before")
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    tensors = [(official, to_official_shape(name, x.detach())) for name, official, x in stored_parameters(model)]
    for name, matrix in quant.matrices(model):
        codes, scales = matrix.stored()
        tensors += [(official_name(name), codes), (official_name(name) + quant.SCALE_SUFFIX, scales)]
    for official, x in tensors:
        bytes_ = x.numel() * x.element_size()
        if shards[-1] and size + bytes_ > limit:
            shards.append({})
            size = 0
        shards[-1][official] = x
        size, total = size + bytes_, total + bytes_
    n = len(shards)
    names = [WEIGHTS_FILE] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    writers = {folder / name: _tensor_writer(shard) for name, shard in zip(names, shards, strict=True)}
    if n > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        writers[folder / INDEX_FILE] = _json_writer(index)
    config = config_to_official(model.config, dtype)
    if kind := quant.quantisation(model):
        config["quantization"] = quant.settings(kind)
    writers[folder / CONFIG_FILE] = _json_writer(config)
    write_files(writers)
    # weights of an earlier save in the other form: first the single file, which would be read in place of these
    stale = {path for path in folder.iterdir() if OUR_FILES.fullmatch(path.name)} - set(writers)
    for path in sorted(stale, reverse=True):
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"{path} is of an earlier save and cannot be removed ({_reason(error)})") from None


def _tensor_writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        # from a GPU, one shard at a time
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path, metadata={"format": "pt"})

    return write


def _json_writer(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Open the weight files; nothing is read yet -> {official name: open file}"""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if os.path.lexists(single):  # a link that leads nowhere is a fault to report, not to pass over
        file = _open_file(single, stack)
        return dict.fromkeys(file.keys(), file)
    if not os.path.lexists(index):
        pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{folder}: {pickled[0]} is a pickle, which can run any code when it is read, and is refused; "
                "convert it to safetensors where you trust it (safetensors.torch.save_file)"
            )
        raise UserError(f"{folder} is no checkpoint: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    files, held = {}, {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors") or len(name) > 255:
            raise UserError(f"{index}: {brief(name)} is not the name of a safetensors file beside it")
        files[name] = _open_file(folder / name, stack)
        held[name] = set(files[name].keys())
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise UserError(f"{folder / name}: tensor {brief(tensor)} is missing, though {INDEX_FILE} places it there")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _open_file(path: Path, stack: ExitStack) -> Any:
    try:
        if not path.is_file():
            raise UserError(f"{path} is {_absence(path)}")
        return stack.enter_context(safe_open(path, framework="pt"))
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no intact safetensors file ({_reason(error)}); fetch or save it again") from None


def _read_tensor(folder: Path, tensors: dict[str, Any], name: str) -> Tensor:
    try:
        x = tensors[name].get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{folder}: tensor {name} cannot be read ({_reason(error)})") from None
    # the format lets tensors begin at any byte; kernels want whole elements
    return x.clone() if x.data_ptr() % x.element_size() else x


def _check_tensors(folder: Path, model: nn.Module, tensors: dict[str, Any]) -> None:
    floating = ("F32", "BF16", "F16", "F64")
    expected = {o: (tuple(to_official_shape(name, p).shape), floating) for name, o, p in stored_parameters(model)}
    for name, matrix in quant.matrices(model):
        codes, scales = matrix.stored_shapes()
        integers = ("I8",) if matrix.bits == 8 else ("U8",)
        expected[official_name(name)] = codes, integers
        expected[official_name(name) + quant.SCALE_SUFFIX] = scales, floating
    found = set(tensors)
    if model.config.tie_embeddings:
        found.discard(LM_HEAD)  # compared when it is read
    for problem, names in (("missing", set(expected) - found), ("not part of this model", found - set(expected))):
        if names:
            first = sorted(names)
            more = f" and {len(first) - 1} more" if len(first) > 1 else ""
            raise UserError(f"{folder}: tensor {brief(first[0])}{more} {'are' if more else 'is'} {problem}")
    for name, (shape, dtypes) in expected.items():
        piece = tensors[name].get_slice(name)
        if tuple(piece.get_shape()) != shape:
            raise UserError(
                f"{folder}: tensor {name} has shape {list(piece.get_shape())}, {CONFIG_FILE} asks for {list(shape)}"
            )
        if piece.get_dtype() not in dtypes:
            kind = "floating point weight" if dtypes == floating else "quantised weight"
            raise UserError(f"{folder}: tensor {name} has dtype {piece.get_dtype()}, which is no {kind}")


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


# every official key that carries a value has a field, and every field that is not derived has a key
assert {f.name for f in fields(HymbaConfig)} == set(SAME_VALUE.values()) | set(OWN) | {
    "dt_rank",
    "global_layers",
    "kv_groups",
    "rope",
}
