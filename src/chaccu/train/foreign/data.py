"""Where another trainer's conversations come from and in which format they are written, in a recipe's words.

Invariant: the paths of a recipe are what the other trainer reads, unchanged; what `chaccu data clean` has to make of them is
told.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from chaccu.conversation import TOKENIZER_FORMAT
from chaccu.errors import RecipeError
from chaccu.train.foreign.command import script_stem
from chaccu.train.foreign.headings import BEFORE, MEANINGLESS, OFF, TRANSLATED, UNSUPPORTED
from chaccu.train.foreign.trainers import find_format
from chaccu.train.foreign.values import number, switched_off, text, whole

if TYPE_CHECKING:
    from chaccu.train.foreign.translation import Translation

_VICUNA_SCRIPTS = {"train", "train_mem", "train_lora", "train_xformers", "train_flash_attn"}
_LOADERS = {"json", "csv", "parquet", "text", "arrow"}
_FOUND = ("name", "ds_type", "field", "field_*", "message_*", "roles", "split_thinking", "input_format", "trust_remote_code")


def translate_data(translation: Translation) -> None:
    """Fill `data`, `validation`, `format` and the sources that `chaccu data clean` is to be given."""
    {"fastchat": _from_fastchat, "axolotl": _from_axolotl, "llama-factory": _from_llama_factory}[translation.trainer](
        translation
    )
    if not translation.fields.get("data"):
        raise RecipeError("the configuration names no data.", remedy="add the file or data set that it trains on")
    for key in ("val_set_size", "val_size"):
        if key in translation.left:
            _tell_held_out(translation, key, number(key, translation.left.pop(key)))


def _from_fastchat(translation: Translation) -> None:
    key, paths = translation.take("data_path", "train_file", "dataset_name")
    _put_sources(translation, "data", key, paths)
    key, paths = translation.take("eval_data_path", "validation_file")
    _put_sources(translation, "validation", key, paths)
    script = translation.command.script if translation.command else None
    if script is None or script_stem(translation.command) in _VICUNA_SCRIPTS:
        translation.put("FastChat's train.py", "format", "vicuna_v1.1")
        translation.remark(
            BEFORE,
            "format: FastChat's train.py, train_mem.py and train_lora.py write vicuna_v1.1 for every model. If another program "
            "of that name ran, set format to what it wrote (chaccu format list).",
        )
    else:
        translation.remark(
            BEFORE,
            f"format: {script} does not say in which format conversations are written. Set it to a name out of "
            f"chaccu format list, or to {TOKENIZER_FORMAT} for the model's own template.",
        )


def _put_sources(translation: Translation, field: str, key: str, paths: Any) -> None:
    if paths is None:
        return
    named = [text(key, path) for path in (paths if isinstance(paths, list) else [paths])]
    translation.put(key, field, [{"path": path} for path in named])
    translation.sources += named


def _from_llama_factory(translation: Translation) -> None:
    samples = whole("max_samples", translation.left.pop("max_samples")) if "max_samples" in translation.left else None
    folder = text("dataset_dir", translation.left.pop("dataset_dir", "data"))
    for field, wanted in (("data", "dataset"), ("validation", "eval_dataset")):
        key, value = translation.take(wanted)
        if value is None:
            continue
        names = [name.strip() for one in (value if isinstance(value, list) else [value]) for name in text(key, one).split(",")]
        sources: list[dict[str, Any]] = [{"path": name} for name in names if name]
        if samples is not None:
            sources = [{**source, "conversations": samples} for source in sources]
        translation.put(key, field, sources)
        translation.sources += [source["path"] for source in sources]
    if samples is not None:
        translation.remark(
            TRANSLATED, "max_samples -> data[].conversations (chosen by the seed; there the first ones are taken)"
        )
    translation.remark(
        BEFORE,
        f"The names of data sets stand for what {folder}/dataset_info.json says: put those files or hub ids in their place.",
    )
    key, template = translation.take("template")
    _put_format(translation, key, template if template is not None else "tokenizer_default", given=template is not None)


def _put_format(translation: Translation, key: str, template: Any, *, given: bool = True) -> None:
    name, note = find_format(translation.trainer, text(key, template))
    if name is None:
        translation.remark(UNSUPPORTED, f"{key}: {template}: {note}")
    else:
        translation.put(key if given else f"no {key} is given", "format", name, note)


def _from_axolotl(translation: Translation) -> None:
    overall = translation.left.pop("chat_template", None)
    if overall is not None and switched_off(overall):
        translation.remark(MEANINGLESS, f"chat_template: {OFF}")
        overall = None
    elif overall is not None:
        overall = text("chat_template", overall)
    templates: list[str] = []
    for field, key in (("data", "datasets"), ("validation", "test_datasets")):
        _, entries = translation.take(key)
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise RecipeError(f"{key} is no list of data sets.", remedy=f"{key}: [{{path: FILE, type: chat_template}}]")
        sources = [source for entry in entries for source in _read_entry(translation, key, entry, overall, templates)]
        translation.put(key, field, sources)
    # What is said for all goes before what single ones bring along.
    named = sorted(dict.fromkeys(templates or ([overall] if overall else [])), key=lambda name: name != overall)
    if not named:
        translation.remark(UNSUPPORTED, "format: neither chat_template nor a type says it; set it (chaccu format list)")
        return
    if overall and overall not in named:
        translation.remark(MEANINGLESS, "chat_template: the types of the data sets bring their own")
    _put_format(translation, "chat_template" if named[0] == overall else "datasets[].type", named[0])
    if named[1:]:
        translation.remark(
            UNSUPPORTED,
            f"datasets: a recipe has one format, and {named[0]} is taken; not written: {', '.join(named[1:])}",
        )


def _read_entry(
    translation: Translation, key: str, entry: dict[str, Any], overall: str | None, templates: list[str]
) -> list[dict[str, str]]:
    """The sources of one data set of axolotl's; its template joins `templates`."""
    left = {name: value for name, value in entry.items() if value is not None}
    path, files, kind = left.pop("path", None), left.pop("data_files", None), left.pop("type", None)
    listed = [text(f"{key}[].data_files", file) for file in (files if isinstance(files, list) else [files] if files else [])]
    if path is None and not listed:
        raise RecipeError(f"a data set under {key} has no path.", remedy="add it")
    plain = path is None or path in _LOADERS
    named = listed if plain and listed else [text(f"{key}[].path", path)]
    if listed and not plain:
        translation.remark(TRANSLATED, f"{key}[].data_files: see the sources of chaccu data clean below")
    hub = (
        not plain
        and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", named[0])
        and not re.search(r"\.(jsonl?|parquet|csv|zst|gz)$", named[0])
    )
    translation.sources += [f"hf:{named[0]}{f':{file}' if file else ''}" for file in (listed or [""])] if hub else named
    template = _template_of(translation, key, kind, left, overall)
    if template:
        templates.append(template)
    _tell_entry(translation, key, left)
    return [{"path": one} for one in named]


def _template_of(translation: Translation, key: str, kind: Any, left: dict[str, Any], overall: str | None) -> str | None:
    # What is not taken stays, and is told with the rest.
    given = next((name for name in ("chat_template", "conversation") if left.get(name)), None)
    own = None if given is None else text(f"{key}[].{given}", left.pop(given))
    if isinstance(kind, dict):
        translation.remark(UNSUPPORTED, f"{key}[].type: prompts of one's own; write those records as conversations first")
        return own
    kind = str(kind or "").split(".")[0].split(":")[0]
    if kind in ("completion", "pretrain", "input_output"):
        translation.remark(UNSUPPORTED, f"{key}[].type: {kind} is no conversation; the loss counts replies only")
        return own
    translation.remark(TRANSLATED, f"{key}[].type -> chaccu data clean finds out what kind of records there are")
    if kind == "chat_template":
        return own or overall or "tokenizer_default"
    if kind == "sharegpt":
        return own or overall or "vicuna_v1.1"
    return own or ("alpaca" if kind.startswith("alpaca") else overall)


def _tell_entry(translation: Translation, key: str, left: dict[str, Any]) -> None:
    """Remarks on what else a data set of axolotl's says."""
    same = {"split": ("train",), "train_on_eos": ("turn",), "roles_to_train": (["assistant"], ["gpt", "assistant"], ["gpt"])}
    instead = {
        "split": "name the file of that part (hf:OWNER/NAME:FILE), or take a share with conversations",
        "train_on_eos": "the end of every reply is trained",
        "roles_to_train": "the replies of the assistant are trained, nothing else",
        "shards": "conversations takes a part of a source",
        "shards_idx": "conversations takes a part of a source",
        "revision": "name a file that was fetched from it",
        "drop_system_message": "chaccu data clean keeps system texts",
        "chat_template_jinja": f"write a format file, or put it in the tokenizer's folder and take format: {TOKENIZER_FORMAT}",
    }
    for name, value in left.items():
        if value in same.get(name, ()):
            translation.remark(MEANINGLESS, f"{key}[].{name}: the same here")
        elif any(re.fullmatch(pattern.replace("*", ".*"), name) for pattern in _FOUND):
            translation.remark(MEANINGLESS, f"{key}[].{name}: chaccu data clean finds a record's turns")
        elif switched_off(value):
            translation.remark(MEANINGLESS, f"{key}[].{name}: {OFF}")
        else:
            translation.remark(UNSUPPORTED, f"{key}[].{name}: {instead.get(name, 'not known, and not carried over')}")


def _tell_held_out(translation: Translation, key: str, share: float) -> None:
    if share <= 0:
        translation.remark(MEANINGLESS, f"{key}: nothing is held out")
    elif share < 1:
        translation.held_out = share
        translation.remark(TRANSLATED, f"{key} -> chaccu data clean --validation-share {share:g}, see above")
    else:
        translation.remark(
            UNSUPPORTED, f"{key}: what is held out is a share, chaccu data clean --validation-share, not a number"
        )
