"""Faults of the weights' files: pickles, indexes that are missing or wrong, tensors that no model reads.

Which files are the weights follows transformers: `model.safetensors`, else the index, else pickles. Safetensors shards
without an index beside whole pickles are what a mending left that was stopped; the pickles count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from chaccu.weights.pickled_shards import PICKLED_INDEX_NAME, PickledFile, list_pickled_shards
from chaccu.weights.repair.draft import CONFIG, Draft, Finding
from chaccu.weights.safetensors_file import SafetensorsFile, TensorSpec

_ADAPTER = "adapter_model.safetensors"
# Mistral ships one beside the shards, with names of its own.
_NO_SHARDS = (_ADAPTER, "consolidated.safetensors")
# Where weights are written anew before they take their place, and in it the names of the files that they replace.
STAGED, REPLACED = ".mended-weights", "replaced.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# Computed from the config on loading; what old checkpoints hold of it is ignored at best.
_ROTARY = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".attention.rope.freqs")


def find_unreadable_weights(draft: Draft) -> Iterator[Finding]:
    """Opens the weights, whatever form they are in. Finds pickles, damaged files and a missing or wrong index."""
    try:
        safe = _list_safetensors(draft)
        if safe and (INDEX_NAME in draft.documents or (draft.folder / SINGLE_NAME).is_file() or not _has_pickles(draft)):
            draft.weights = Checkpoint(draft.folder, files=[SafetensorsFile(path) for path in safe])
            yield from _find_wrong_index(draft)
        elif _has_pickles(draft):
            yield from _find_pickles(draft)
        else:
            yield Finding("", f"{draft.folder} holds no weights", "name a folder with a model's weights", mendable=False)
    except WeightsError as error:
        draft.weights = None
        # Of two files with one tensor nobody but the user knows which is the model's.
        is_here = error.remedy.startswith("chaccu weights repair")
        remedy = "keep the files of one model" if is_here else error.remedy or "fetch it again"
        yield Finding("", error.message.rstrip("."), remedy, mendable=False)


def _list_safetensors(draft: Draft) -> list[Path]:
    """The shards of safetensors: what the index names, with what it should name if it is wrong."""
    single = draft.folder / SINGLE_NAME
    if single.is_file():
        return [single]
    there = sorted(path for path in draft.folder.glob("*.safetensors") if path.name not in _NO_SHARDS)
    places = (draft.get(INDEX_NAME) or {}).get("weight_map")
    named = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    listed = [path for path in there if path.name in named]
    if not listed:
        return there
    held = {name for path in listed for name in SafetensorsFile(path).entries}
    # An index that knows all of its tensors' files is believed, whatever else lies beside them.
    is_whole = isinstance(places, dict) and held >= _needed(places) and not _find_missing([path.name for path in listed])
    return listed if is_whole else there


def _needed(places: dict[str, str]) -> set[str]:
    return {name for name in places if not name.endswith(_ROTARY)}


def _has_pickles(draft: Draft) -> bool:
    return any(draft.folder.glob("pytorch_model*.bin")) or PICKLED_INDEX_NAME in draft.documents


def _find_wrong_index(draft: Draft) -> Iterator[Finding]:
    assert draft.weights is not None
    names = [file.path.name for file in draft.weights.files]
    if missing := _find_missing(names):
        raise WeightsError(f"{missing} is a part of the weights and is not there.", remedy="fetch it again")
    found = draft.weights.places
    if INDEX_NAME not in draft.documents:
        if needs_index(draft.folder, names):
            diff = draft.put(INDEX_NAME, build_index(draft.weights.entries, found))
            yield Finding(INDEX_NAME, f"is missing: {_count(names)}", "is written from the headers", diff=diff)
        return
    places = (draft.get(INDEX_NAME) or {}).get("weight_map")
    if places == found:
        return
    known = places if isinstance(places, dict) else {}
    if lost := sorted(_needed(known) - found.keys()):
        raise WeightsError(
            f"{INDEX_NAME} names {lost[0]}{_and_more(lost)}, which no file of weights here holds.",
            remedy="fetch the missing shards again, or take the index away if it is another model's",
        )
    if not needs_index(draft.folder, names):
        draft.remove([INDEX_NAME])
        yield Finding(INDEX_NAME, f"is not of {SINGLE_NAME}, which holds all of the weights", "is taken away")
        return
    wrong = next((name for name in found if known.get(name) != found[name]), None)
    example = f"{wrong} is in {found[wrong]}" if wrong else "it names tensors that are not there"
    diff = draft.put(INDEX_NAME, build_index(draft.weights.entries, found))
    yield Finding(INDEX_NAME, f"is not of the shards: {example}", "is written anew from their headers", diff=diff)


def needs_index(folder: Path, names: Iterable[str]) -> bool:
    """Whether the files called `names` are told from others, or found at all, by an index alone."""
    used = {SINGLE_NAME, *names}
    return used != {SINGLE_NAME} or any(
        path.name not in used and path.name != _ADAPTER for path in folder.glob("*.safetensors")
    )


def build_index(specs: Mapping[str, TensorSpec], places: Mapping[str, str]) -> dict[str, object]:
    """The index of tensors that lie in the files `places`."""
    total = sum(specs[name].size_bytes for name in places)
    return {"metadata": {"total_size": total}, "weight_map": dict(places)}


def _find_missing(names: list[str]) -> str | None:
    """The first shard that is not among `names`: numbered ones say how many there are."""
    numbered = [match for match in map(_NUMBERED.fullmatch, names) if match]
    for stem, count in sorted({(match[1], match[3]) for match in numbered}):
        wanted = [f"{stem}-{at:05}-of-{count}.safetensors" for at in range(1, int(count) + 1)]
        if missing := next((name for name in wanted if name not in names), None):
            return missing
    return None


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _count(names: list[str]) -> str:
    return f"{len(names)} shards hold the weights" if len(names) > 1 else f"{names[0]} holds the weights"


def _find_pickles(draft: Draft) -> Iterator[Finding]:
    index = draft.get(PICKLED_INDEX_NAME)
    places = (index or {}).get("weight_map")
    shards = list_pickled_shards(draft.folder, places if isinstance(places, dict) else None)
    if not shards:
        raise WeightsError(f"{draft.folder} holds no weights.", remedy="name a folder with a model's weights")
    files = [PickledFile(path) for path in shards]
    draft.weights = Checkpoint(draft.folder, files=files)
    draft.rewriting.append("pickles")
    draft.remove([*(path.name for path in shards), *([PICKLED_INDEX_NAME] if index is not None else [])])
    yield Finding(
        shards[0].name if len(shards) == 1 else f"{shards[0].name} … {shards[-1].name}",
        "is a pickle, which runs code when it is loaded"
        if len(shards) == 1
        else "are pickles, which run code when they are loaded",
        "is written as safetensors" if len(shards) == 1 else "are written as safetensors",
    )
    for twins in (twins for file in files for twins in file.find_twins()):
        yield from _settle_twins(draft, twins)


def _settle_twins(draft: Draft, twins: list[str]) -> Iterator[Finding]:
    """One tensor under several names: transformers keeps the embedding's, and ties the projection to it on loading."""
    embedding, head = draft.find_embedding(), draft.find_head()
    if embedding is None or head is None or {embedding.name, head.name} != set(twins):
        draft.notes.append(f"{' and '.join(twins)} are one tensor in the pickle and are written apart.")
        return
    if draft.text_config.get("tie_word_embeddings") is False:
        draft.notes.append(f"{' and '.join(twins)} are one tensor, and the config does not tie them: they are written apart.")
        return
    draft.left_out.add(head.name)
    if draft.config.get("tie_word_embeddings") is True or draft.text_config.get("tie_word_embeddings") is True:
        draft.notes.append(f"{head.name} is {embedding.name}, to which the config ties it: it is written once.")
        return
    diff = draft.put(CONFIG, {**draft.config, "tie_word_embeddings": True})
    yield Finding(
        CONFIG,
        f"does not say that {head.name} is {embedding.name}, one tensor in the pickle",
        "says so; it is written once",
        diff=diff,
    )


def find_rotary_buffers(draft: Draft) -> Iterator[Finding]:
    """Buffers of rotary positions, which old checkpoints hold: dropped with the next rewriting, which they are reason enough
    for."""
    if draft.weights is None:
        return
    buffers = [name for name in draft.weights.entries if name.endswith(_ROTARY)]
    if not buffers:
        return
    draft.left_out |= set(buffers)
    if not draft.rewriting:
        draft.rewriting.append("rotary buffers")
    yield Finding(
        draft.weights.places[buffers[0]],
        f"holds {buffers[0]}{_and_more(buffers)}, which the config determines",
        "the weights are written without them",
    )


def find_stopped_mending(draft: Draft) -> Iterator[Finding]:
    """What a mending left that was stopped when the new weights were in place and the old ones not yet gone."""
    staged = draft.folder / STAGED
    if draft.weights is None or draft.rewriting or not staged.is_dir():
        return
    used = {file.path.name for file in draft.weights.files}
    try:
        names = msgspec.json.decode((staged / REPLACED).read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError):
        names = []
    # The file came with the folder, and may be anyone's.
    ours = (name for name in names if Path(name).name == name and name.endswith((".bin", ".safetensors")))
    left = [name for name in ours if name not in used and (draft.folder / name).is_file()]
    draft.remove(left)
    what = f", and {left[0]}{_and_more(left)} as well, which it had replaced" if left else ""
    yield Finding(STAGED, f"is left of a mending that was stopped{what}", "what it left is taken away")


def find_stale_pickled_index(draft: Draft) -> Iterator[Finding]:
    """An index of pickles that are not there, beside safetensors: some loaders follow it and find nothing."""
    if PICKLED_INDEX_NAME not in draft.documents or PICKLED_INDEX_NAME in draft.removed or draft.weights is None:
        return
    places = (draft.get(PICKLED_INDEX_NAME) or {}).get("weight_map")
    named = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    missing = [name for name in named if name in draft.removed or not (draft.folder / name).is_file()]
    if missing or not named:
        draft.remove([PICKLED_INDEX_NAME])
        what = f"names {missing[0]}, which is not there" if missing else "names no files"
        yield Finding(PICKLED_INDEX_NAME, f"{what}; the weights are in safetensors", "is taken away")
