"""What other trainers' keys come to: the values of a recipe, and a remark for every key.

Invariant: whatever is taken out of `Translation.left` leaves a remark under one of `HEADINGS`, and so does what is still there
in the end. Values of keys that Chaccu does not know are never repeated: they may be secrets.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from typing import Any

import yaml

from chaccu.conversation import TOKENIZER_FORMAT
from chaccu.errors import RecipeError
from chaccu.train.foreign.command import COUNTING_FLAGS, TrainingCommand
from chaccu.train.foreign.data import translate_data
from chaccu.train.foreign.headings import BEFORE, DEFAULTS, HEADINGS, MEANINGLESS, OFF, TRANSLATED, UNSUPPORTED
from chaccu.train.foreign.method import translate_method
from chaccu.train.foreign.positions import translate_positions
from chaccu.train.foreign.step_size import compare_steps, translate_step_size
from chaccu.train.foreign.trainers import DIALECTS, find_entry
from chaccu.train.foreign.values import number, switched_off, text, truth, whole
from chaccu.train.foreign.watching import translate_watching
from chaccu.train.recipe import Recipe

_ADAMW = {"adamw", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision", "optimi_adamw", "paged_adamw", "paged_adamw_32bit"}
_ADAMW_8BIT = {"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "ao_adamw_8bit", "adamw_torch_8bit"}
_ADAMW_4BIT = {"adamw_torch_4bit", "ao_adamw_4bit"}
_ADAMW_VALUES = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}


class Translation:
    """One configuration on its way into a recipe: `left` are the keys not dealt with yet, `fields` the recipe's values,
    `sources` what `chaccu data clean` is to read, `held_out` the share of them to validate with, `defaulted` the keys that have
    the trainer's default."""

    def __init__(self, trainer: str, given: dict[str, Any], command: TrainingCommand | None = None) -> None:
        self.trainer = trainer
        self.dialect = DIALECTS[trainer]
        self.command = command
        self.left = {key: value for key, value in given.items() if value is not None}
        self.fields: dict[str, Any] = {}
        self.remarks: dict[str, list[str]] = {heading: [] for heading in HEADINGS}
        self.sources: list[str] = []
        self.held_out: float | None = None
        self.defaulted: set[str] = set()
        if empty := [key for key, value in given.items() if value is None]:
            self.remark(MEANINGLESS, f"{', '.join(empty)}: empty there")

    def run(self) -> None:
        """Fill `fields` and `remarks`. Raises `RecipeError` for an unreadable value and for what is no training on chat."""
        self._refuse_other_aims()
        self.direct("model", self.dialect.model, text)
        self.direct("output", ("output_dir",), text)
        self.direct("learning_rate", ("learning_rate",), number)
        self.direct("weight_decay", ("weight_decay",), number)
        self.direct("seed", ("seed",), whole)
        self.direct("compile", ("torch_compile",), truth)
        translate_method(self)
        translate_data(self)
        translate_step_size(self)
        translate_positions(self)
        self._translate_schedule()
        self._translate_optimizer()
        self._translate_precision()
        self._translate_checkpointing()
        translate_watching(self)
        self._tell_data()
        compare_steps(self)
        self._tell_command()
        self._tell_rest()
        self.fields = {key: self.fields[key] for key in Recipe.__struct_fields__ if key in self.fields}

    def remark(self, heading: str, remark: str) -> None:
        """Say what became of a key, once."""
        if remark not in self.remarks[heading]:
            self.remarks[heading].append(remark)

    def take(self, *names: str) -> tuple[str, Any]:
        """The first of `names` that is given, with its value; else the first with the trainer's default or None."""
        for name in names:
            if name in self.left:
                return name, self.left.pop(name)
        if names[0] in self.dialect.defaults:
            self.use_default(names[0])
        return names[0], self.dialect.defaults.get(names[0])

    def use_default(self, key: str) -> None:
        """`key` is not given: what is put for it is the trainer's default."""
        self.defaulted.add(key)

    def put(self, key: str, field: str, value: Any, note: str = "") -> None:
        """Set a field of the recipe (`lora.rank` reaches inside) to what became of `key`."""
        *outer, last = field.split(".")
        fields = self.fields
        for name in outer:
            fields = fields.setdefault(name, {})
        fields[last] = value
        shown = (
            yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
            .removesuffix("...\n")
            .strip()
        )
        self.remark(
            DEFAULTS if key in self.defaulted else TRANSLATED,
            f"{key} -> {field}: {shown}{f' ({note})' if note else ''}",
        )

    def direct(self, field: str, names: tuple[str, ...], read: Callable[[str, Any], Any]) -> None:
        """A field that means the same there."""
        key, value = self.take(*names)
        if value is not None:
            self.put(key, field, read(key, value))
        elif field in ("model", "learning_rate"):
            raise RecipeError(f"the configuration has no {key}.", remedy=f"add {key} to it")

    def _refuse_other_aims(self) -> None:
        _, stage = self.take("stage")
        if stage not in (None, "sft"):
            raise RecipeError(
                f"stage is {stage!r}; Chaccu trains on conversations, which is sft.", remedy="import its sft stage"
            )
        if stage is not None:
            self.remark(MEANINGLESS, "stage: sft is what chaccu train does")
        for key in ("rl", "reward_model", "process_reward_model", "pretraining_dataset"):
            if key in self.left and not switched_off(self.left[key]):
                raise RecipeError(
                    f"the configuration has {key}; Chaccu trains on conversations.",
                    remedy="import the configuration of the supervised stage",
                )

    # --- the way of the learning rate ---

    def _translate_schedule(self) -> None:
        key, limit = self.take("max_steps")
        if limit is not None and whole(key, limit) > 0:
            self.put(key, "max_steps", whole(key, limit), "num_train_epochs ends a run too: raise it where it comes first")
        elif limit is not None:
            self.remark(MEANINGLESS, f"{key}: no limit")
        key, epochs = self.take(*self.dialect.epochs)
        epochs = number(key, epochs)
        self.put(key, "num_train_epochs", math.ceil(epochs))
        if epochs != math.ceil(epochs):
            self.remark(
                UNSUPPORTED, f"{key}: epochs are whole, {math.ceil(epochs)} for {epochs:g}; max_steps ends a run sooner"
            )
        key, schedule = self.take(*self.dialect.scheduler)
        if schedule in _SCHEDULES:
            self.put(key, "lr_scheduler", _SCHEDULES[schedule])
        else:
            self.fields["lr_scheduler"] = "cosine"
            self.remark(UNSUPPORTED, f"{key}: {schedule} is not there; cosine is written, the others are linear and constant")
        self._translate_warmup(warms_up=schedule != "constant")
        key, norm = self.take("max_grad_norm")
        if norm is not None and number(key, norm) == 0:
            self.put(key, "max_grad_norm", 1e9, "not clipped there, and never by so much here")
        elif norm is not None:
            self.put(key, "max_grad_norm", number(key, norm))

    def _translate_warmup(self, *, warms_up: bool) -> None:
        given = [key for key in ("warmup_steps", "warmup_ratio") if key in self.left]
        steps = number("warmup_steps", self.left.pop("warmup_steps", 0))
        key, ratio = self.take("warmup_ratio")
        if not warms_up:
            self.fields["warmup_ratio"] = 0.0
            self.remark(TRANSLATED, f"{', '.join(given) or 'constant'} -> warmup_ratio: 0.0 (constant does not warm up there)")
        elif steps >= 1:
            limit = self.fields.get("max_steps")
            if "warmup_ratio" in given:
                self.remark(MEANINGLESS, "warmup_ratio: warmup_steps stands before it there")
            if limit:
                self.put("warmup_steps", "warmup_ratio", round(steps / limit, 6), f"{steps:g} of {limit:,} steps")
            else:
                self.fields["warmup_ratio"] = 0.03
                self.remark(
                    UNSUPPORTED,
                    f"warmup_steps: warming up is a share of the run; 0.03 is written. Set warmup_ratio to {steps:g} by the "
                    "steps of the run, which chaccu train shows",
                )
        elif steps > 0 or given == ["warmup_steps"]:
            self.put("warmup_steps", "warmup_ratio", steps)
        else:
            if "warmup_steps" in given:
                self.remark(MEANINGLESS, "warmup_steps: none, so warmup_ratio holds")
            self.put(key, "warmup_ratio", number(key, ratio))

    # --- the optimizer and its memory ---

    def _translate_optimizer(self) -> None:
        key, name = self.take(*self.dialect.optimizer)
        name = text(key, name).lower()
        full = self.fields["method"] == "full"
        if name in _ADAMW_8BIT | _ADAMW_4BIT:
            note = "moments in 8 bits" if name in _ADAMW_4BIT else ""
            note = note if full else "an adapter's moments are small: 8 bits are for method full"
            self.put(key, "optimizer", "adamw_8bit" if full else "adamw", note)
        elif name in _ADAMW or (name.startswith("adamw_torch") and "bit" not in name):
            self.put(key, "optimizer", "adamw")
        elif name == "adafactor":
            self.put(key, "optimizer", "adafactor", "the rate as it is, neither relative steps nor scaled by weights, as there")
        else:
            self.fields["optimizer"] = "adamw"
            self.remark(UNSUPPORTED, f"{key}: {name} is not there; adamw is written, which wants a learning rate of its own")
        for key, value in _ADAMW_VALUES.items():
            if key not in self.left:
                continue
            given = number(key, self.left.pop(key))
            if name == "adafactor":
                self.remark(MEANINGLESS, f"{key}: Adafactor has none")
            elif math.isclose(given, value):
                self.remark(MEANINGLESS, f"{key}: {value:g} here too")
            else:
                self.remark(UNSUPPORTED, f"{key}: AdamW runs with {value:g}")

    def _translate_precision(self) -> None:
        wanted: dict[str, Any] = {}
        for key in ("bf16", "bfloat16", "pure_bf16", "fp16", "float16", "float32"):
            if key in self.left:
                value = self.left.pop(key)
                wanted[key] = value if value in ("auto", "full") else truth(key, value)
        asked = next((key for key, value in wanted.items() if value), "")
        if self._takes_float8():
            wanted["fp8"] = True
            asked = "fp8"
        for key in wanted:
            if key != asked:
                self.remark(MEANINGLESS, f"{key}: {OFF if not wanted[key] else f'{asked} stands before it'}")
        if asked in ("fp16", "float16"):
            self.put(asked, "precision", "auto", "bf16 where the processor multiplies it natively, float16 on GPUs that do not")
        elif asked == "fp8":
            self.put(asked, "precision", "fp8")
        elif asked:
            precision = "fp32" if asked == "float32" else "auto" if wanted[asked] == "auto" else "bf16"
            self.put(asked, "precision", precision)
            pure = asked == "pure_bf16" or wanted[asked] == "full"
            if pure and self.fields["method"] == "full" and self.fields["optimizer"] == "adamw":
                note = "in place of adamw: weights and moments in bf16, rounded stochastically here"
                self.put(asked, "optimizer", "adamw_bf16_sr", note)
        elif "bf16" in wanted and self.trainer == "axolotl":
            self.put("bf16", "precision", "fp32")
        else:
            self.use_default("no 16-bit precision")
            self.put("no 16-bit precision", "precision", self.dialect.defaults["precision"])

    def _takes_float8(self) -> bool:
        """Whether fp8 is asked for and the rest of the recipe goes with it."""
        fields = self.fields
        if "fp8" not in self.left or not truth("fp8", self.left["fp8"]):
            return False
        row = fields.get("micro_batch_tokens", fields["sequence_len"])
        if fields["method"] != "full" or not fields.get("compile") or row % 16:
            return False
        del self.left["fp8"]
        return True

    def _translate_checkpointing(self) -> None:
        if self.trainer == "llama-factory":
            if self.left.pop("gradient_checkpointing", None) is not None:
                self.remark(MEANINGLESS, "gradient_checkpointing: disable_gradient_checkpointing decides there")
            key = "disable_gradient_checkpointing"
            if key in self.left:
                off = truth(key, self.left.pop(key))
                self.put(key, "activation_checkpointing", "none" if off else "full")
                return
        key, value = self.take("gradient_checkpointing")
        offloads = isinstance(value, str) and value.startswith(("offload", "unsloth"))
        if offloads or truth(key, value):
            note = "what is kept stays on the device" if offloads else ""
            self.put(key, "activation_checkpointing", "full", note)
        else:
            self.put(key, "activation_checkpointing", "none")

    # --- what the person has to know ---

    def _tell_data(self) -> None:
        length, model = self.fields["sequence_len"], self.fields["model"]
        named = self.fields.get("format")
        words = [
            "chaccu",
            "data",
            "clean",
            *self.sources,
            "--out",
            "runs/data",
            "--tokenizer",
            model,
            "--max-tokens",
            str(length),
        ]
        words += ["--format", named] if named and named != TOKENIZER_FORMAT else []
        words += ["--validation-share", f"{self.held_out:g}"] if self.held_out else []
        self.remark(
            BEFORE,
            "data names what was read there; training reads JSON lines of conversations, so make them first and put "
            "runs/data/train.jsonl in its place, runs/data/validation.jsonl under validation. Conversations of more than "
            f"{length:,} tokens are {'left out' if self.trainer == 'axolotl' else 'cut off'} there; this splits them:",
        )
        self.remark(BEFORE, "    " + shlex.join(words))
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
            self.remark(
                BEFORE,
                f"{model} looks like a hub id: training fetches it, and --tokenizer above wants a folder "
                f"(hf download {model} --local-dir FOLDER)",
            )
        for field in ("model", "output", "data", "validation"):
            if re.search("[$`]", str(self.fields.get(field, ""))):
                self.remark(BEFORE, f"{field} holds a variable that the script does not set: put its value in")

    def _tell_command(self) -> None:
        if self.command is None:
            return
        told = COUNTING_FLAGS if "processes" in self.fields else ()
        launcher = ", ".join([*(one for one in self.command.launcher if one not in told), *self.command.environment])
        if launcher:
            self.remark(MEANINGLESS, f"{launcher}: of the launcher; chaccu train starts the processes itself")
        if self.command.loose:
            self.remark(UNSUPPORTED, f"{' '.join(self.command.loose)}: these words belong to no flag that could be read")
        if self.command.others:
            self.remark(BEFORE, f"The script trains {self.command.others} times more; only its first command is here.")

    def _tell_rest(self) -> None:
        """What is still left: without meaning, not supported, or not known at all."""
        told: dict[tuple[str, str], list[str]] = {}
        for key, value in self.left.items():
            meaningless, unsupported = (
                find_entry("meaningless", self.trainer, key),
                find_entry("unsupported", self.trainer, key),
            )
            if meaningless is not None:
                told.setdefault((MEANINGLESS, meaningless), []).append(key)
            elif unsupported is not None and switched_off(value):
                told.setdefault((MEANINGLESS, OFF), []).append(key)
            else:
                why = unsupported or "not known, and not carried over; see what it does there"
                told.setdefault((UNSUPPORTED, why), []).append(key)
        self.left = {}
        for (heading, why), keys in told.items():
            self.remark(heading, f"{', '.join(keys)}: {why}")
